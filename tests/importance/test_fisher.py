"""Empirical Fisher against hand-worked values, a loop over examples, and Adam's own arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from safe_lab.importance import METRICS

FISHER = METRICS["fisher"]


def test_worked_value(linear_loss):
    probe = linear_loss([1.0, -2.0], [(1.0, -4.0), (3.0, -2.0)])
    per_weight = [(1 + 9) / 2, (16 + 4) / 2]
    assert FISHER.score(probe) == pytest.approx([sum(per_weight) / 2])
    assert FISHER.score(probe, weighted=True) == pytest.approx([(per_weight[0] * 1 + per_weight[1] * 4) / 2])


def test_gradients_that_cancel_in_the_batch_still_count(linear_loss):
    assert FISHER.score(linear_loss([1.0], [(2.0,), (-2.0,)])) == pytest.approx([4])


@pytest.mark.parametrize("weighted", [False, True])
def test_probe_source_is_a_loop_over_examples(case, weighted):
    case.train()
    case.model.eval()
    expected = []
    for unit in case.units:
        total, num_examples = 0.0, 0
        for batch in case.batches:
            for i in range(len(next(iter(batch.values())))):
                case.model.zero_grad()
                case.loss_function(case.model, {name: tensor[i][None] for name, tensor in batch.items()}).backward()
                for p in unit.parameters.values():
                    total += (p.grad**2 * (p.detach() ** 2 if weighted else 1)).sum().item()
                num_examples += 1
        expected.append(total / num_examples / sum(p.numel() for p in unit.parameters.values()))
    assert FISHER.score(case.probe(), weighted=weighted) == pytest.approx(expected, rel=1e-5)


def adam_probe(linear_loss, gradients, *, optimizer_class=torch.optim.AdamW, **arguments):
    """One weight, 3.0, stepped by hand with these gradients."""
    probe = linear_loss([3.0], [(1.0,)])
    optimizer = optimizer_class([probe.model.theta], lr=0.0, weight_decay=0.0, **arguments)
    for gradient in gradients:
        probe.model.theta.grad = torch.tensor([gradient])
        optimizer.step()
    return replace(probe, optimizer=optimizer)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_adam_source_is_the_second_moment_without_bias(linear_loss, optimizer_class):
    probe = adam_probe(linear_loss, [1.0, 2.0], optimizer_class=optimizer_class, betas=(0.9, 0.75))
    moment = (0.75 * 0.25 * 1 + 0.25 * 4) / (1 - 0.75**2)
    assert FISHER.score(probe, source="adam") == pytest.approx([moment])
    assert FISHER.score(probe, source="adam", weighted=True) == pytest.approx([moment * 9])


def test_constant_gradient_has_its_square_as_second_moment(linear_loss):
    probe = adam_probe(linear_loss, [0.5] * 3)
    assert FISHER.score(probe, source="adam") == pytest.approx([0.25])


def test_adam_source_runs_no_pass(linear_loss):
    def fail(model, batch):
        raise AssertionError("the model ran")

    assert FISHER.score(replace(adam_probe(linear_loss, [1.0]), loss_function=fail), source="adam") == pytest.approx(
        [1]
    )


def test_adam_source_reads_through_accelerate(linear_loss):
    probe = adam_probe(linear_loss, [1.0, 2.0])
    prepared = Accelerator(cpu=True).prepare_optimizer(probe.optimizer)
    assert FISHER.score(replace(probe, optimizer=prepared), source="adam") == FISHER.score(probe, source="adam")


def test_adam_source_reads_the_group_of_each_parameter(bare):
    groups = [
        {"params": list(unit.parameters.values()), "betas": (0.9, beta2)}
        for unit, beta2 in zip(bare.units, (0.5, 0.9, 0.99), strict=True)
    ]
    bare.optimizer = torch.optim.AdamW(groups, lr=0.0)
    for parameter in bare.model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0) if parameter.requires_grad else None
    for _ in range(2):
        bare.optimizer.step()
    assert FISHER.score(bare.probe(), source="adam") == pytest.approx([4, 4, 4])


def test_adam_source_needs_an_optimizer(linear_loss):
    with pytest.raises(ValueError, match="source: probe"):
        FISHER.score(linear_loss([1.0], [(1.0,)]), source="adam")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adam_source_refuses_an_optimizer_without_second_moment(linear_loss, momentum):
    probe = adam_probe(linear_loss, [1.0], optimizer_class=torch.optim.SGD, momentum=momentum)
    with pytest.raises(ValueError, match=r"second moment of theta, and SGD keeps none.*AdamW"):
        FISHER.score(probe, source="adam")


def test_adam_source_refuses_a_parameter_that_was_never_stepped(linear_loss):
    probe = adam_probe(linear_loss, [])
    with pytest.raises(ValueError, match="theta was never stepped"):
        FISHER.score(probe, source="adam")
    assert probe.model.theta not in probe.optimizer.state


def test_adam_source_refuses_a_parameter_of_another_optimizer(linear_loss):
    probe = linear_loss([1.0], [(1.0,)])
    other = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="second moment of theta"):
        FISHER.score(replace(probe, optimizer=other), source="adam")

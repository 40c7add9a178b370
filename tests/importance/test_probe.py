"""The probe's own arithmetic, and that looking at a model leaves it alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from safe_lab.importance.probe import Probe, batch_gradients, mean_loss, probe_gradients, undisturbed
from safe_lab.units import Unit


def two_batches(model):
    """One batch of three examples and one of one, with loss mean_i x_i * theta."""
    batches = [{"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": torch.tensor([10.0])}]
    unit = Unit("unit", 0, {"theta": model.theta})
    return Probe(model, [unit], batches, lambda model, batch: (batch["x"] * model.theta).mean())


@pytest.fixture
def model():
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor(2.0))
    return module


def test_mean_loss_weighs_examples_and_not_batches(model):
    assert mean_loss(two_batches(model)) == pytest.approx(2 * (1 + 2 + 3 + 10) / 4)


def test_probe_gradient_weighs_examples_and_not_batches(model):
    (gradients,) = probe_gradients(two_batches(model))
    assert gradients["theta"].item() == pytest.approx((1 + 2 + 3 + 10) / 4)


def test_probe_gradient_of_a_frozen_parameter_is_that_of_a_live_one(model):
    live = probe_gradients(two_batches(model))[0]["theta"]
    model.theta.requires_grad_(False)
    assert torch.equal(probe_gradients(two_batches(model))[0]["theta"], live)
    assert not model.theta.requires_grad


def test_probe_gradient_leaves_grad_alone(model):
    model.theta.grad = grad = torch.tensor(5.0)
    probe_gradients(two_batches(model))
    assert model.theta.grad is grad
    assert grad.item() == 5


def test_parameter_that_the_loss_does_not_reach_has_gradient_zero(model):
    model.unused = nn.Parameter(torch.ones(2))
    probe = two_batches(model)
    unit = Unit("unit", 0, {"theta": model.theta, "unused": model.unused})
    (gradients,) = probe_gradients(Probe(model, [unit], probe.batches, probe.loss_function))
    assert gradients["unused"].tolist() == [0, 0]


def test_requires_grad_is_restored_when_the_loss_fails(model):
    model.theta.requires_grad_(False)
    probe = two_batches(model)

    def fail(model, batch):
        raise KeyError("labels")

    with pytest.raises(KeyError):
        probe_gradients(Probe(model, probe.units, probe.batches, fail))
    assert not model.theta.requires_grad


def test_loss_without_a_graph_is_refused(model):
    probe = two_batches(model)
    with pytest.raises(ValueError, match="no_grad"):
        probe_gradients(Probe(model, probe.units, probe.batches, lambda model, batch: batch["x"].mean()))


def test_gradients_are_at_least_float32():
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
    probe = two_batches(module)
    assert batch_gradients(probe, [module.theta], probe.batches[0])[0].dtype == torch.float32
    assert probe_gradients(probe)[0]["theta"].dtype == torch.float32


def test_probe_without_batches_is_refused(model):
    with pytest.raises(ValueError, match="no batches"):
        Probe(model, [], [], lambda model, batch: batch["x"].mean())


class Interrupt(Exception):
    """Something that goes wrong inside."""


@pytest.mark.parametrize("interrupted", [False, True], ids=["left", "interrupted"])
def test_undisturbed_restores_all_that_was_changed_inside(interrupted):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = grad = torch.ones(2, 2)
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    streams = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    try:
        with undisturbed(model):
            model.train()
            model.requires_grad_(True)
            model(torch.ones(1, 2)).sum().backward()
            random.random(), np.random.rand(), torch.rand(1)
            if interrupted:
                raise Interrupt
    except Interrupt:
        pass
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert model[0].weight.grad is grad
    assert grad.eq(1).all()
    assert model[2].weight.grad is None
    assert (random.getstate(), str(np.random.get_state())) == streams[:2]
    assert torch.equal(torch.get_rng_state(), streams[2])


def test_undisturbed_is_evaluation_without_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].weight.grad = torch.ones(2, 2)
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_undisturbed_restores_the_stream_of_a_cuda_device():
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with undisturbed(nn.Linear(2, 2)):
        torch.rand(1, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)

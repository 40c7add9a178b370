"""Gauss-Newton traces by effective weights against the dense matrix by the base weights, and what leaves them as they are."""

from __future__ import annotations

import pytest
import torch
from parallel import in_processes
from problems import F64, dense_hessian, mlp, seeded, transformer
from tiny import tiny_batch
from torch import nn

from safe_lab.adapters import affine_layers
from safe_lab.importance.probe import count_examples
from safe_lab.processes import ALONE
from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.effective_weights import effective_weight_traces
from safe_lab.sharpness.output_curvature import OUTPUT_CURVATURES, squared_error_roots
from safe_lab.sharpness.surface import logits


def traces(problem, *, model=None, layers=None, processes=ALONE):
    model = problem.model if model is None else model
    with twice_differentiable(model, problem.space.dtype):
        return effective_weight_traces(
            model,
            problem.batches,
            affine_layers(model) if layers is None else layers,
            OUTPUT_CURVATURES[problem.kind].roots,
            outputs=problem.outputs,
            processes=processes,
        )


def dense_traces(problem, weights):
    """Example by example and output by output, with gradients of the weights' size."""
    totals, number = dict.fromkeys(weights, 0.0), 0
    with twice_differentiable(problem.model, F64):
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in problem.batches:
            for i in range(count_examples(batch)):
                f_1C = problem.outputs(problem.model, {name: tensor[i : i + 1] for name, tensor in batch.items()})
                p_C = f_1C[0].detach().softmax(-1)
                H_CC = p_C.diag() - p_C.outer(p_C) if problem.kind == "classification" else 2 * torch.eye(len(p_C))
                for name, weight in weights.items():
                    rows = [torch.autograd.grad(f, weight, retain_graph=True)[0].flatten() for f in f_1C[0]]
                    J_CP = torch.stack(rows)
                    totals[name] += float((J_CP.T @ H_CC.to(J_CP) @ J_CP).diag().sum())
                number += 1
    return {name: total / number for name, total in totals.items()}


def base_weights_of(problem):
    return {name: layer.get_base_layer().weight for name, layer in affine_layers(problem.model).items()}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("num_labels", [1, 3], ids=["regression", "classification"])
def test_traces_are_those_of_the_dense_matrix(family, num_labels):
    """GPT-2 keeps its weights the other way round (Conv1D); both are given padded batches."""
    batches = [tiny_batch(examples=2, num_labels=3), tiny_batch(examples=1, num_labels=3, seed=5)]
    problem = transformer(family, num_labels=num_labels, batches=batches, initializer_range=0.1)
    found = traces(problem)
    assert found == pytest.approx(dense_traces(problem, base_weights_of(problem)), rel=1e-8)
    assert min(found.values()) > 1e-4


def test_traces_of_layers_without_tokens_are_those_of_the_dense_matrix(small):
    layers = {name: small.model[int(name)] for name in "02"}
    weights = {name: layer.weight for name, layer in layers.items()}
    assert traces(small, layers=layers) == pytest.approx(dense_traces(small, weights), rel=1e-10)


def test_worked_value():
    """Outputs w x with x = (1, 2) and (3, 0), squared error: (2 (1 + 4) + 2 (9 + 0)) / 2 = 14."""
    model = nn.Linear(2, 1, bias=False).double()
    batch = {"x": torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=F64)}
    found = effective_weight_traces(
        model, [batch], {"w": model}, squared_error_roots, outputs=lambda model, batch: model(batch["x"])
    )
    assert found == {"w": pytest.approx(14)}


# What leaves the function as it is


def lora_layers(problem):
    return [module for module in problem.model.modules() if hasattr(module, "lora_A")]


def mixed():
    """The same function with B M and M^-1 A."""
    problem = transformer()
    generator = seeded(9)
    with torch.no_grad():
        for layer in lora_layers(problem):
            M = torch.randn(2, 2, generator=generator, dtype=F64) + 2 * torch.eye(2, dtype=F64)
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A.copy_(torch.linalg.inv(M) @ A)
            B.copy_(B @ M)
    return problem


def test_traces_do_not_change_when_loras_factors_are_mixed(bert):
    assert traces(mixed()) == pytest.approx(traces(bert), rel=1e-8)


def test_the_hessians_trace_changes_when_loras_factors_are_mixed(bert_hessian):
    assert float(dense_hessian(mixed()).trace()) != pytest.approx(float(bert_hessian.trace()), rel=0.1)


def test_traces_do_not_change_when_the_adapters_are_merged(bert):
    before = traces(bert)
    names = {name: name.removeprefix("base_model.model.") for name in before}
    merged = bert.model.merge_and_unload()
    layers = {name: merged.get_submodule(short) for name, short in names.items()}
    assert all(type(layer) is nn.Linear for layer in layers.values())
    assert traces(bert, model=merged, layers=layers) == pytest.approx(before, rel=1e-8)


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_frozen_layers_count(bert, num_frozen):
    before = traces(bert)
    for unit in bert.units[:num_frozen]:
        for parameter in unit.parameters.values():
            parameter.requires_grad_(False)
    assert traces(bert) == before


def test_nothing_else_need_train(bert):
    before = traces(bert)
    bert.model.requires_grad_(False)
    assert traces(bert) == before


def test_padding_adds_nothing():
    """The same texts with more padding."""
    batch = tiny_batch()
    padded = {
        name: torch.cat([batch[name], torch.zeros(4, 3, dtype=torch.long)], 1)
        for name in ("input_ids", "attention_mask")
    }
    plain, wide = (transformer(batches=[one]) for one in (batch, padded | {"labels": batch["labels"]}))
    assert traces(wide) == pytest.approx(traces(plain), rel=1e-8)


def test_uneven_batches_are_one_large_batch():
    batch = tiny_batch(examples=5)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 4), slice(4, 5))]
    assert traces(transformer(batches=parts)) == pytest.approx(traces(transformer(batches=[batch])), rel=1e-9)


# Layers of other kinds


class Looped(nn.Module):
    """One layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def test_layer_that_runs_twice_has_one_weight():
    problem = mlp()
    problem.model = Looped().double()
    layers = {"layer": problem.model.layer}
    expected = dense_traces(problem, {"layer": problem.model.layer.weight})
    assert traces(problem, layers=layers) == pytest.approx(expected, rel=1e-8)


def test_layer_that_does_not_run_has_no_trace(small):
    idle = nn.Linear(3, 3)
    assert traces(small, layers={"idle": idle, "0": small.model[0]})["idle"] == 0


def test_layer_that_mixes_examples_is_left_out_by_name(caplog):
    """As DeBERTa's, which also turns its table of relative positions into keys."""
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(3, 1), nn.Unflatten(0, (-1, 5)), nn.Flatten(1), nn.Linear(5, 1)
    ).double()
    found = effective_weight_traces(
        model,
        [{"x": torch.ones(2, 5, 3, dtype=F64)}],
        {"mixing": model[1], "apart": model[4]},
        squared_error_roots,
        outputs=lambda model, batch: model(batch["x"]),
    )
    assert found.keys() == {"apart"} and found["apart"] > 0
    assert "1 layers do not keep examples apart and are left out, mixing among them" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_hooks_are_gone(bert, raises):
    def outputs(model, batch):
        if raises:
            logits(model, batch)
            raise KeyboardInterrupt
        return logits(model, batch)

    bert.outputs = outputs
    try:
        traces(bert)
    except KeyboardInterrupt:
        assert raises
    assert not any(module._forward_hooks for module in bert.model.modules())


def test_processes_together_find_what_one_does():
    """Batches of 3 examples and 1, so that of two processes one has none of the second."""
    problem = transformer(batches=[tiny_batch(examples=3), tiny_batch(examples=1, seed=5)])
    first, second = in_processes(lambda processes: traces(problem, processes=processes))
    assert first == second
    assert first == pytest.approx(traces(problem), rel=1e-10)

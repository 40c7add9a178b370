"""Weight-update norm against values worked by hand, and against LoRA's products written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safe_lab.importance import METRICS

UPDATE_NORM = METRICS["update_norm"]


def test_nothing_has_moved_before_training(case):
    assert UPDATE_NORM.score(case.probe(reference=UPDATE_NORM.prepare(case.probe()))) == [0, 0, 0]


def test_worked_value_without_delta_weights(linear_loss):
    probe = linear_loss([1.0, 1.0], [(1.0, 1.0)])
    probe = replace(probe, reference=UPDATE_NORM.prepare(probe))
    with torch.no_grad():
        probe.model.theta += torch.tensor([3.0, -4.0])
    assert UPDATE_NORM.score(probe) == pytest.approx([5])


def test_update_that_is_a_parameter_itself_is_measured_from_its_start(linear_loss):
    probe = linear_loss([1.0, 1.0], [(1.0, 1.0)])
    theta = probe.model.theta
    probe = replace(probe, units=[replace(probe.units[0], delta_weights=lambda: iter([theta]))])
    probe = replace(probe, reference=UPDATE_NORM.prepare(probe))
    with torch.no_grad():
        theta += torch.tensor([3.0, -4.0])
    assert UPDATE_NORM.score(probe) == pytest.approx([5])
    assert theta.tolist() == [4, -3]


def lora_products(unit):
    parameters = list(unit.parameters.items())
    a = [p.detach().clone() for name, p in parameters if "lora_A" in name]
    b = [p.detach().clone() for name, p in parameters if "lora_B" in name]
    scaling = 8 / 2
    return [scaling * b_i @ a_i for a_i, b_i in zip(a, b, strict=True)]


def test_lora_is_measured_on_the_product(bert):
    probe = bert.probe(reference=UPDATE_NORM.prepare(bert.probe()))
    bert.train()
    expected = [sum(delta.square().sum() for delta in lora_products(unit)).sqrt().item() for unit in bert.units]
    assert UPDATE_NORM.score(probe) == pytest.approx(expected, rel=1e-5)


def test_lora_that_did_not_start_at_zero_is_measured_from_its_start(bert):
    bert.train()
    probe = bert.probe(reference=UPDATE_NORM.prepare(bert.probe()))
    start = [lora_products(unit) for unit in bert.units]
    bert.train()
    expected = [
        sum((d - d0).square().sum() for d, d0 in zip(lora_products(unit), unit_start, strict=True)).sqrt().item()
        for unit, unit_start in zip(bert.units, start, strict=True)
    ]
    assert UPDATE_NORM.score(probe) == pytest.approx(expected, rel=1e-4)


def test_factors_that_turn_against_each_other_do_not_count(bert):
    probe = bert.probe(reference=UPDATE_NORM.prepare(bert.probe()))
    bert.train()
    before = UPDATE_NORM.score(probe)
    with torch.no_grad():
        for name, parameter in bert.model.named_parameters():
            parameter.mul_(2 if "lora_A" in name else 0.5 if "lora_B" in name else 1)
    assert UPDATE_NORM.score(probe) == pytest.approx(before, rel=1e-6)


def test_parameters_come_back_when_delta_weights_fail(bert):
    bert.train()
    probe = bert.probe(reference=UPDATE_NORM.prepare(bert.probe()))
    bert.train()
    weights = {name: parameter.clone() for name, parameter in bert.model.named_parameters()}

    def fail():
        raise KeyError("default")
        yield

    units = [replace(unit, delta_weights=fail) for unit in bert.units]
    with pytest.raises(KeyError):
        UPDATE_NORM.score(replace(probe, units=units))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in bert.model.named_parameters())


def test_start_is_a_copy_and_no_view(linear_loss):
    probe = linear_loss([1.0], [(1.0,)])
    reference = UPDATE_NORM.prepare(probe)
    with torch.no_grad():
        probe.model.theta.fill_(9)
    assert reference["unit"].parameters["theta"].item() == 1


def test_half_precision_difference_is_taken_in_float32(linear_loss):
    probe = linear_loss([1.0], [(1.0,)])
    probe.model.bfloat16()
    probe.units[0].parameters["theta"].data = torch.tensor([1.0], dtype=torch.bfloat16)
    probe = replace(probe, reference=UPDATE_NORM.prepare(probe))
    probe.units[0].parameters["theta"].data = torch.tensor([-256.0], dtype=torch.bfloat16)
    assert UPDATE_NORM.score(probe) == [257]


def test_unit_that_was_not_prepared_is_refused(linear_loss):
    with pytest.raises(ValueError, match="start of unit unit"):
        UPDATE_NORM.score(linear_loss([1.0], [(1.0,)]))

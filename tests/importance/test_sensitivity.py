"""Gradient sensitivity against values worked by hand; in each, the gradient of example i is x_i."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from safe_lab.importance import METRICS
from safe_lab.importance.probe import Probe
from safe_lab.units import Unit

SENSITIVITY = METRICS["sensitivity"]


def test_worked_value(linear_loss):
    # Mean gradient (2, -3): mean of |1 * 2| and |2 * -3|.
    probe = linear_loss([1.0, 2.0], [(1.0, -4.0), (3.0, -2.0)])
    assert SENSITIVITY.score(probe) == pytest.approx([(2 + 6) / 2])


def test_worked_value_of_smoothing(linear_loss):
    # One weight, 2; two batches with gradients 1 and -3: I = 2, then 6.
    probe = linear_loss([2.0], [(1.0,)])
    probe = replace(probe, batches=[*probe.batches, {"x": torch.tensor([[-3.0]])}])
    first = 0.25 * 2
    uncertainty = 0.5 * abs(2 - first)
    second = 0.75 * first + 0.25 * 6
    uncertainty = 0.5 * uncertainty + 0.5 * abs(6 - second)
    assert SENSITIVITY.score(probe, smoothing=True, beta1=0.75, beta2=0.5) == pytest.approx([second * uncertainty])
    assert probe.memory["importance/theta"].item() == pytest.approx(second)
    assert probe.memory["uncertainty/theta"].item() == pytest.approx(uncertainty)


def test_averages_go_on_from_scoring_to_scoring(linear_loss):
    both = linear_loss([2.0], [(1.0,)])
    both = replace(both, batches=[*both.batches, {"x": torch.tensor([[-3.0]])}])
    together = SENSITIVITY.score(both, smoothing=True)

    memory = {}
    for batch in both.batches:
        apart = SENSITIVITY.score(replace(both, batches=[batch], memory=memory), smoothing=True)
        memory = copy.deepcopy(memory)
    assert apart == pytest.approx(together)


def test_weight_shared_by_two_units_is_averaged_once_a_batch(linear_loss):
    probe = linear_loss([2.0], [(1.0,)])
    alone = SENSITIVITY.score(probe, smoothing=True)
    shared = replace(probe, units=[*probe.units, Unit("other", 1, {"alias": probe.model.theta})], memory={})
    assert SENSITIVITY.score(shared, smoothing=True) == alone * 2


def test_smoothing_refuses_two_weights_of_one_name():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    units = [Unit(str(i), i, {"weight": layer.weight}) for i, layer in enumerate(model)]
    probe = Probe(model, units, [{"x": torch.ones(1, 1)}], lambda model, batch: model(batch["x"]).mean())
    with pytest.raises(ValueError, match="name weight"):
        SENSITIVITY.score(probe, smoothing=True)

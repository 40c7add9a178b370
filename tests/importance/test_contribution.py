"""Task contribution against a value worked by hand."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from safe_lab.importance import METRICS
from safe_lab.importance.probe import Probe
from safe_lab.units import Unit

CONTRIBUTION = METRICS["contribution"]


@pytest.fixture
def probe():
    """Loss mean_i |x_i - (a + b)|, of which either term can be switched off."""
    model = nn.Module()
    model.terms = {"a": 2.0, "b": -1.0}

    def switch_off(name):
        @contextmanager
        def off():
            before, model.terms[name] = model.terms[name], 0.0
            yield
            model.terms[name] = before

        return off

    units = [Unit(name, i, {}, switch_off=switch_off(name)) for i, name in enumerate(model.terms)]
    batches = [{"x": torch.tensor([2.0, 2.0, 2.0])}, {"x": torch.tensor([6.0])}]
    return Probe(model, units, batches, lambda model, batch: (batch["x"] - sum(model.terms.values())).abs().mean())


def test_worked_value(probe):
    # Loss with both (3 * 1 + 5) / 4 = 2, without a (3 * 3 + 7) / 4 = 4, without b (3 * 0 + 4) / 4 = 1.
    assert CONTRIBUTION.score(probe) == pytest.approx([2, -1])


def test_unit_that_cannot_be_switched_off_is_refused(probe):
    units = [replace(probe.units[0], switch_off=None)]
    with pytest.raises(ValueError, match="unit a cannot be switched off"):
        CONTRIBUTION.score(replace(probe, units=units))

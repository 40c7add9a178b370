"""Relative gradient norm against values worked by hand."""

from __future__ import annotations

import math

import pytest

from safe_lab.importance import METRICS
from safe_lab.importance.gradient_ratio import EPSILON

GRADIENT_RATIO = METRICS["gradient_ratio"]


def test_worked_value(linear_loss):
    # Mean gradient (5, 12), of norm 13, over weights (3, 4), of norm 5.
    probe = linear_loss([3.0, 4.0], [(4.0, 10.0), (6.0, 14.0)])
    assert GRADIENT_RATIO.score(probe) == pytest.approx([13 / 5])


def test_unit_of_zeros_has_a_finite_score(linear_loss):
    (score,) = GRADIENT_RATIO.score(linear_loss([0.0], [(2.0,)]))
    assert score == pytest.approx(2 / EPSILON)
    assert math.isfinite(score)

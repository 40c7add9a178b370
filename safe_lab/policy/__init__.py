"""Which units freeze now: pure functions of scores, level and what is frozen already.

A policy sees the whole model as lists by unit, in the order of execution from the input, and returns the units that freeze at
this scoring. Freezing is for good: what is frozen already is never returned, and never comes back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from safe_lab.policy.budget import importance_shares, select_budget
from safe_lab.policy.state import PredictedSavings, State, frozen_depth

__all__ = [
    "POLICIES",
    "Policy",
    "PredictedSavings",
    "State",
    "frozen_depth",
    "importance_shares",
    "normalize",
    "select_budget",
]


@dataclass(frozen=True)
class Policy:
    """One row of :data:`POLICIES`.

    Attributes:
        select: The decision: units that freeze now, in ascending order.
        summary: One line for ``--help``.
        level: What the schedule rises to: the threshold ``final_threshold``, the share of the units ``final_share``, the share
            of their importance ``final_importance``, or nothing.
    """

    select: Callable[[State], list[int]]
    summary: str
    level: Literal["threshold", "share", "importance", "none"]

    @property
    def uses_scores(self) -> bool:
        """Whether units have to be scored for this policy."""
        return self.level in ("threshold", "importance")


def select_none(state: State) -> list[int]:
    """No unit, ever: plain adapter tuning."""
    return []


def select_safe(state: State) -> list[int]:
    """Units whose importance lies under the threshold, ``Imp(A_i) < tau_t``.

    Source: SAFE, NAACL 2025, section on freezing.

    >>> select_safe(State(scores=[0.1, 0.3, 0.05], level=0.2, frozen=[2], num_units=3, warm=True, seed=0))
    [0]
    """
    if not state.warm:
        return []
    return [unit for unit, score in enumerate(state.scores) if unit not in state.frozen and score < state.level]


def select_prefix(state: State) -> list[int]:
    """The first ``floor(level * num_units)`` units from the input, by schedule alone.

    >>> select_prefix(State(scores=[], level=0.5, frozen=[0], num_units=6, warm=True, seed=0))
    [1, 2]
    """
    return [unit for unit in range(_count(state)) if unit not in state.frozen]


def select_random(state: State) -> list[int]:
    """As many units as ``prefix`` freezes, in an order drawn from the seed: the control for any order of freezing."""

    def draw(unit: int) -> bytes:
        return hashlib.sha256(f"{state.seed}/{unit}".encode()).digest()

    order = sorted(range(state.num_units), key=draw)
    return sorted(unit for unit in order[: _count(state)] if unit not in state.frozen)


def select_all(state: State) -> list[int]:
    """Every unit at the end of warm-up: the head trains on alone. The lower bound of cost."""
    return [unit for unit in range(state.num_units) if unit not in state.frozen] if state.warm else []


def _count(state: State) -> int:
    # A share such as 0.3 of 10 units must give 3, though 0.3 * 10 may round to 2.999...
    return int(state.level * state.num_units + 1e-9)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "none": Policy(select_none, "nothing freezes", level="none"),
        "safe": Policy(select_safe, "units of importance under the threshold (the paper's)", level="threshold"),
        "budget": Policy(
            select_budget,
            "what saves most while the share of importance frozen stays within a growing budget",
            level="importance",
        ),
        "prefix": Policy(
            select_prefix, "a growing share of the units from the input, by schedule alone", level="share"
        ),
        "random": Policy(select_random, "a growing share of the units in random order", level="share"),
        "all": Policy(select_all, "every unit at the end of warm-up", level="none"),
    }
)


def normalize(scores: Sequence[float], how: str) -> list[float]:
    """Scores on the scale that the threshold is compared with.

    ``none``: as they are (the paper's). ``max``: divided by the largest magnitude, so that the largest is 1. ``rank``: the
    mid-rank quantile (rank - 1/2) / num_units, so that a threshold of 0.5 parts the units in halves; ties share their lowest.

    Args:
        scores: Raw scores by unit.
        how: ``none``, ``max`` or ``rank``.

    Raises:
        ValueError: Another ``how``.

    >>> normalize([0.2, 0.1, 0.4], "rank")
    [0.5, 0.16666666666666666, 0.8333333333333334]
    >>> normalize([0.2, 0.1, 0.4], "max")
    [0.5, 0.25, 1.0]
    """
    if how == "max":
        largest = max((abs(score) for score in scores), default=0.0)
        return [score / largest if largest > 0 else 0.0 for score in scores]
    if how == "rank":
        ordered = sorted(scores)
        return [(ordered.index(score) + 0.5) / len(scores) for score in scores]
    if how == "none":
        return list(scores)
    raise ValueError(f"normalize: {how!r} is none of none, max, rank")

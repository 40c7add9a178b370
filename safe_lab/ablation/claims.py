"""Figures that someone has claimed, such as a paper's, held against what came out."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from safe_lab.ablation.rules import Claim
from safe_lab.figures import differs_by_factor, direction_of, is_cost

if TYPE_CHECKING:
    from safe_lab.ablation.comparison import Difference


class Outcome(StrEnum):
    """What came of a claim."""

    REACHED = "reached"
    HELD = "the interval holds it"
    MISSED = "missed"
    UNKNOWN = "not enough seeds to say"
    NO_SHARES = "not always positive, and so no shares to compare"
    NO_RUNS = "no runs to compare"


def judge(claim: Claim, found: Difference | None) -> Outcome:
    """Whether a difference is as good as claimed: all of its interval, some of it, or nothing.

    Args:
        claim: Of a figure that is better or worse, the more there is.
        found: The difference of the same variant and figure.
    """
    if found is None:
        return Outcome.NO_RUNS
    if found.is_relative != differs_by_factor(claim.figure):
        return Outcome.NO_SHARES
    # Costs may be alike to the last digit; of a metric that tells no spread.
    if found.low is None or found.high is None or (found.method == "all alike" and not is_cost(claim.figure)):
        return Outcome.UNKNOWN
    sign = direction_of(claim.figure)
    worst, best = sorted((sign * found.low, sign * found.high))
    if worst >= sign * claim.difference:
        return Outcome.REACHED
    return Outcome.HELD if best >= sign * claim.difference else Outcome.MISSED

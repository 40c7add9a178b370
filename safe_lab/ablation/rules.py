"""How variants are compared, and what is claimed of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safe_lab.figures import differs_by_factor, direction_of
from safe_lab.section import ConfigError
from safe_lab.statistics import Test


@dataclass(frozen=True)
class Claim:
    """A difference that someone has reported.

    Attributes:
        variant: What it is held against.
        figure: Of what.
        difference: To the baseline; of costs and curvatures as a share: -0.25 is a quarter less.
        source: Who says so, and where.
    """

    variant: str
    figure: str
    difference: float
    source: str


@dataclass(frozen=True)
class Rules:
    """How it is compared.

    Attributes:
        metric: The figure that says how good a run is.
        figures: The others.
        margin: By how much of the metric a variant may be worse and still be called no worse; None: it is not asked.
        confidence: Of intervals.
        test: That p is of.
        claims: What someone has claimed of differences to the baseline.
    """

    metric: str
    figures: tuple[str, ...]
    margin: float | None = None
    confidence: float = 0.95
    test: Test = "permutation"
    claims: tuple[Claim, ...] = ()


def check_rules(rules: Rules) -> None:
    """Whether runs can be compared so.

    Raises:
        ConfigError: Of the metric neither more nor less is better, or the margin is none.
    """
    if direction_of(rules.metric) == 0:
        raise ConfigError(f"metric: {rules.metric} is neither good nor bad by itself")
    if rules.margin is None:
        return
    if not 0 < rules.margin < math.inf:
        raise ConfigError(f"margin: it must be above 0, got {rules.margin:g}")
    if differs_by_factor(rules.metric) and rules.margin >= 1:
        raise ConfigError(
            f"margin: of {rules.metric} it is a share, such as 0.05 for five percent, and {rules.margin:g} is none"
        )

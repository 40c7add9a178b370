"""How variants are compared, and what is claimed of them."""

from __future__ import annotations

from dataclasses import dataclass

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

"""What a policy decides on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PredictedSavings:
    """What freezing saves by prediction, for L units: FLOPs of a step, or bytes at its peak.

    Attributes:
        by_depth: Saving of a frozen run of d units from the input, for d = 0 .. L; 0 for d = 0, and rising with d.
        elsewhere: Saving of each unit while it is frozen outside that run.

    Raises:
        ValueError: The lengths do not fit.

    >>> PredictedSavings(by_depth=[0, 20, 40, 60], elsewhere=[1, 1, 1]).of({0, 2})
    21
    """

    by_depth: Sequence[float]
    elsewhere: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.by_depth) != len(self.elsewhere) + 1:
            raise ValueError(
                f"savings by depth are {len(self.by_depth)} values, for 0 to all of {len(self.elsewhere)} units: one more "
                "than there are units is wanted"
            )

    def of(self, frozen: Collection[int]) -> float:
        """Saving of a frozen set."""
        depth = frozen_depth(frozen, len(self.elsewhere))
        return self.by_depth[depth] + sum(self.elsewhere[unit] for unit in frozen if unit > depth)


@dataclass(frozen=True)
class State:
    """What a policy decides on, at one scoring.

    Attributes:
        scores: Importance by unit, as normalised; empty for a policy that needs none.
        level: What the schedule gives now: a threshold on the scores, or a share in [0, 1] of the units or their importance.
        frozen: Units frozen already.
        num_units: Number of units.
        warm: Whether warm-up is over.
        seed: Seed of the run, for policies that draw.
        savings: What freezing saves, for policies that weigh it; None: nobody has predicted it.
        final_level: What the level rises to, for policies that look ahead; None: it rises no more.
    """

    scores: Sequence[float]
    level: float
    frozen: Collection[int]
    num_units: int
    warm: bool
    seed: int
    savings: PredictedSavings | None = None
    final_level: float | None = None


def frozen_depth(frozen: Collection[int], num_units: int) -> int:
    """Length of the frozen run of units from the input: what frees activations.

    >>> frozen_depth({0, 1, 3}, 6)
    2
    """
    depth = 0
    while depth < num_units and depth in frozen:
        depth += 1
    return depth

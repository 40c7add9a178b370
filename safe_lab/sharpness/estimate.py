"""What estimators give: a value, and by how much it may be off.

Legend: D rows of a matrix, m estimates, R readings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Estimates of the diagonal, a column each (D, m) -> readings (R, m), of which the first is the trace.
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A value, and by how much it may be off: one standard error."""

    value: float
    standard_error: float


def estimates(mean_R: Tensor, error_R: Tensor) -> list[Estimate]:
    """One for each reading."""
    return [Estimate(float(mean), float(error)) for mean, error in zip(mean_R, error_R, strict=True)]

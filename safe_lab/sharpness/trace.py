"""The trace of a symmetric matrix that is known by its products, with the error of the estimate.

Both estimators give, with each random vector, an unbiased estimate of every entry of the diagonal; what is read off these (the
trace, the share of each group of weights, a weighted trace) comes from the same products and has an error of its own.

Legend: D rows of the matrix, m random vectors, R readings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.estimate import Estimate, Read, estimates
from safe_lab.sharpness.surface import Products
from safe_lab.sharpness.xtrace import xtrace


@dataclass(frozen=True)
class TraceEstimate:
    """What :func:`estimate_trace` came to.

    Attributes:
        readings: One for each row that was read; the first is the trace.
        num_products: What it took.
        converged: Whether the tolerance was reached, and not the end of the budget or of the vectors.
    """

    readings: list[Estimate]
    num_products: int
    converged: bool


def hutchinson(
    products: Products, like_D: Tensor, read: Read, generator: torch.Generator, *, first: int = 8, then: int = 8
) -> Iterator[tuple[list[Estimate], int]]:
    r"""Hutchinson's estimator with Rademacher vectors: :math:`\mathrm{tr}(A) = E[z^\top A z]`, :math:`A_{ii} = E[z_i (A z)_i]`.

    Its variance is :math:`2 \sum_{i \ne j} A_{ij}^2 / m`. Needs the memory of the vectors in work only.

    Source: Hutchinson (Communications in Statistics 1990); for the diagonal Bekas, Kokiopoulou and Saad (2007).

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        read: What to read.
        generator: Of the random vectors, on the CPU.
        first: Vectors to begin with.
        then: Vectors to add each time.

    Yields:
        Each reading's estimate, and the products so far; then the same with more vectors.
    """
    samples: list[Tensor] = []
    number = 0
    while True:
        more = then if number else first
        signs = torch.randint(0, 2, (len(like_D), more), generator=generator, dtype=torch.int8) * 2 - 1
        z_DK = signs.to(like_D)
        samples.append(read(z_DK * products(z_DK)))
        number += more
        samples_Rm = torch.cat(samples, 1)
        yield estimates(samples_Rm.mean(1), samples_Rm.std(1) / number**0.5), number


ESTIMATORS: Mapping[str, Callable[..., Iterator[tuple[list[Estimate], int]]]] = MappingProxyType(
    {"xtrace": xtrace, "hutchinson": hutchinson}
)


def estimate_trace(
    readings: Iterator[tuple[list[Estimate], int]], *, tolerance: float, budget: Budget
) -> TraceEstimate:
    """Take more random vectors until the trace's standard error is within ``tolerance`` of it, or the budget is spent.

    Args:
        readings: Of an estimator: one of :data:`ESTIMATORS`, or :func:`~safe_lab.sharpness.xtrace.deflated`.
        tolerance: Relative standard error of the trace at which it ends.
        budget: Ends it before.
    """
    found, was_within = None, False
    for estimates_R, num_products in readings:
        is_within = estimates_R[0].standard_error <= tolerance * abs(estimates_R[0].value)
        # Twice in a row: to end when the error first looks small would favour samples in which it looks too small.
        converged = is_within and (was_within or estimates_R[0].standard_error == 0)
        found = TraceEstimate(estimates_R, num_products, converged)
        if converged or budget.is_spent():
            return found
        was_within = is_within
    assert found is not None
    # Every dimension has had a vector: it is exact, however near to zero.
    return replace(found, converged=True)

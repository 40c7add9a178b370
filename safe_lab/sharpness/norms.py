"""Sizes of adapters: of their own weights, and of what they do to the weights they adapt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from safe_lab.importance.probe import widened
from safe_lab.units import Unit


@dataclass(frozen=True)
class Norms:
    r"""Sizes of one unit.

    The first depends on how LoRA shares an update out between its factors (B -> cB, A -> A/c); the others are of the update
    :math:`\Delta W` itself and invariant to that.

    Attributes:
        weights: Euclidean norm of the adapter's own weights.
        update: Frobenius norm of all its updates together; None where the method has no such form (IA3).
        spectral: Largest singular value of any of its updates; None likewise.
        stable_rank: :math:`\sum \|\Delta W\|_F^2 / \sum \|\Delta W\|_2^2` over its updates: in how many directions they act; None
            likewise, and where they are zero.
    """

    weights: float
    update: float | None
    spectral: float | None
    stable_rank: float | None


@torch.no_grad()
def unit_norms(units: Sequence[Unit]) -> dict[str, Norms]:
    """Sizes of each unit, by its name."""
    return {unit.name: _norms(unit) for unit in units}


def _norms(unit: Unit) -> Norms:
    weights = sum(float(widened(parameter).square().sum()) for parameter in unit.parameters.values()) ** 0.5
    if unit.delta_weights is None:
        return Norms(weights, None, None, None)
    frobenius, spectral = [], []
    for delta in unit.delta_weights():
        matrix = widened(delta).flatten(1) if delta.ndim > 1 else widened(delta)[None]
        frobenius.append(float(matrix.norm()))
        spectral.append(_largest_singular_value(matrix) if frobenius[-1] > 0 else 0.0)
    update = sum(norm**2 for norm in frobenius) ** 0.5
    largest = sum(norm**2 for norm in spectral)
    return Norms(weights, update, max(spectral, default=0.0), update**2 / largest if largest else None)


def _largest_singular_value(matrix: Tensor) -> float:
    if min(matrix.shape) <= 64:
        return float(torch.linalg.matrix_norm(matrix, 2))
    # Not ones: an update may take nothing from those, and ARPACK no start that the matrix maps to zero.
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    # Updates have low rank, so that a few products do.
    return float(svds(matrix.double().cpu().numpy(), k=1, return_singular_vectors=False, v0=start)[0])

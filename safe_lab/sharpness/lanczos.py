"""Eigenvalues and spectral density of a symmetric matrix that is known by its products: both from the same Krylov spaces.

Legend: D rows of the matrix, V random starts, S steps from each, k eigenvalues.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.estimate import Estimate
from safe_lab.sharpness.surface import Products

# Below this share of the matrix's size a new direction is rounding, and the Krylov space is whole.
_EXHAUSTED = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Eigenpairs:
    r"""Some eigenvalues with their vectors.

    Attributes:
        values: From the largest down (k).
        vectors: Orthonormal columns (D, k).
        residuals: :math:`\|A x - \lambda x\|` of each: an eigenvalue lies no farther from the value than that, and where it is
            parted from the others much nearer.
    """

    values: list[float]
    vectors: Tensor
    residuals: list[float]


@dataclass
class _Chain:
    """One Lanczos iteration: an orthonormal basis in which the matrix is tridiagonal."""

    basis: list[Tensor]
    diagonal: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    exhausted: bool = False

    def extend(self, of_last_D: Tensor) -> None:
        """Take the product of the last basis vector."""
        last = self.basis[-1]
        self.diagonal.append(float(last.double() @ of_last_D.double()))
        rest, basis_DS = of_last_D, torch.stack(self.basis, 1)
        # In full and twice: without, eigenvalues come up again and again as rounding adds up.
        for _ in range(2):
            rest = rest - basis_DS @ (basis_DS.T @ rest)
        norm = float(rest.double().norm())
        self.beside.append(norm)
        size = max(map(abs, (*self.diagonal, *self.beside)))
        if norm <= _EXHAUSTED[last.dtype] * size or len(self.basis) == len(last):
            self.exhausted = True
        else:
            self.basis.append(rest / norm)

    @property
    def tridiagonal(self) -> tuple[list[float], list[float]]:
        """Diagonal (S) and the entries beside it (S - 1)."""
        return self.diagonal, self.beside[: len(self.diagonal) - 1]


class Krylov:
    """Krylov spaces of a symmetric matrix from several random starts."""

    def __init__(self, products: Products, starts_DV: Tensor) -> None:
        """Begin; there is nothing to be read before the first step.

        Args:
            products: Products of the matrix with the columns of (D, K).
            starts_DV: The starts.
        """
        self._products = products
        self._chains = [_Chain([start_D / start_D.norm()]) for start_D in starts_DV.T]

    def extend(self, num_steps: int, budget: Budget) -> bool:
        """Go further from all starts, a block of products a step.

        Args:
            num_steps: Steps to take, unless a space is whole before.
            budget: Ends it before, but for the very first step.

        Returns:
            Whether a step was taken.
        """
        was_extended = False
        for _ in range(num_steps):
            live = [chain for chain in self._chains if not chain.exhausted]
            if not live or (live[0].diagonal and budget.is_spent()):
                break
            of_last_DK = self._products(torch.stack([chain.basis[-1] for chain in live], 1))
            for chain, of_last_D in zip(live, of_last_DK.T, strict=True):
                chain.extend(of_last_D)
            was_extended = True
        return was_extended

    @property
    def num_steps(self) -> int:
        """S, of the longest chain."""
        return max(len(chain.diagonal) for chain in self._chains)

    def nodes(self) -> list[tuple[list[float], list[float]]]:
        r"""Of each start, the nodes and weights of Gauss quadrature for the spectral density.

        .. math:: \frac{1}{D} \mathrm{tr}\, f(A) \approx \frac{1}{V} \sum_v \sum_j w_{vj} f(\lambda_{vj})

        exact in expectation for polynomials f of degree up to 2 S - 1. Source: Ubaru, Chen and Saad (SIAM J. Matrix Anal. Appl.
        2017), algorithm 1.
        """
        found = []
        for chain in self._chains:
            values, vectors = eigh_tridiagonal(*chain.tridiagonal)
            found.append((values.tolist(), (vectors[0] ** 2).tolist()))
        return found

    def has_moment(self, power: int) -> bool:
        """Whether the quadrature is exact for a power: up to 2 S - 1 after S steps, and for all once a space has everything."""
        return all(
            chain.exhausted or 2 * len(nodes) - 1 >= power
            for chain, (nodes, _) in zip(self._chains, self.nodes(), strict=True)
        )

    def moment(self, power: int) -> Estimate:
        r"""Mean of :math:`\lambda^p` over the spectrum, with its error over the starts: for p = 1 the trace over D."""
        of_each = torch.tensor(
            [sum(w * x**power for x, w in zip(*nodes, strict=True)) for nodes in self.nodes()], dtype=torch.float64
        )
        error = float(of_each.std()) / math.sqrt(len(of_each)) if len(of_each) > 1 else math.nan
        return Estimate(float(of_each.mean()), error)

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue as far as the spaces show: the true ones lie no farther in."""
        values = [value for values, _ in self.nodes() for value in values]
        return min(values), max(values)

    def top(self, number: int) -> Eigenpairs:
        """The largest eigenvalues within the spaces together (Rayleigh and Ritz), at no further product.

        Args:
            number: k; fewer come back where the spaces have fewer dimensions.
        """
        basis_DM, of_basis_DM = self.union()
        small = basis_DM.T @ of_basis_DM
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        best = torch.arange(len(values) - 1, max(len(values) - 1 - number, -1), -1, device=values.device)
        vectors_Dk = basis_DM @ rotation[:, best]
        residuals = (of_basis_DM @ rotation[:, best] - vectors_Dk * values[best]).norm(dim=0)
        return Eigenpairs(values[best].tolist(), vectors_Dk.to(self._chains[0].basis[0].dtype), residuals.tolist())

    def union(self) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of all spaces together (D, M), in float64, and the matrix's products with it."""
        bases = [torch.stack(chain.basis[: len(chain.diagonal)], 1).double() for chain in self._chains]
        basis_DM, of_basis_DM = torch.cat(bases, 1), torch.cat([self._of_basis(chain) for chain in self._chains], 1)
        # The chains meet in the large eigenvalues' directions: what is there twice is taken once.
        sizes, directions = torch.linalg.eigh(basis_DM.T @ basis_DM)
        kept = sizes > 1e-6 * sizes[-1]
        inner = directions[:, kept] / sizes[kept].sqrt()
        return basis_DM @ inner, of_basis_DM @ inner

    def _of_basis(self, chain: _Chain) -> Tensor:
        """Products of the basis, as the recurrence tells them (D, S)."""
        number = len(chain.diagonal)
        tridiagonal = torch.zeros(len(chain.basis), number, dtype=torch.float64, device=chain.basis[0].device)
        for j in range(number):
            tridiagonal[j, j] = chain.diagonal[j]
            if j + 1 < len(chain.basis):
                tridiagonal[j + 1, j] = chain.beside[j]
            if j + 1 < number:
                tridiagonal[j, j + 1] = chain.beside[j]
        return torch.stack(chain.basis, 1).double() @ tridiagonal


def lanczos(
    products: Products, like_D: Tensor, *, num_starts: int, num_steps: int, generator: torch.Generator, budget: Budget
) -> Krylov:
    """Lanczos iterations from random starts, side by side, so that each step is one product with a block of vectors.

    Source: Lanczos (1950); with full reorthogonalisation.

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        num_starts: V.
        num_steps: S, unless a space is whole before.
        generator: Of the starts, on the CPU.
        budget: Ends it before, after one step at the earliest.
    """
    starts_DV = torch.randn(len(like_D), num_starts, generator=generator, dtype=torch.float64).to(like_D)
    krylov = Krylov(products, starts_DV)
    krylov.extend(num_steps, budget)
    return krylov


class _SpentError(Exception):
    """The budget is spent in the midst of ARPACK's iteration, which knows no other way out."""


def top_eigenpairs(
    products: Products, like_D: Tensor, number: int, *, tolerance: float, start_D: Tensor, budget: Budget
) -> Eigenpairs | None:
    """The largest eigenvalues, by implicitly restarted Lanczos (ARPACK, ``scipy.sparse.linalg.eigsh``).

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        number: k.
        tolerance: Relative, of the values; 0: as exact as the machine's numbers are.
        start_D: Where to begin; the nearer to the eigenvectors' span, the sooner it ends. One that the matrix maps to zero, which
            ARPACK does not take, is left for a random one.
        budget: Ends it before.

    Returns:
        The pairs; None if the budget was spent before they had converged.
    """
    size = len(like_D)

    def multiply(vector_D: np.ndarray) -> np.ndarray:
        if budget.is_spent():
            raise _SpentError
        tensor = torch.from_numpy(np.ascontiguousarray(vector_D, dtype=np.float64)).reshape(-1, 1).to(like_D)
        return products(tensor).squeeze(1).double().cpu().numpy()

    if size <= 2 * number + 1:
        # ARPACK wants more room than that.
        matrix = products(torch.eye(size).to(like_D)).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        order = torch.arange(size - 1, max(size - 1 - number, -1), -1, device=values.device)
        values_k, vectors_Dk = values[order], vectors[:, order]
        residuals = (matrix @ vectors_Dk - vectors_Dk * values_k).norm(dim=0)
        return Eigenpairs(values_k.tolist(), vectors_Dk.to(like_D), residuals.tolist())
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    settings = {"k": number, "which": "LA", "tol": tolerance, "ncv": min(max(2 * number + 1, 20), size)}
    try:
        if not products(start_D[:, None].to(like_D)).any():
            start_D = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            if not products(start_D[:, None].to(like_D)).any():
                # Of a matrix that is not zero this does not happen.
                vectors_Dk = torch.eye(size, number).to(like_D)
                return Eigenpairs([0.0] * number, vectors_Dk, [0.0] * number)
        # ARPACK draws where its space has become invariant: the same for all processes, and each time.
        found, columns = eigsh(operator, v0=start_D.double().cpu().numpy(), **settings, **_seeded())
    except (_SpentError, ArpackNoConvergence):
        return None
    largest_first = np.argsort(-found)
    vectors_Dk = torch.from_numpy(columns[:, largest_first].copy()).to(like_D)
    of_vectors_Dk = products(vectors_Dk).double()
    residuals = (of_vectors_Dk - vectors_Dk.double() * torch.from_numpy(found[largest_first]).to(of_vectors_Dk)).norm(
        dim=0
    )
    return Eigenpairs(found[largest_first].tolist(), vectors_Dk, residuals.tolist())


def _seeded() -> dict[str, Any]:
    # Before SciPy 1.17 eigsh has no such argument, and draws the same numbers each time.
    return {"rng": np.random.default_rng(0)} if "rng" in inspect.signature(eigsh).parameters else {}


def density(
    nodes: Sequence[tuple[Sequence[float], Sequence[float]]], *, num_points: int = 512, width: float = 0.01
) -> tuple[list[float], list[float]]:
    r"""Spectral density on a grid: each node a Gaussian of its weight, averaged over the starts.

    .. math:: \phi(t) = \frac{1}{V} \sum_v \sum_j w_{vj}\, \mathcal{N}(t;\, \lambda_{vj}, \sigma^2)

    Source: Ghorbani, Krishnan and Xiao (ICML 2019), section 2.

    Args:
        nodes: :meth:`Krylov.nodes`.
        num_points: Of the grid, which goes a little beyond the outermost nodes.
        width: :math:`\sigma` as a share of the range of the nodes.

    Returns:
        The grid and the density on it.
    """
    values = np.concatenate([np.asarray(nodes_v) for nodes_v, _ in nodes])
    weights = np.concatenate([np.asarray(weights_v) / len(nodes) for _, weights_v in nodes])
    span = float(values.max() - values.min()) or max(abs(float(values.max())), 1e-12)
    sigma = width * span
    grid = np.linspace(values.min() - 5 * sigma, values.max() + 5 * sigma, num_points)
    bumps = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return grid.tolist(), (bumps @ weights).tolist()

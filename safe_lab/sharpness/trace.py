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
from safe_lab.sharpness.surface import Products

# Estimates of the diagonal, a column each (D, m) -> readings (R, m), of which the first is the trace.
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A value, and by how much it may be off: one standard error."""

    value: float
    standard_error: float


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


def xtrace(
    products: Products, like_D: Tensor, read: Read, generator: torch.Generator, *, first: int = 6, then: int = 4
) -> Iterator[tuple[Tensor, int]]:
    r"""XTrace: as exact as a low-rank approximation where the spectrum decays, and as Hutchinson where it does not.

    For each i the matrix is split by the orthonormal basis :math:`Q_{(i)}` of the other :math:`A \omega_j`:

    .. math:: \mathrm{tr}_i = \mathrm{tr}(Q_{(i)}^\top A Q_{(i)}) + \frac{D - m + 1}{\|u_i\|^2}\, u_i^\top A u_i,
        \quad u_i = (I - Q_{(i)} Q_{(i)}^\top)\, \omega_i

    with :math:`\omega_i` Gaussian. The estimate is the mean of the :math:`\mathrm{tr}_i`, its error that of their mean. All of it
    comes from the 2 m products :math:`A \Omega` and :math:`A Q`; further vectors add to what is there. Exact once m = D.

    Where the spectrum decays fast the samples resemble one another, and their spread understates the error: by some 1.8 on an
    exponential decay with the fewest vectors.

    Source: Epperly, Tropp and Webber, XTrace (SIAM J. Matrix Anal. Appl. 2024), sections 2 and 3, in its normalised form.

    Deviation: read entry by entry, as :math:`\mathrm{diag}(A Q Q^\top) + u \circ A u` has the diagonal of A for its mean.
    Deviation: once the basis has what stands out, further vectors only sample the rest, :math:`u = (I - Q Q^\top) z`, at one
    product each and not two, as in Hutch++ (Meyer et al., SOSA 2021). That is when a direction like those that came last would
    take less off the error than two such samples.

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        read: What to read.
        generator: Of the random vectors, on the CPU.
        first: Vectors to begin with.
        then: Products to add each time.

    Yields:
        The readings for each vector, (R, m) in float64, and the products so far; then the same with more vectors.
    """
    size = len(like_D)
    nothing = like_D.new_empty(size, 0)
    omega, of_omega, basis, of_basis, z, of_z = [nothing] * 6
    number = min(first, size)
    grows, gain = True, 0.0
    while True:
        new = torch.randn(size, number, generator=generator, dtype=torch.float64).to(like_D)
        of_new = products(new)
        if grows:
            basis = _extended(basis, of_new, generator)
            of_basis = torch.cat([of_basis, products(basis[:, -number:])], 1)
            omega, of_omega = torch.cat([omega, new], 1), torch.cat([of_omega, of_new], 1)
        else:
            z, of_z = torch.cat([z, new], 1), torch.cat([of_z, of_new], 1)
        samples = _leave_one_out(omega, of_omega, basis, of_basis, read)
        if z.shape[1]:
            samples = torch.cat([samples, _sample_beside(basis, of_basis, z, of_z, read)], 1)
        yield samples, 2 * omega.shape[1] + z.shape[1]
        if basis.shape[1] == size:
            return
        if grows:
            gain = _energy_taken(basis[:, :-number], basis[:, -number:], of_basis[:, -number:]) / number
        rest = float(samples[0].var()) / 2
        grows = gain * (samples.shape[1] + 2) > rest
        number = min(then // 2, size - basis.shape[1]) if grows else then


def _extended(basis_Dm: Tensor, vectors_DK: Tensor, generator: torch.Generator) -> Tensor:
    """The basis with as many columns more: what the vectors have beside it, and random directions for want of more."""
    rounding = 100 * torch.finfo(basis_Dm.dtype).eps
    for vector_D in vectors_DK.T:
        length = float(vector_D.norm())
        rest_D = _beside(basis_Dm, vector_D)
        while not float(rest_D.norm()) > rounding * length:
            # A matrix of low rank has no more directions to give; the rest would be rounding, and lie in the basis again.
            drawn_D = torch.randn(len(vector_D), generator=generator, dtype=torch.float64).to(vector_D)
            length, rest_D = float(drawn_D.norm()), _beside(basis_Dm, drawn_D)
        rest_D = _beside(basis_Dm, rest_D / rest_D.norm())
        basis_Dm = torch.cat([basis_Dm, (rest_D / rest_D.norm())[:, None]], 1)
    return basis_Dm


def _beside(basis_Dm: Tensor, vector_D: Tensor) -> Tensor:
    return vector_D - basis_Dm @ (basis_Dm.T @ vector_D)


def _energy_taken(basis_Dm: Tensor, new_DK: Tensor, of_new_DK: Tensor) -> float:
    """By how much the new directions lower the squared Frobenius norm of what the basis leaves of the matrix."""
    rest_DK = of_new_DK - basis_Dm @ (basis_Dm.T @ of_new_DK)
    inside_KK = (new_DK.T @ rest_DK).double()
    return float(2 * rest_DK.double().square().sum() - inside_KK.square().sum())


def _leave_one_out(omega_Dm: Tensor, of_omega_Dm: Tensor, basis_Dm: Tensor, of_basis_Dm: Tensor, read: Read) -> Tensor:
    size, number = omega_Dm.shape
    triangle_mm = (basis_Dm.T @ of_omega_Dm).double()
    # Column i: the direction within the basis that only vector i has put there. A matrix of low rank leaves some of the diagonal
    # at zero; any directions then complete the basis, and are the first to go.
    floor = max(torch.finfo(omega_Dm.dtype).eps * float(triangle_mm.abs().max()), 1e-300)
    left_out_mm = torch.linalg.inv(triangle_mm + floor * torch.eye(number).to(triangle_mm)).T
    left_out_mm = (left_out_mm / left_out_mm.norm(dim=0)).to(omega_Dm)
    gone_Dm, of_gone_Dm = basis_Dm @ left_out_mm, of_basis_Dm @ left_out_mm
    along_mm = basis_Dm.T @ omega_Dm
    back_m = (left_out_mm * along_mm).sum(0)
    u_Dm = omega_Dm - basis_Dm @ along_mm + gone_Dm * back_m
    of_u_Dm = of_omega_Dm - of_basis_Dm @ along_mm + of_gone_Dm * back_m
    inside_D1 = (basis_Dm * of_basis_Dm).sum(1, keepdim=True)
    return read(inside_D1) - read(gone_Dm * of_gone_Dm) + _scaled(u_Dm, of_u_Dm, size - number + 1, read)


def _sample_beside(basis_Dm: Tensor, of_basis_Dm: Tensor, z_DK: Tensor, of_z_DK: Tensor, read: Read) -> Tensor:
    size, number = basis_Dm.shape
    along_mK = basis_Dm.T @ z_DK
    u_DK, of_u_DK = z_DK - basis_Dm @ along_mK, of_z_DK - of_basis_Dm @ along_mK
    inside_D1 = (basis_Dm * of_basis_Dm).sum(1, keepdim=True)
    return read(inside_D1) + _scaled(u_DK, of_u_DK, size - number, read)


def _scaled(u_DK: Tensor, of_u_DK: Tensor, num_dimensions: int, read: Read) -> Tensor:
    """Readings of the rest of the diagonal, from vectors in the rest's dimensions brought to their mean length."""
    return num_dimensions / u_DK.double().square().sum(0).clamp_min(1e-300) * read(u_DK * of_u_DK)


def hutchinson(
    products: Products, like_D: Tensor, read: Read, generator: torch.Generator, *, first: int = 8, then: int = 8
) -> Iterator[tuple[Tensor, int]]:
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
        The readings for each vector, (R, m) in float64, and the products so far; then the same with more vectors.
    """
    readings: list[Tensor] = []
    number = 0
    while True:
        more = then if number else first
        signs = torch.randint(0, 2, (len(like_D), more), generator=generator, dtype=torch.int8) * 2 - 1
        z_DK = signs.to(like_D)
        readings.append(read(z_DK * products(z_DK)))
        number += more
        yield torch.cat(readings, 1), number


ESTIMATORS: Mapping[str, Callable[..., Iterator[tuple[Tensor, int]]]] = MappingProxyType(
    {"xtrace": xtrace, "hutchinson": hutchinson}
)


def estimate_trace(
    products: Products,
    like_D: Tensor,
    read: Read,
    *,
    estimator: str,
    tolerance: float,
    generator: torch.Generator,
    budget: Budget,
) -> TraceEstimate:
    """Take more random vectors until the trace's standard error is within ``tolerance`` of it, or the budget is spent.

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        read: What to read; the trace first.
        estimator: Name of one of :data:`ESTIMATORS`.
        tolerance: Relative standard error of the trace at which it ends.
        generator: Of the random vectors, on the CPU.
        budget: Ends it before.
    """
    found, was_within = None, False
    for samples, num_products in ESTIMATORS[estimator](products, like_D, read, generator):
        readings = [_estimate(reading) for reading in samples]
        is_within = readings[0].standard_error <= tolerance * abs(readings[0].value)
        # Twice in a row: to end when the error first looks small would favour samples in which it looks too small.
        converged = is_within and (was_within or readings[0].standard_error == 0)
        found = TraceEstimate(readings, num_products, converged)
        if converged or budget.is_spent():
            return found
        was_within = is_within
    assert found is not None
    # Every dimension has had a vector: it is exact, however near to zero.
    return replace(found, converged=True)


def _estimate(samples_m: Tensor) -> Estimate:
    number = len(samples_m)
    error = float(samples_m.std()) / number**0.5 if number > 1 else 0.0
    return Estimate(float(samples_m.mean()), error)

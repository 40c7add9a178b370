"""XTrace: the trace from a low-rank approximation and what it leaves, with the jackknife's error.

Legend: D rows of the matrix, m random vectors, K further ones, R readings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safe_lab.sharpness.estimate import Estimate, Read, estimates
from safe_lab.sharpness.surface import Products

_REFUSALS = 3


def xtrace(
    products: Products, like_D: Tensor, read: Read, generator: torch.Generator, *, first: int = 6, then: int = 4
) -> Iterator[tuple[list[Estimate], int]]:
    r"""XTrace: as exact as a low-rank approximation where the spectrum decays, and as Hutchinson where it does not.

    For each i the matrix is split by the orthonormal basis :math:`Q_{(i)}` of the other :math:`A \omega_j`:

    .. math:: \mathrm{tr}_i = \mathrm{tr}(Q_{(i)}^\top A Q_{(i)}) + \frac{D - m + 1}{\|u_i\|^2}\, u_i^\top A u_i,
        \quad u_i = (I - Q_{(i)} Q_{(i)}^\top)\, \omega_i

    with :math:`\omega_i` Gaussian. The estimate is the mean of the :math:`\mathrm{tr}_i`. All of it comes from the 2 m products
    :math:`A \Omega` and :math:`A Q`; further vectors add to what is there. Exact once m = D.

    Source: Epperly, Tropp and Webber, XTrace (SIAM J. Matrix Anal. Appl. 2024), sections 2 and 3, in its normalised form.

    Deviation: read entry by entry, as :math:`\mathrm{diag}(A Q Q^\top) + u \circ A u` has the diagonal of A for its mean.
    Deviation: the error is the jackknife's, from the estimates that leave one vector out altogether. The spread of the
    :math:`\mathrm{tr}_i` understates it where the spectrum decays, since they share most of their bases; the jackknife then
    overstates it (Efron and Stein, Annals of Statistics 1981), up to fivefold.
    Deviation: once the basis has what stands out, further vectors only sample the rest, :math:`u = (I - Q Q^\top) z`, at one
    product each and not two, as in Hutch++ (Meyer et al., SOSA 2021). That is when a direction like those that came last would
    take less off the error than two such samples, three times in a row.

    Args:
        products: Products of the matrix with the columns of (D, K).
        like_D: A vector of D entries, for size, dtype and device.
        read: What to read.
        generator: Of the random vectors, on the CPU.
        first: Vectors to begin with.
        then: Products to add each time.

    Yields:
        Each reading's estimate, and the products so far; then the same with more vectors.
    """
    size = len(like_D)
    nothing = like_D.new_empty(size, 0)
    omega, of_omega, basis, of_basis = [nothing] * 4
    tables = _Tables(read)
    # How often in a row a sample seemed worth more than a direction: the variance of a few samples is a bad judge.
    number, refusals = min(first, size), 0

    while refusals < _REFUSALS:
        new = torch.randn(size, number, generator=generator, dtype=torch.float64).to(like_D)
        of_new = products(new)
        basis = _extended(basis, of_new, generator)
        of_basis = torch.cat([of_basis, products(basis[:, -number:])], 1)
        omega, of_omega = torch.cat([omega, new], 1), torch.cat([of_omega, of_new], 1)
        tables.extend(omega, of_omega, basis, of_basis)
        mean_R, error_R, spread = _leave_out(tables, size)
        yield estimates(mean_R, error_R), 2 * omega.shape[1]
        if basis.shape[1] == size:
            return
        gain = _energy_taken(basis[:, :-number], basis[:, -number:], of_basis[:, -number:]) / number
        refusals = 0 if gain * (omega.shape[1] + 2) > spread / 2 else refusals + 1
        number = min(then // 2, size - basis.shape[1])
    first_samples = omega.shape[1]
    del omega, of_omega
    for samples_RK in _sample_beside(products, basis, of_basis, read, generator, then):
        count = samples_RK.shape[1]
        share = count / (first_samples + count)
        of_samples_R = samples_RK.std(1) / count**0.5
        yield (
            estimates(
                (1 - share) * mean_R + share * samples_RK.mean(1),
                ((1 - share) ** 2 * error_R.square() + share**2 * of_samples_R.square()).sqrt(),
            ),
            2 * first_samples + count,
        )


def deflated(
    products: Products,
    basis_DM: Tensor,
    of_basis_DM: Tensor,
    read: Read,
    generator: torch.Generator,
    *,
    first: int = 8,
    then: int = 4,
) -> Iterator[tuple[list[Estimate], int]]:
    r"""The trace with the help of a basis whose products are known already, as Lanczos leaves one.

    .. math:: \mathrm{tr}(A) = \mathrm{tr}(Q^\top A Q) + E\Bigl[\frac{D - M}{\|u\|^2}\, u^\top A u\Bigr],
        \quad u = (I - Q Q^\top)\, z

    with z Gaussian: one product a sample, and no variance from what the basis has.

    Source: Gambhir, Stathopoulos and Orginos (SIAM J. Sci. Comput. 2017); Hutch++ (Meyer et al., SOSA 2021). Deviation: read
    entry by entry, and u brought to its mean length, as in :func:`xtrace`.

    Args:
        products: Products of the matrix with the columns of (D, K).
        basis_DM: Orthonormal columns Q, independent of what the generator draws.
        of_basis_DM: A Q.
        read: What to read.
        generator: Of the random vectors, on the CPU.
        first: Fewest products to begin with.
        then: Products to add each time.

    Yields:
        Each reading's estimate, and the products so far; then the same with more vectors.
    """
    if basis_DM.shape[1] == len(basis_DM):
        exact_R = _small(read((basis_DM * of_basis_DM).sum(1, keepdim=True)))[:, 0]
        yield estimates(exact_R, torch.zeros_like(exact_R)), 0
        return
    for samples_RK in _sample_beside(products, basis_DM, of_basis_DM, read, generator, then):
        count = samples_RK.shape[1]
        # The error of fewer is itself so uncertain that to stop by it would favour samples in which it is too small.
        if count >= first:
            yield estimates(samples_RK.mean(1), samples_RK.std(1) / count**0.5), count


def _sample_beside(
    products: Products, basis_DM: Tensor, of_basis_DM: Tensor, read: Read, generator: torch.Generator, number: int
) -> Iterator[Tensor]:
    """Readings from vectors beside a basis (R, K): those of the basis and an unbiased sample of the rest; more each time."""
    size, num_columns = basis_DM.shape
    inside_R1 = _small(read((basis_DM * of_basis_DM).sum(1, keepdim=True)))
    samples_RK = inside_R1.new_empty(len(inside_R1), 0)
    while True:
        z_DK = torch.randn(size, number, generator=generator, dtype=torch.float64).to(basis_DM)
        along_MK = basis_DM.T @ z_DK
        rest_DK, of_rest_DK = z_DK - basis_DM @ along_MK, products(z_DK).to(z_DK) - of_basis_DM @ along_MK
        scale_K = (size - num_columns) / rest_DK.square().sum(0, dtype=torch.float64)
        samples_RK = torch.cat([samples_RK, inside_R1 + _small(scale_K * read(rest_DK * of_rest_DK))], 1)
        yield samples_RK


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


class _Tables:
    """Readings of column i of one matrix times column j of another (R, m, m), and inner products; float64, on the CPU.

    What a sample is from a smaller basis is read from these, at no cost that grows with D.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.inside_Rmm = self.omega_inside_Rmm = self.inside_omega_Rmm = self.omega_Rm = torch.empty(0)
        self.along_mm = self.triangle_mm = self.squares_m = torch.empty(0)
        self.rounding = 0.0

    def extend(self, omega_Dm: Tensor, of_omega_Dm: Tensor, basis_Dm: Tensor, of_basis_Dm: Tensor) -> None:
        """Read what columns that have come at the end bring."""
        self.inside_Rmm = self._extended(self.inside_Rmm, basis_Dm, of_basis_Dm)
        self.omega_inside_Rmm = self._extended(self.omega_inside_Rmm, omega_Dm, of_basis_Dm)
        self.inside_omega_Rmm = self._extended(self.inside_omega_Rmm, basis_Dm, of_omega_Dm)
        self.omega_Rm = _small(self._read(omega_Dm * of_omega_Dm))
        self.along_mm, self.triangle_mm = _small(basis_Dm.T @ omega_Dm), _small(basis_Dm.T @ of_omega_Dm)
        self.squares_m = _small(omega_Dm.square().sum(0, dtype=torch.float64))
        self.rounding = torch.finfo(omega_Dm.dtype).eps

    def _extended(self, table_Rmm: Tensor, left_Dm: Tensor, right_Dm: Tensor) -> Tensor:
        old = table_Rmm.shape[-1]
        below_Rnm = self._each_with_each(left_Dm[:, old:], right_Dm)
        if not old:
            return below_Rnm
        beside_Ron = self._each_with_each(left_Dm[:, :old], right_Dm[:, old:])
        return torch.cat([torch.cat([table_Rmm, beside_Ron], 2), below_Rnm], 1)

    def _each_with_each(self, left_Dm: Tensor, right_Dn: Tensor) -> Tensor:
        # A few at a time, as the vectors themselves are all the memory that should be needed.
        at_once = max(1, 16 // right_Dn.shape[1])
        blocks = []
        for block_Dk in torch.split(left_Dm, at_once, 1):
            products_DK = (block_Dk[:, :, None] * right_Dn[:, None, :]).flatten(1)
            blocks.append(_small(self._read(products_DK)).view(-1, block_Dk.shape[1], right_Dn.shape[1]))
        return torch.cat(blocks, 1)

    def of_whole_basis(self) -> Tensor:
        r"""Readings (R, 1) of the diagonal of :math:`A Q Q^\top`."""
        return self.inside_Rmm.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


def _small(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)


def _leave_out(tables: _Tables, size: int) -> tuple[Tensor, Tensor, float]:
    """Mean of the samples that leave one vector out, the jackknife's error of that (R each), and the samples' variance."""
    number = len(tables.squares_m)
    if number == size:
        # The basis holds everything; what is beside it would be rounding.
        return tables.of_whole_basis()[:, 0], torch.zeros(len(tables.omega_Rm)).double(), 0.0
    # Row i: the direction within the basis that only vector i has put there. A matrix of low rank leaves some of the diagonal
    # at zero; any directions then complete the basis, and are the first to go.
    floor = max(tables.rounding * float(tables.triangle_mm.abs().max()), 1e-300)
    alone_mm = torch.linalg.inv(tables.triangle_mm + floor * torch.eye(number).to(tables.triangle_mm))
    alone_mm = alone_mm / alone_mm.norm(dim=1, keepdim=True)
    along_mm = tables.along_mm.T
    # Inner products, and readings in place of them: of what every sample below is put together from.
    inside_Rmm = (tables.inside_Rmm + tables.inside_Rmm.mT) / 2
    across_Rmm = tables.omega_inside_Rmm + tables.inside_omega_Rmm.mT
    alone_alone_mm, along_alone_mm = alone_mm @ alone_mm.T, along_mm @ alone_mm.T
    own_m1 = along_alone_mm.diagonal()[:, None]
    alone_alone_Rmm = alone_mm @ inside_Rmm @ alone_mm.T
    along_alone_Rmm = along_mm @ inside_Rmm @ alone_mm.T
    across_alone_Rmm = across_Rmm @ alone_mm.T

    def sample(x_mm: Tensor, y_mm: Tensor, gone_Rmm: Tensor, num_left_out: int) -> Tensor:
        r"""Readings from :math:`u = \omega_i - Q (k_i + x_{ij} a_i + y_{ij} a_j)`, k along the basis, a alone in it."""
        kept_mm = along_mm.square().sum(1)[:, None] + x_mm**2 + y_mm**2
        kept_mm = kept_mm + 2 * (x_mm * own_m1 + y_mm * along_alone_mm + x_mm * y_mm * alone_alone_mm)
        quadratic_Rmm = (
            ((along_mm @ inside_Rmm) * along_mm).sum(-1)[..., None]
            + x_mm**2 * _diagonal(alone_alone_Rmm)
            + y_mm**2 * _diagonal(alone_alone_Rmm).mT
            + 2 * (x_mm * _diagonal(along_alone_Rmm) + y_mm * along_alone_Rmm + x_mm * y_mm * alone_alone_Rmm)
        )
        linear_Rmm = (
            (across_Rmm * along_mm).sum(-1)[..., None] + x_mm * _diagonal(across_alone_Rmm) + y_mm * across_alone_Rmm
        )
        length_mm = (tables.squares_m[:, None] - kept_mm).clamp_min(1e-300)
        rest_Rmm = (tables.omega_Rm[..., None] - linear_Rmm + quadratic_Rmm) / length_mm
        found: Tensor = tables.of_whole_basis()[..., None] - gone_Rmm + (size - number + num_left_out) * rest_Rmm
        return found

    gone_Rm1 = _diagonal(alone_alone_Rmm)
    samples_Rm = sample(-own_m1, torch.zeros(1, 1).to(own_m1), gone_Rm1, 1)[..., 0]
    mean_R, spread = samples_Rm.mean(1), float(samples_Rm[0].var()) if number > 1 else 0.0
    if number < 3:
        return mean_R, samples_Rm.std(1) if number > 1 else torch.zeros_like(mean_R), spread
    # Each sample i again, from a basis without what another vector j has put there beside i.
    apart_mm = 1 - alone_alone_mm**2
    is_apart_mm = apart_mm > 1e-8
    y_mm = torch.where(is_apart_mm, (own_m1 * alone_alone_mm - along_alone_mm) / apart_mm, 0)
    x_mm = -own_m1 - y_mm * alone_alone_mm
    beside_Rmm = gone_Rm1.mT - 2 * alone_alone_mm * alone_alone_Rmm + alone_alone_mm**2 * gone_Rm1
    beside_Rmm = torch.where(is_apart_mm, beside_Rmm / apart_mm, 0)
    both_Rmm = sample(x_mm, y_mm, gone_Rm1 + beside_Rmm, 2)
    without_Rm = both_Rmm.masked_fill(torch.eye(number, dtype=torch.bool), 0).sum(1) / (number - 1)
    deviations_Rm = without_Rm - without_Rm.mean(1, keepdim=True)
    return mean_R, ((number - 1) / number * deviations_Rm.square().sum(1)).sqrt(), spread


def _diagonal(matrices_Rmm: Tensor) -> Tensor:
    """(R, m, 1)."""
    return matrices_Rmm.diagonal(dim1=1, dim2=2)[..., None]

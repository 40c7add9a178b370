"""HSIC with linear kernels, the covariance that CKA normalises, in one pass over the rows.

Shapes: N rows (tokens or examples), D and E features of X and Y. Only D x E sums are held: no N x N Gram matrix, and no
matrix of all rows, however many go by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_lab.processes import Processes


class Moments:
    r"""One-pass sums over the rows of a pair X (N x D), Y (N x E), and its HSIC with linear kernels.

    With :math:`S = X^\top Y`, :math:`s_x = \sum_i x_i`, :math:`a_i = |x_i|^2` (and :math:`s_y`, :math:`b_i` for Y).
    HSIC does not change when a fixed vector is taken from all rows of X, and another from all of Y: both are shifted
    by the mean of their first rows, against cancellation. float64 throughout.
    """

    num_rows = 0

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Take in some rows, in any floating dtype; those of one call belong together pair by pair."""
        if len(x_ND) == 0:
            return
        x, y = _as_float64(x_ND), _as_float64(y_NE)
        if self.num_rows == 0:
            self._resolution = max(torch.finfo(x_ND.dtype).eps, 16 * torch.finfo(torch.float64).eps)
            self._begin(x.mean(0), y.mean(0))
        x, y = x - self._shift_x, y - self._shift_y
        a_N, b_N = x.square().sum(1), y.square().sum(1)
        self._S_DE.addmm_(x.T, y)
        self._sum_x += x.sum(0)
        self._sum_y += y.sum(0)
        self._sum_xb += b_N @ x
        self._sum_ay += a_N @ y
        self._sum_a += a_N.sum()
        self._sum_b += b_N.sum()
        self._sum_ab += a_N @ b_N
        self.num_rows += len(x)

    def sum_over(self, processes: Processes) -> None:
        r"""Take in the rows of all processes; each has their sums afterwards.

        Each has shifted its rows by a mean of its own. With :math:`d` and :math:`e` from the common shifts, means of those,
        to its own, its sums become those of :math:`x_i + d` and :math:`y_i + e`, and are added up.

        Args:
            processes: All of them have to call this.
        """
        if processes.count == 1:
            return
        mine = (self.num_rows, self._resolution, self._S_DE.shape) if self.num_rows else (0, 0.0, None)
        counts, resolutions, shapes = zip(*processes.gather(mine), strict=True)
        num_rows = sum(counts)
        if not num_rows:
            return
        if not self.num_rows:
            shape = next(shape for shape in shapes if shape is not None)
            self._begin(*(torch.zeros(n, dtype=torch.float64, device=processes.device) for n in shape))
        share = self.num_rows / num_rows
        self._shift(processes.sum(share * self._shift_x), processes.sum(share * self._shift_y))
        for name in ("_S_DE", "_sum_x", "_sum_y", "_sum_xb", "_sum_ay", "_sum_a", "_sum_b", "_sum_ab"):
            setattr(self, name, processes.sum(getattr(self, name)))
        self.num_rows, self._resolution = num_rows, max(resolutions)

    def _begin(self, shift_x: Tensor, shift_y: Tensor) -> None:
        """No rows yet."""
        self._shift_x, self._shift_y = shift_x, shift_y
        self._sum_x, self._sum_xb = torch.zeros_like(shift_x), torch.zeros_like(shift_x)
        self._sum_y, self._sum_ay = torch.zeros_like(shift_y), torch.zeros_like(shift_y)
        self._sum_a, self._sum_b, self._sum_ab = (shift_x.new_zeros(()) for _ in range(3))
        self._S_DE = shift_x.new_zeros(len(shift_x), len(shift_y))

    def _shift(self, shift_x: Tensor, shift_y: Tensor) -> None:
        """Shift the rows so far by other vectors."""
        n, d, e = self.num_rows, self._shift_x - shift_x, self._shift_y - shift_y
        s_x, s_y, S_DE, dd, ee = self._sum_x, self._sum_y, self._S_DE, d @ d, e @ e
        sum_a, sum_b = self._sum_a + 2 * d @ s_x + n * dd, self._sum_b + 2 * e @ s_y + n * ee
        self._sum_ab = (
            self._sum_ab
            + 2 * e @ self._sum_ay
            + ee * self._sum_a
            + 2 * d @ self._sum_xb
            + 4 * d @ S_DE @ e
            + 2 * ee * (d @ s_x)
            + dd * sum_b
        )
        self._sum_xb = self._sum_xb + 2 * S_DE @ e + ee * s_x + d * sum_b
        self._sum_ay = self._sum_ay + 2 * S_DE.T @ d + dd * s_y + e * sum_a
        self._S_DE = S_DE + torch.outer(s_x, e) + torch.outer(d, s_y) + n * torch.outer(d, e)
        self._sum_x, self._sum_y, self._sum_a, self._sum_b = s_x + n * d, s_y + n * e, sum_a, sum_b
        self._shift_x, self._shift_y = shift_x, shift_y

    def hsic(self, estimator: str) -> float:
        """HSIC(X, Y) by the estimator of that name, ``biased`` or ``debiased``."""
        return self.debiased_hsic() if estimator == "debiased" else self.biased_hsic()

    def biased_hsic(self) -> float:
        r"""HSIC with centred columns, times :math:`(N-1)^2`, which cancels in CKA.

        .. math:: \|X_c^\top Y_c\|_F^2 = \|S - s_x s_y^\top / N\|_F^2

        Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.
        """
        return torch.addr(self._S_DE, self._sum_x, self._sum_y, alpha=-1 / self.num_rows).square().sum().item()

    def debiased_hsic(self) -> float:
        r"""Unbiased estimator of HSIC, for few rows and many features.

        .. math::
            \mathrm{HSIC}_1 = \frac{1}{N(N-3)} \Bigl[ \mathrm{tr}(\tilde K \tilde L)
                + \frac{1^\top \tilde K 1 \; 1^\top \tilde L 1}{(N-1)(N-2)}
                - \frac{2}{N-2} 1^\top \tilde K \tilde L 1 \Bigr]

        with :math:`\tilde K, \tilde L` the Gram matrices of X and Y, their diagonals set to 0. In feature space

        .. math::
            \mathrm{tr}(\tilde K \tilde L) &= \|S\|_F^2 - \sum_i a_i b_i \\
            1^\top \tilde K 1 &= |s_x|^2 - \sum_i a_i \\
            1^\top \tilde K \tilde L 1 = \sum_i (x_i^\top s_x - a_i)(y_i^\top s_y - b_i)
                &= s_x^\top S s_y - s_x^\top \sum_i b_i x_i - s_y^\top \sum_i a_i y_i + \sum_i a_i b_i

        Source: Song et al., Feature Selection via Dependence Maximization, JMLR 2012; in CKA: Nguyen et al., ICLR 2021.

        Raises:
            ValueError: Fewer than four rows.
        """
        n = self.num_rows
        if n < 4:
            raise ValueError(
                f"hsic: debiased needs at least 4 rows, got {n}: take more probe samples, or set hsic: biased"
            )
        s_x, s_y = self._sum_x, self._sum_y
        trace = self._S_DE.square().sum() - self._sum_ab
        sum_k, sum_l = s_x @ s_x - self._sum_a, s_y @ s_y - self._sum_b
        sum_kl = s_x @ self._S_DE @ s_y - s_x @ self._sum_xb - s_y @ self._sum_ay + self._sum_ab
        return ((trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * sum_kl / (n - 2)) / (n * (n - 3))).item()

    def self_hsic(self, estimator: str) -> float:
        """HSIC(X, X), X having been given as both sides.

        Exactly 0 if all rows are the same up to the rounding of their dtype: the rest would be noise over noise in CKA.
        """
        mean_D = self._sum_x / self.num_rows
        variance_D = self._S_DE.diagonal() / self.num_rows - mean_D.square()
        rounding_D = self._resolution * (self._shift_x + mean_D)
        return 0.0 if bool((variance_D <= rounding_D.square()).all()) else self.hsic(estimator)


def _as_float64(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return x.to(device="cpu" if x.device.type == "mps" else x.device, dtype=torch.float64)

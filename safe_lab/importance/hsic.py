"""HSIC with linear kernels, the covariance that CKA normalises, in one pass over the rows.

Shapes: N rows (tokens or examples), D and E features of X and Y. Only D x E sums are held: no N x N Gram matrix, and no
matrix of all rows, however many go by.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
            self._sum_x, self._sum_y = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self._sum_xb, self._sum_ay = torch.zeros_like(x[0]), torch.zeros_like(y[0])
            self._sum_a, self._sum_b, self._sum_ab = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
            self._S_DE = x.new_zeros(x.shape[1], y.shape[1])
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

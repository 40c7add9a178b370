"""Relative gradient norm: how fast a unit still moves for its size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safe_lab.importance.probe import Probe, probe_gradients, widened

EPSILON = 1e-12


def score(probe: Probe) -> list[float]:
    r"""Norm of the gradient over norm of the weights, all of a unit's weights as one vector.

    .. math:: \mathrm{Imp}(A_i) = \frac{\|\nabla_{\theta_i} L\|_2}{\|\theta_i\|_2 + \epsilon}

    with L the mean loss over the probe. :math:`\epsilon = 10^{-12}` keeps a unit whose weights are all 0 finite, and
    very important.

    Source: the trust ratio of LARS (You et al., Large Batch Training of Convolutional Networks, 2017), upside down.

    Returns:
        One score for each of ``probe.units``.
    """
    return [
        _norm(gradients.values()) / (_norm(unit.parameters.values()) + EPSILON)
        for unit, gradients in zip(probe.units, probe_gradients(probe), strict=True)
    ]


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.cat([widened(tensor.detach()).flatten() for tensor in tensors]).norm())

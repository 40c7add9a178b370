r"""Curvature of a loss by the model's outputs: the part of the Gauss-Newton matrix that does not know the model.

Legend: n examples in a batch, C outputs of the model for an example, c columns of a root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputCurvature:
    r"""The Hessian H of one example's loss by its outputs.

    Attributes:
        product: Outputs (n, C) and directions (n, C) -> :math:`H v` for each example (n, C).
        roots: Outputs (n, C) -> columns of S, with :math:`S S^\top = H` for each example (c, n, C).
    """

    product: Callable[[Tensor, Tensor], Tensor]
    roots: Callable[[Tensor], Tensor]


def cross_entropy_product(outputs_nC: Tensor, directions_nC: Tensor) -> Tensor:
    r"""Product with the Hessian of cross entropy by the logits, :math:`\mathrm{diag}(p) - p p^\top`; (n, C)."""
    probabilities_nC = outputs_nC.softmax(-1)
    return probabilities_nC * (directions_nC - (probabilities_nC * directions_nC).sum(-1, keepdim=True))


def cross_entropy_roots(outputs_nC: Tensor) -> Tensor:
    r"""Columns :math:`\sqrt{p_c}\,(e_c - p)`, one for each class: :math:`S S^\top = \mathrm{diag}(p) - p p^\top`."""
    probabilities_nC = outputs_nC.softmax(-1)
    identity_CC = torch.eye(outputs_nC.shape[-1]).to(outputs_nC)
    centred_CnC = identity_CC[:, None, :] - probabilities_nC
    return probabilities_nC.T[:, :, None].sqrt() * centred_CnC


def squared_error_product(outputs_nC: Tensor, directions_nC: Tensor) -> Tensor:
    """Product with the Hessian of the squared error by the output, which is 2; (n, C)."""
    return 2 * directions_nC


def squared_error_roots(outputs_nC: Tensor) -> Tensor:
    r"""Columns :math:`\sqrt{2}\, e_c`."""
    identity_CC = torch.eye(outputs_nC.shape[-1]).to(outputs_nC)
    return math.sqrt(2) * identity_CC[:, None, :].expand(-1, len(outputs_nC), -1)


# By kind of task.
OUTPUT_CURVATURES: Mapping[str, OutputCurvature] = MappingProxyType(
    {
        "classification": OutputCurvature(cross_entropy_product, cross_entropy_roots),
        "regression": OutputCurvature(squared_error_product, squared_error_roots),
    }
)

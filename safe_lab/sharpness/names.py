"""What can be measured, by name: data without torch, so that a configuration can be checked in an instant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# In the order in which they are taken, should the budget end: what costs little comes first, and last the one whose price
# depends on what it finds.
MEASURES: Mapping[str, str] = MappingProxyType(
    {
        "norms": "sizes of adapters and their updates",
        "effective_weights": "Gauss-Newton trace by the effective weights, invariant to LoRA's rescaling",
        "ball": "largest rise of the loss in a ball (SAM), and in one that stretches with the weights (adaptive SAM)",
        "average": "mean rise of the loss under noise on the weights",
        "spectrum": "density of the Hessian's eigenvalues",
        "eigenvalues": "largest eigenvalues of the Hessian, with their vectors",
        "gauss_newton": "trace of the Gauss-Newton matrix, by unit too",
        "trace": "trace of the Hessian, by unit too",
    }
)
ESTIMATORS: Mapping[str, str] = MappingProxyType(
    {"xtrace": "fewest products", "hutchinson": "the classic; least memory, for adapters of many millions of weights"}
)
LANDSCAPES: Mapping[str, str] = MappingProxyType(
    {
        "random_line": "along a random direction, normalised filter by filter",
        "random_plane": "in the plane of two random directions, normalised filter by filter",
        "eigen_line": "along each of the two first eigenvectors",
        "eigen_plane": "in the plane of the two first eigenvectors",
    }
)

"""Sharpness: the curvature of a loss where training has ended, and its shape around there.

It works on any model whose adapters are units, without configuration, trainer or tracker::

    with twice_differentiable(model):
        surface = Surface(model, batches, loss_function, Space.of_units(find_units(model, forward)))
        figures = measure(surface, Plan(measures=["trace", "eigenvalues"]), budget=Budget(surface.cost)).figures

Figures in the space of the adapters' own weights (trace, eigenvalues, spectrum, SAM, noise) are not invariant to LoRA's rescaling
B -> cB, A -> A/c, which changes them and not the function. The adaptive ones are invariant to that, and ``effective_weights`` to
every way to write the same updates.

Names of what can be measured load at once; the rest brings torch, and loads when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safe_lab.sharpness.names import ESTIMATORS, LANDSCAPES, MEASURES

if TYPE_CHECKING:
    from safe_lab.sharpness.budget import Budget
    from safe_lab.sharpness.differentiable import twice_differentiable
    from safe_lab.sharpness.gauge import Gauge, Sample
    from safe_lab.sharpness.measuring import Measured, Plan, measure, summarize
    from safe_lab.sharpness.output_curvature import OUTPUT_CURVATURES
    from safe_lab.sharpness.space import Space
    from safe_lab.sharpness.surface import Surface

_HOME = {
    "Budget": "budget",
    "Gauge": "gauge",
    "Sample": "gauge",
    "Measured": "measuring",
    "Plan": "measuring",
    "measure": "measuring",
    "summarize": "measuring",
    "Space": "space",
    "OUTPUT_CURVATURES": "output_curvature",
    "Surface": "surface",
    "twice_differentiable": "differentiable",
}

__all__ = [
    "ESTIMATORS",
    "LANDSCAPES",
    "MEASURES",
    "OUTPUT_CURVATURES",
    "Budget",
    "Gauge",
    "Measured",
    "Plan",
    "Sample",
    "Space",
    "Surface",
    "measure",
    "summarize",
    "twice_differentiable",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

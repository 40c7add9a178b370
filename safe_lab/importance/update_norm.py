"""Weight-update norm: how far a unit has come since the start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_lab.importance.probe import Probe, widened
from safe_lab.units import Unit


@dataclass(frozen=True, eq=False)
class Initial:
    """A unit before training.

    Attributes:
        parameters: Copies of its parameters, on the CPU, by name.
        delta_is_zero: All its ``delta_weights`` were 0, as with LoRA's usual start.
    """

    parameters: Mapping[str, Tensor]
    delta_is_zero: bool


@torch.no_grad()
def prepare(probe: Probe) -> dict[str, Initial]:
    """Copy each unit's parameters as they are.

    Returns:
        Unit name -> its start.
    """
    return {
        unit.name: Initial(
            parameters={name: parameter.detach().to("cpu", copy=True) for name, parameter in unit.parameters.items()},
            delta_is_zero=unit.delta_weights is not None and not any(delta.any() for delta in unit.delta_weights()),
        )
        for unit in probe.units
    }


@torch.no_grad()
def score(probe: Probe) -> list[float]:
    r"""Frobenius norm of the update of the weights that the unit adapts.

    .. math:: \mathrm{Imp}(A_i) = \Bigl(\sum_{W} \|\Delta W_t - \Delta W_0\|_F^2\Bigr)^{1/2}

    over the weights W that the unit adapts, for LoRA :math:`\Delta W = \frac{\alpha}{r} B A`. Measured on Delta W, as
    A and B may turn against each other and leave it as it is. A unit without ``delta_weights`` (a bottleneck adapter)
    has its own weights in the place of Delta W.

    Source: distance from initialisation (Nagarajan and Kolter, 2019); of Delta W: LoRA (Hu et al., ICLR 2022),
    section 7.3.

    Args:
        probe: With ``probe.reference`` from :func:`prepare`.

    Returns:
        One score for each of ``probe.units``.

    Raises:
        ValueError: A unit was not prepared.
    """
    return [_update_norm(unit, _initial(probe, unit)) for unit in probe.units]


def _initial(probe: Probe, unit: Unit) -> Initial:
    if not isinstance(probe.reference, Mapping) or unit.name not in probe.reference:
        raise ValueError(
            f"update_norm has no start of unit {unit.name}: Probe.reference must be what Metric.prepare returned"
        )
    initial: Initial = probe.reference[unit.name]
    return initial


def _update_norm(unit: Unit, initial: Initial) -> float:
    updates: Iterable[Tensor]
    if unit.delta_weights is None:
        updates = (widened(p) - widened(initial.parameters[name].to(p.device)) for name, p in unit.parameters.items())
    elif initial.delta_is_zero:
        updates = unit.delta_weights()
    else:
        with _at_start(unit, initial):
            start = [delta.clone() for delta in unit.delta_weights()]
        updates = (
            widened(delta) - widened(delta_0) for delta, delta_0 in zip(unit.delta_weights(), start, strict=True)
        )
    return math.sqrt(sum(widened(update).square().sum().item() for update in updates))


@contextmanager
def _at_start(unit: Unit, initial: Initial) -> Iterator[None]:
    """The unit with its initial parameters; on leaving it has its own again, to the bit."""
    current = {name: parameter.clone() for name, parameter in unit.parameters.items()}
    try:
        for name, parameter in unit.parameters.items():
            parameter.copy_(initial.parameters[name])
        yield
    finally:
        for name, parameter in unit.parameters.items():
            parameter.copy_(current[name])

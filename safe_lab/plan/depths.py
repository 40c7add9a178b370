"""Figures at every frozen depth from a few of them: costs add up layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import nn

from safe_lab.units import Unit

Figures = Mapping[str, int]


def fill_depths(
    num_units: int, period: int | None, measure: Callable[[int], Figures]
) -> tuple[list[Figures], set[int]]:
    r"""Figures at every frozen depth d from 0 to L, of which as few as possible are measured.

    Where layers are alike, the bytes live after any one operator fall linearly with the number of layers frozen below it,
    and once it lies below d itself they fall no further: so their maximum, the peak, is convex in d. FLOPs and counts are
    linear outright. A convex f with

    .. math:: (b - a)\, f(m) = (b - m)\, f(a) + (m - a)\, f(b), \qquad a < m < b

    touches its chord in the inside and is therefore linear from a to b. So an interval is filled in along the chord where
    every figure lies on it at the midpoint, to the unit; else both halves are looked at in the same way. With finer units
    than layers this holds within each of the ``period`` places of a unit in its layer. What freezes first and last is
    measured on its own, as the input lies below the one and the head above the other.

    Args:
        num_units: L.
        period: Units after which the model repeats itself; None: it does not, and every depth is measured.
        measure: Figures at a depth.

    Returns:
        The figures at depths 0 to L, and the depths that were measured.
    """
    measured: dict[int, Figures] = {}
    followed: dict[int, Figures] = {}

    def at(depth: int) -> Figures:
        if depth not in measured:
            measured[depth] = measure(depth)
        return measured[depth]

    def fill(depths: Sequence[int]) -> None:
        half, last = len(depths) // 2, len(depths) - 1
        start, middle, end = at(depths[0]), at(depths[half]), at(depths[last])
        slopes = {key: divmod(end[key] - start[key], max(last, 1)) for key in start}
        if all(not rest and middle[key] == start[key] + half * slope for key, (slope, rest) in slopes.items()):
            for i, depth in enumerate(depths):
                followed[depth] = {key: start[key] + i * slope for key, (slope, _) in slopes.items()}
        elif last > 1:
            fill(depths[: half + 1])
            fill(depths[half:])

    at(0)
    at(num_units)
    inside = range(1, num_units)
    # Without a period each depth is a place of its own.
    stride = period or num_units
    for depths in (inside[place::stride] for place in range(min(stride, len(inside)))):
        fill(depths)
    return [(followed | measured)[depth] for depth in range(num_units + 1)], set(measured)


def find_period(model: nn.Module, units: Sequence[Unit]) -> int | None:
    """Units after which the model repeats itself, the first and last left aside; None if it does not even once.

    Two units are alike if they stand in the same place of layers that hold the same modules with parameters of the same
    shapes.
    """
    signatures = [_signature(model, unit) for unit in units][1:-1]
    return next(
        (
            period
            for period in range(1, len(signatures) // 2 + 1)
            if all(first == second for first, second in zip(signatures, signatures[period:], strict=False))
        ),
        None,
    )


def group_alike(model: nn.Module, units: Sequence[Unit]) -> list[list[int]]:
    """Indices of units that stand in the same place of layers that are alike, in the order of execution."""
    groups: dict[Hashable, list[int]] = {}
    for i, unit in enumerate(units):
        groups.setdefault(_signature(model, unit), []).append(i)
    return list(groups.values())


def _signature(model: nn.Module, unit: Unit) -> tuple[Hashable, ...]:
    # The name of a unit begins with that of its layer, up to the first number: roberta.encoder.layer.0.attention.self.query
    layer, place = re.match(r"(.*?\.\d+(?=\.|$))?(.*)", unit.name).groups()  # type: ignore[union-attr]
    modules = model.get_submodule(f"base_model.model.{layer}").named_modules() if layer else ()
    structure = tuple(
        (name, type(module).__name__, tuple(parameter.shape for parameter in module.parameters(recurse=False)))
        for name, module in modules
    )
    return place, tuple(parameter.shape for parameter in unit.parameters.values()), structure

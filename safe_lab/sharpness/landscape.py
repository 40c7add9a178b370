"""The loss on lines and planes through the weights: around one solution, and between two or three of them.

A direction is a vector of the space, and a position on it a number of such vectors from the origin. One point at a time is
made and its losses taken, so that nothing is kept but numbers.

Legend: D numbers in the vector of weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Surface

Place = TypeVar("Place", bound=Hashable)

# Where the losses are taken if nothing else is asked for. All are exact in binary where it matters: 0 and 1 are among them.
POSITIONS_1D = tuple(i / 20 for i in range(-20, 21))
POSITIONS_2D = tuple(i / 8 for i in range(-8, 9))
LINE_POSITIONS = tuple(i / 20 for i in range(-5, 26))
SIDE_POSITIONS = tuple(i / 20 for i in range(21))

# Weights that are no farther apart than so many roundings of the larger of them are the same ones.
_ROUNDINGS = 8


@dataclass(frozen=True)
class Slice1D:
    """Losses on a straight line through the weights.

    Attributes:
        name: Of the direction, or of the two runs.
        positions: Ascending: 0 is the origin, or the first run; 1 is one direction from it, or the second run.
        losses: By sample, one for each position: NaN where it is not finite, None where the budget ended before.
        length: Euclidean distance in the weights from position 0 to 1.
        complete: Whether there was a loss taken at every position.
        marks: Runs by name: their positions.
        barriers: By sample, the height of the barrier between two runs (:func:`barrier`); None where it has none.
    """

    name: str
    positions: list[float]
    losses: dict[str, list[float | None]]
    length: float
    complete: bool
    marks: dict[str, float] = field(default_factory=dict)
    barriers: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Slice1D:
        """The slice that ``dataclasses.asdict`` made plain."""
        return cls(**tree)


@dataclass(frozen=True)
class Slice2D:
    """Losses on a plane through the weights.

    Attributes:
        name: Of the two directions, or of the three runs.
        x: Positions along the first direction, ascending.
        y: Positions along the second.
        losses: By sample, a row for each y: NaN where it is not finite, None where the budget ended before.
        stride: Every how many columns and rows, counted from the middle ones, the losses are all there: 1 if it is complete,
            None if not even the coarsest grid is.
        marks: Runs by name: their x and y.
        sides: The lines between each two of the runs.
    """

    name: str
    x: list[float]
    y: list[float]
    losses: dict[str, list[list[float | None]]]
    stride: int | None
    marks: dict[str, list[float]] = field(default_factory=dict)
    sides: list[Slice1D] = field(default_factory=list)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Slice2D:
        """The slice that ``dataclasses.asdict`` made plain."""
        return cls(**dict(tree) | {"sides": [Slice1D.from_json(side) for side in tree["sides"]]})

    def whole_grid(self, sample: str) -> tuple[list[float], list[float], list[list[float | None]]]:
        """The finest grid that is there throughout: x, y and a row of losses for each y; empty if there is none."""
        if self.stride is None:
            return [], [], []
        columns, rows = _lattice(len(self.x), self.stride), _lattice(len(self.y), self.stride)
        losses = self.losses[sample]
        return (
            [self.x[i] for i in columns],
            [self.y[j] for j in rows],
            [[losses[j][i] for i in columns] for j in rows],
        )


def filter_normalised(direction_D: Tensor, space: Space) -> Tensor:
    r"""A direction of which each filter is as long as that filter of the weights.

    .. math:: d_{ij} \leftarrow \frac{d_{ij}}{\|d_{ij}\|}\, \|\theta_{ij}\|

    with :math:`\theta_{ij}` filter j of parameter i: all that one index of its first dimension holds, in a matrix a row. A slice
    along it does not change where filters are rescaled in a way that leaves the function as it is, such as B -> cB, A -> A/c in
    LoRA, and its length is that of the weights. A filter of zeros, in the weights or in the direction, stays where it is.

    Source: Li, Xu, Taylor, Studer and Goldstein (NeurIPS 2018), section 4. Deviation: a parameter of one dimension (a bias, a
    norm's scale) is one filter here; the authors' code leaves those out.

    Args:
        direction_D: Any direction (D).
        space: The weights, where they stand.

    Returns:
        The direction (D), finite throughout.
    """
    parts = []
    sizes = [parameter.numel() for parameter in space.parameters]
    for part, parameter in zip(torch.split(direction_D, sizes), space.parameters, strict=True):
        filters, weights = _filters(part.view_as(parameter)), _filters(parameter.detach())
        length, wanted = filters.norm(dim=1, keepdim=True), weights.norm(dim=1, keepdim=True)
        usable = (length > 0) & length.isfinite() & wanted.isfinite()
        parts.append(torch.where(usable, filters / length * wanted, 0.0))
    return space.join(parts)


def _filters(tensor: Tensor) -> Tensor:
    # In float64, since the squares of small float32 numbers vanish.
    return tensor.double().flatten(1) if tensor.dim() > 1 else tensor.double().reshape(1, -1)


def random_direction(space: Space, generator: torch.Generator) -> Tensor:
    """A Gaussian direction, filter-normalised (D).

    Args:
        space: The weights, where they stand.
        generator: On the CPU. From the same state runs of the same model get the same direction, but for the lengths.
    """
    gaussian_D = torch.randn(space.num_dimensions, generator=generator, dtype=torch.float64)
    return filter_normalised(gaussian_D.to(space.device), space)


def eigenvector_direction(eigenvector_D: Tensor, space: Space) -> Tensor:
    r"""An eigenvector as long as the weights are: :math:`\pm \|\theta\|\, x`.

    That is the length of a filter-normalised direction too, so that positions along both mean the same distance. Filter by filter
    it is not normalised, which would turn it into another direction.

    An eigenvector has no sign of its own; here its largest entry is positive, so that a slice comes out the same each time.

    Args:
        eigenvector_D: Of length 1 (D).
        space: The weights, where they stand.
    """
    sign = math.copysign(1.0, float(eigenvector_D[eigenvector_D.abs().argmax()]))
    return eigenvector_D * (sign * _length(space.position()))


def barrier(positions: Sequence[float], losses: Sequence[float | None]) -> tuple[float, float] | None:
    r"""How far the loss between two runs rises above the straight line between their losses.

    .. math:: \max_{t \in [0, 1]} L((1 - t)\, a + t\, b) - \bigl((1 - t)\, L(a) + t\, L(b)\bigr)

    Never negative, and from a grid a lower bound. Source: Entezari, Sedghi, Saukh and Neyshabur (ICLR 2022), definition 2.1. The
    error barrier height of Frankle, Dziugaite, Roy and Carbin (ICML 2020) subtracts the mean of the two ends' losses instead, and
    is the same where those are equal.

    Args:
        positions: t, with 0 and 1 among them.
        losses: One for each; None where there is none.

    Returns:
        Height and t; infinite where a loss between the ends is not finite; None where one at the ends is missing or not finite.

    >>> barrier([0.0, 0.25, 0.5, 1.0], [1.0, 2.5, 2.0, 3.0])
    (1.0, 0.25)
    """
    taken = {t: loss for t, loss in zip(positions, losses, strict=True) if loss is not None and 0 <= t <= 1}
    start, end = taken.get(0.0, math.nan), taken.get(1.0, math.nan)
    if not (math.isfinite(start) and math.isfinite(end)):
        return None
    rises = {t: loss - ((1 - t) * start + t * end) if math.isfinite(loss) else math.inf for t, loss in taken.items()}
    highest = max(rises, key=rises.__getitem__)
    return rises[highest], highest


def measure_slice_1d(
    surfaces: Mapping[str, Surface],
    origin_D: Tensor,
    direction_D: Tensor,
    *,
    name: str,
    positions: Iterable[float] = POSITIONS_1D,
    budget: Budget | None = None,
) -> Slice1D:
    """Losses along a direction, from the origin outward.

    Args:
        surfaces: The loss over each sample, by the sample's name; all of one space.
        origin_D: Where position 0 is (D).
        direction_D: From position 0 to 1 (D).
        name: Of the slice.
        positions: Where to take the losses.
        budget: Ends it before; what is missing then lies farthest out.
    """
    grid = sorted(set(positions))
    places = ((t, origin_D + t * direction_D) for t in sorted(grid, key=abs))
    return _slice_1d(name, grid, _measure(surfaces, places, budget), surfaces, _length(direction_D))


def measure_line(
    surfaces: Mapping[str, Surface],
    runs: Mapping[str, Tensor],
    *,
    positions: Iterable[float] = LINE_POSITIONS,
    budget: Budget | None = None,
) -> Slice1D:
    r"""Losses on the line through two runs, :math:`\theta(t) = (1 - t)\, a + t\, b`, and the barrier between them.

    Args:
        surfaces: The loss over each sample, by the sample's name; all of one space.
        runs: Where the weights of the two stand, by the run's name (D).
        positions: t; 0 and 1 are added.
        budget: Ends it before. The ends come first, then what lies between them, coarse before fine, then what lies beyond.

    Raises:
        ValueError: There are not two runs, or their weights are the same, not finite, or not as many as the space's.
    """
    _check_runs(runs, 2, surfaces)
    (first, a_D), (second, b_D) = runs.items()
    grid = sorted({0.0, 1.0, *positions})
    places = ((t, (1 - t) * a_D + t * b_D) for t in _ends_first(grid))
    found = _measure(surfaces, places, budget)
    line = _slice_1d(f"{first} → {second}", grid, found, surfaces, _length(b_D - a_D))
    heights = {sample: barrier(grid, losses) for sample, losses in line.losses.items()}
    return replace(
        line,
        marks={first: 0.0, second: 1.0},
        barriers={sample: None if highest is None else highest[0] for sample, highest in heights.items()},
    )


def measure_slice_2d(
    surfaces: Mapping[str, Surface],
    origin_D: Tensor,
    directions: tuple[Tensor, Tensor],
    *,
    name: str,
    x: Iterable[float] = POSITIONS_2D,
    y: Iterable[float] = POSITIONS_2D,
    budget: Budget | None = None,
) -> Slice2D:
    """Losses on the plane of two directions, first on a coarse grid and then on ever finer ones.

    Args:
        surfaces: The loss over each sample, by the sample's name; all of one space.
        origin_D: Where x and y are 0 (D).
        directions: From x = 0 to 1, and from y = 0 to 1 (D).
        name: Of the slice.
        x: Where to take the losses along the first direction.
        y: And along the second.
        budget: Ends it before; what was taken covers the plane (``stride``).
    """
    columns, rows = sorted(set(x)), sorted(set(y))
    x_D, y_D = directions
    found: dict[tuple[int, int], dict[str, float]] = {}
    whole = None
    for stride in _strides(min(len(columns), len(rows))):
        lattice = [(i, j) for j in _lattice(len(rows), stride) for i in _lattice(len(columns), stride)]
        places = (
            ((i, j), torch.add(torch.add(origin_D, x_D, alpha=columns[i]), y_D, alpha=rows[j]))
            for i, j in lattice
            if (i, j) not in found
        )
        found |= _measure(surfaces, places, budget)
        if any(place not in found for place in lattice):
            break
        whole = stride
    losses = {
        sample: [[found.get((i, j), {}).get(sample) for i in range(len(columns))] for j in range(len(rows))]
        for sample in surfaces
    }
    return Slice2D(name, columns, rows, losses, whole)


def measure_plane(
    surfaces: Mapping[str, Surface],
    runs: Mapping[str, Tensor],
    *,
    num_points: int = len(POSITIONS_2D),
    margin: float = 0.2,
    side_positions: Iterable[float] = SIDE_POSITIONS,
    budget: Budget | None = None,
) -> Slice2D:
    r"""Losses on the plane through three runs a, b and c, and the barriers on the three lines between them.

    .. math:: u = b - a, \quad v = (c - a) - \frac{\langle c - a, u \rangle}{\|u\|^2}\, u, \quad
        \theta(x, y) = a + x \frac{u}{\|u\|} + y \frac{v}{\|v\|}

    so that a lies at (0, 0), b at :math:`(\|u\|, 0)`, and a unit is one of distance in the weights along both axes.
    Source: Garipov, Izmailov, Podoprikhin, Vetrov and Wilson (NeurIPS 2018), appendix on the visualisation.

    Args:
        surfaces: The loss over each sample, by the sample's name; all of one space.
        runs: Where the weights of the three stand, by the run's name (D).
        num_points: Of the grid along its longer axis, at least 2; the shorter one has as many as keep the spacing equal.
        margin: Room beside the runs on all sides, as a share of the triangle's longer extent.
        side_positions: Where to take the losses on the lines between the runs; 0 and 1 are added.
        budget: Ends it before. The lines between the runs come first.

    Raises:
        ValueError: There are not three runs, two have the same weights, all lie on one line, or their weights are not finite, or
            not as many as the space's.
    """
    _check_runs(runs, 3, surfaces)
    (first, a_D), (second, b_D), (third, c_D) = runs.items()
    u_D, to_c_D = (b_D - a_D).double(), (c_D - a_D).double()
    u_D /= (width := _length(u_D))
    foot = float(to_c_D @ u_D)
    v_D = to_c_D - foot * u_D
    height = _length(v_D)
    if height <= _rounding(runs.values()):
        raise ValueError(
            f"{first}, {second} and {third} lie on one line in the weights, so that there is no plane between them: measure the "
            "line between two of them"
        )
    v_D /= height
    marks = {first: [0.0, 0.0], second: [width, 0.0], third: [foot, height]}
    lines = [
        measure_line(surfaces, {one: runs[one], other: runs[other]}, positions=side_positions, budget=budget)
        for one, other in ((first, second), (first, third), (second, third))
    ]
    x, y = _axes_around(list(marks.values()), num_points, margin)
    plane = measure_slice_2d(surfaces, a_D, (u_D.to(a_D), v_D.to(a_D)), name=", ".join(runs), x=x, y=y, budget=budget)
    return replace(plane, marks=marks, sides=lines)


def _measure(
    surfaces: Mapping[str, Surface], places: Iterable[tuple[Place, Tensor]], budget: Budget | None
) -> dict[Place, dict[str, float]]:
    """Losses of all samples at one place after the other, until the budget is spent."""
    found: dict[Place, dict[str, float]] = {}
    for place, position_D in places:
        if budget is not None and budget.is_spent():
            break
        found[place] = {sample: surface.loss_at(position_D) for sample, surface in surfaces.items()}
    return found


def _slice_1d(
    name: str,
    grid: list[float],
    found: Mapping[float, Mapping[str, float]],
    surfaces: Mapping[str, Surface],
    length: float,
) -> Slice1D:
    losses = {sample: [found.get(t, {}).get(sample) for t in grid] for sample in surfaces}
    return Slice1D(name, grid, losses, length, complete=len(found) == len(grid))


def _ends_first(grid: Sequence[float]) -> Iterator[float]:
    between = [t for t in grid if 0 < t < 1]
    yield from (0.0, 1.0)
    for stride in (strides := _strides(len(between))):
        for i in _lattice(len(between), stride):
            # What a coarser stride had already lies on its lattice too.
            if stride == strides[0] or i not in _lattice(len(between), 2 * stride):
                yield between[i]
    yield from sorted((t for t in grid if not 0 <= t <= 1), key=lambda t: abs(t - 0.5))


def _strides(num_points: int) -> list[int]:
    """Powers of two down to 1, of which the first leaves three points at least, if there are as many."""
    strides = [1]
    while 2 * strides[0] <= (num_points - 1) // 2:
        strides.insert(0, 2 * strides[0])
    return strides


def _lattice(num_points: int, stride: int) -> range:
    return range(num_points // 2 % stride, num_points, stride)


def _axes_around(marks: Sequence[Sequence[float]], num_points: int, margin: float) -> tuple[list[float], list[float]]:
    bounds = [(min(along), max(along)) for along in zip(*marks, strict=True)]
    longest = max(high - low for low, high in bounds)
    step = longest * (1 + 2 * margin) / (num_points - 1)
    axes = []
    for low, high in bounds:
        # Less a little, so that rounding does not add a point to an axis that already fits.
        num_steps = max(math.ceil((high - low + 2 * margin * longest) / step - 1e-6), 1)
        start = (low + high) / 2 - step * num_steps / 2
        axes.append([start + step * i for i in range(num_steps + 1)])
    return axes[0], axes[1]


def _check_runs(runs: Mapping[str, Tensor], number: int, surfaces: Mapping[str, Surface]) -> None:
    if len(runs) != number:
        raise ValueError(f"{number} runs are needed, each with a name of its own, got {len(runs)}: {', '.join(runs)}")
    size = next(iter(surfaces.values())).space.num_dimensions
    for name, position_D in runs.items():
        if len(position_D) != size:
            raise ValueError(
                f"{name} has {len(position_D)} weights where {size} are looked at: only runs of one model, with adapters of one "
                "kind, have a line between them"
            )
        if not position_D.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite: there is no line through it")
    rounding = _rounding(runs.values())
    names = list(runs)
    for i in range(number):
        for j in range(i):
            if _length(runs[names[i]] - runs[names[j]]) <= rounding:
                raise ValueError(
                    f"{names[j]} and {names[i]} have the same weights, so that there is no line between them"
                )


def _rounding(positions: Iterable[Tensor]) -> float:
    return max(_ROUNDINGS * torch.finfo(position_D.dtype).eps * _length(position_D) for position_D in positions)


def _length(vector_D: Tensor) -> float:
    return float(vector_D.double().norm())

"""What a picture shows, before it is a PNG or a page: panels of numbers and words, and the scales they share.

What is not to be drawn is NaN here: losses that are missing or not finite.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Okabe and Ito's, which colour-blind people tell apart; marks beside them, for print in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"
NO_LOSS_COLOUR = "#DDDDDD"
COLOUR_MAP = "viridis"
NUM_LEVELS = 24
NO_LOSS = "grey: the loss is not finite"
EMPTY = "nothing was measured here\nthat can be drawn"

# Beyond so many times the smallest loss the axis is logarithmic.
_WIDE = 100.0
# What is larger counts as infinite: an axis to the end of float64 cannot be drawn.
_HUGE = 1e300


@dataclass(frozen=True)
class Scale:
    """An axis, or the colours, of several panels.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        logarithmic: Whether it is.
    """

    low: float
    high: float
    logarithmic: bool = False

    def ticks(self) -> list[float]:
        """Round values on it: of a logarithmic one some of each decade, or the decades alone if there are many."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            within = (1, 2, 5) if len(decades) <= 4 else (1, 3) if len(decades) <= 8 else (1,)
            every = math.ceil(len(decades) / 10)
            ticks = [factor * 10.0**decade for decade in decades[::every] for factor in within]
        else:
            span = self.high - self.low
            decade = 10.0 ** math.floor(math.log10(span / 3))
            step = decade * next(factor for factor in (1, 2, 5, 10) if span / (decade * factor) <= 7)
            ticks = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in ticks if self.low <= tick <= self.high]

    def main_ticks(self) -> list[float]:
        """Those with a number where there is little room: of a logarithmic scale the decades."""
        return [tick for tick in self.ticks() if not self.logarithmic or f"{tick:e}".startswith("1.0")]

    def linear(self, value: float) -> float:
        """The value as it goes evenly along the scale: its decimal logarithm on a logarithmic one."""
        return math.log10(value) if self.logarithmic and not math.isnan(value) else value


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: In the legend, once for all that have the same.
        x: Where.
        y: How high.
        colour: Of the line.
        dash: solid, dashed or dotted.
        marker: Which mark its points have, by number; None: none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = "solid"
    marker: int | None = None


@dataclass(frozen=True)
class Chart:
    """A panel with curves.

    Attributes:
        title: Its lines.
        curves: What it shows.
        x_scale: Of all charts that are to be compared.
        y_scale: Likewise.
        x_ticks: Words for places on the x axis; none: numbers.
        rug: Ticks along the bottom.
        rug_label: What they are.
    """

    title: Sequence[str]
    curves: Sequence[Curve]
    x_scale: Scale
    y_scale: Scale
    x_ticks: Mapping[float, str] = field(default_factory=dict)
    rug: Sequence[float] = ()
    rug_label: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether no point of it can be drawn."""
        return not any(math.isfinite(value) for curve in self.curves for value in curve.y)


@dataclass(frozen=True)
class Map:
    """A panel with the losses on a plane.

    Attributes:
        title: Its lines.
        x: Positions, ascending.
        y: Likewise.
        losses: A row for each y.
        marks: Places with a name.
    """

    title: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    losses: Sequence[Sequence[float]]
    marks: Mapping[str, Sequence[float]]

    @property
    def is_empty(self) -> bool:
        """Whether no point of it can be drawn."""
        return not any(math.isfinite(loss) for row in self.losses for loss in row)

    @property
    def has_gaps(self) -> bool:
        """Whether some points of it cannot be drawn."""
        return not all(math.isfinite(loss) for row in self.losses for loss in row)


@dataclass(frozen=True)
class Sheet:
    """What surrounds the panels, which fill it row by row.

    Attributes:
        title: Of the picture.
        x_title: Of all x axes.
        y_title: Of all y axes.
        num_columns: Panels in a row.
    """

    title: str
    x_title: str
    y_title: str
    num_columns: int


@dataclass(frozen=True)
class MapScales:
    """What the maps of a picture share."""

    x: Scale
    y: Scale
    loss: Scale


def share_scales(maps: Sequence[Map | None]) -> MapScales:
    """Scales that hold all maps."""
    present = [one for one in maps if one is not None]
    return MapScales(
        make_scale((value for one in present for value in one.x), margin=0.0),
        make_scale((value for one in present for value in one.y), margin=0.0),
        make_scale(
            (loss for one in present for row in one.losses for loss in row), margin=0.005, may_be_logarithmic=True
        ),
    )


def plain(value: float | None) -> float:
    """A number that can be drawn, or NaN."""
    return value if value is not None and abs(value) < _HUGE else math.nan


def make_scale(values: Iterable[float | None], *, margin: float = 0.05, may_be_logarithmic: bool = False) -> Scale:
    """A scale that holds all values.

    Args:
        values: Of all panels.
        margin: Room at both ends, as a share of the scale.
        may_be_logarithmic: Whether it is where all values are positive and span span more than two decades.
    """
    known = [value for value in map(plain, values) if not math.isnan(value)]
    if not known:
        return Scale(0.0, 1.0)
    low, high = min(known), max(known)
    if may_be_logarithmic and low > 0 and high > _WIDE * low:
        factor = 10 ** (margin * (math.log10(high) - math.log10(low)))
        return Scale(low / factor, high * factor, logarithmic=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.05 * abs(high) or 1.0
        return Scale(low - room, high + room)
    return Scale(low - margin * (high - low), high + margin * (high - low))


def format_number(value: float | None) -> str:
    """Three digits.

    >>> format_number(0.12345), format_number(float("inf")), format_number(None)
    ('0.123', 'infinite', 'unknown')
    """
    if value is None or math.isnan(value):
        return "unknown"
    return "infinite" if math.isinf(value) else f"{value:.3g}"


def shortened(name: str, length: int) -> str:
    """A name on one line, its middle left out if it is too long: runs differ at the beginning or at the end.

    >>> shortened("sst2/safe-with-a-long-name/seed-0", 20)
    'sst2/safe…ame/seed-0'
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(printable) <= length:
        return printable
    ahead = (length - 1) // 2
    return f"{printable[:ahead]}…{printable[ahead + 1 - length :]}"


def told_apart(names: Sequence[str]) -> dict[str, str]:
    """By name, what of its path tells it from the others.

    >>> told_apart(["sst2/lora/seed-0", "sst2/safe/seed-0"])
    {'sst2/lora/seed-0': 'lora', 'sst2/safe/seed-0': 'safe'}
    >>> told_apart(["sst2/lora/seed-0"])
    {'sst2/lora/seed-0': 'sst2/lora/seed-0'}
    """
    parts = {name: name.split("/") for name in names}
    for end in (0, -1):
        while len(parts) > 1 and all(len(one) > 1 for one in parts.values()):
            if len({one[end] for one in parts.values()}) > 1:
                break
            for one in parts.values():
                one.pop(end)
    return {name: "/".join(one) for name, one in parts.items()}


def wrapped(lines: Sequence[str], width: int) -> list[str]:
    """Lines of at most ``width`` letters; what would fill more than two is shortened."""
    return [part for line in lines for part in textwrap.wrap(shortened(line, 2 * width - 8), width)]

"""Panels as a PNG, by matplotlib: without its global state, so that nothing else that is drawn is touched."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safe_lab.sharpness.plots.panels import (
    COLOUR_MAP,
    COLOURS,
    EMPTY,
    NO_LOSS,
    NO_LOSS_COLOUR,
    NUM_LEVELS,
    Chart,
    Map,
    Scale,
    Sheet,
    share_scales,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P")
_DOTS_PER_INCH = 150
# Inches of a panel, or of one in a column of its own; and of what is written beside and above one, and all.
_PANEL_WIDTH, _SINGLE_WIDTH = 3.2, 5.2
_BESIDE_PANEL, _BESIDE_ALL = 0.6, 0.3
_ABOVE_PANEL, _ABOVE_ALL = 0.8, 0.9
_STYLE: Any = {
    "text.usetex": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "figure.titlesize": 12,
    "figure.labelsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "savefig.facecolor": "white",
}


def draw_charts(sheet: Sheet, panels: Sequence[Chart | None]) -> bytes:
    """Charts as a PNG."""
    with _figure(sheet, len(panels), ratio=0.75, layout="constrained") as (figure, axes, width):
        for one, panel in zip(axes, panels, strict=False):
            if panel is not None:
                _draw_chart(one, panel, width)
        _add_legend(figure, axes)
        return _to_png(figure)


def _draw_chart(axes: Axes, panel: Chart, width: int) -> None:
    axes.set_axis_on()
    axes.grid(visible=True)
    axes.set_title(_text(wrapped(panel.title, width)))
    _set_scale(axes, "x", panel.x_scale)
    _set_scale(axes, "y", panel.y_scale)
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks), [_text(label.split("\n")) for label in panel.x_ticks.values()])
    if panel.is_empty:
        _write_empty(axes)
        return
    for curve in panel.curves:
        marker = "" if curve.marker is None else _MARKERS[curve.marker % len(_MARKERS)]
        axes.plot(curve.x, curve.y, color=curve.colour, linestyle=curve.dash, marker=marker, label=_text([curve.label]))
    if panel.rug:
        axes.plot(
            panel.rug,
            [0.0] * len(panel.rug),
            transform=axes.get_xaxis_transform(),
            color=COLOURS[1],
            linestyle="",
            marker="|",
            markersize=16,
            markeredgewidth=1.6,
            label=_text([panel.rug_label]),
        )


def draw_maps(sheet: Sheet, panels: Sequence[Map | None]) -> bytes:
    """Maps as a PNG: filled contours, with lines at the round values of the colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    scales = share_scales(panels)
    norm = (LogNorm if scales.loss.logarithmic else Normalize)(scales.loss.low, scales.loss.high)
    ratio = (scales.y.high - scales.y.low) / (scales.x.high - scales.x.low)
    with _figure(sheet, len(panels), ratio=min(max(ratio, 0.4), 1.4), layout="compressed") as (figure, axes, width):
        for one, panel in zip(axes, panels, strict=False):
            if panel is None:
                continue
            one.set_axis_on()
            one.set_title(_text(wrapped(panel.title, width)))
            _set_scale(one, "x", scales.x)
            _set_scale(one, "y", scales.y)
            one.set_aspect("equal")
            _draw_map(one, panel, scales.loss, norm)
        bar = figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=list(axes), label="mean loss", aspect=30)
        bar.set_ticks(scales.loss.ticks(), labels=[f"{tick:g}" for tick in scales.loss.ticks()])
        bar.minorticks_off()
        _add_legend(figure, axes)
        _fit_height(figure, axes)
        return _to_png(figure)


def _draw_map(axes: Axes, panel: Map, scale: Scale, norm: Any) -> None:
    from matplotlib.patheffects import withStroke

    if panel.is_empty or min(len(panel.x), len(panel.y)) < 2:
        _write_empty(axes)
        return
    losses = np.ma.masked_invalid(panel.losses)
    space = np.geomspace if scale.logarithmic else np.linspace
    axes.contourf(
        panel.x, panel.y, losses, levels=space(scale.low, scale.high, NUM_LEVELS + 1), norm=norm, cmap=COLOUR_MAP
    )
    inside = [tick for tick in scale.ticks() if losses.min() < tick < losses.max()]
    if inside:
        lines = axes.contour(panel.x, panel.y, losses, levels=inside, colors="white", linewidths=0.7)
        numbered = [tick for tick in inside if tick in scale.main_ticks()]
        labels = axes.clabel(lines, numbered, fmt="%g", fontsize=8)
        for label in labels:
            label.set_path_effects([withStroke(linewidth=1.5, foreground="#33333399")])
    if panel.has_gaps:
        axes.set_facecolor(NO_LOSS_COLOUR)
        axes.fill([], [], color=NO_LOSS_COLOUR, label=NO_LOSS)
    for one, other in combinations(panel.marks.values(), 2):
        axes.plot(*zip(one, other, strict=True), color="white", linestyle="dotted", linewidth=1.2)
    for i, (name, (x, y)) in enumerate(panel.marks.items()):
        axes.plot(
            x,
            y,
            color="white",
            markeredgecolor="black",
            linestyle="",
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=8,
            zorder=5,
            label=_text([name]),
        )
        if len(panel.marks) > 1:
            axes.annotate(
                name[0],
                (x, y),
                xytext=(7, 5),
                textcoords="offset points",
                color="white",
                weight="bold",
                zorder=5,
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )


@contextmanager
def _figure(
    sheet: Sheet, num_panels: int, *, ratio: float, layout: Literal["constrained", "compressed"]
) -> Iterator[tuple[Figure, list[Axes], int]]:
    """A figure with its titles, all axes switched off so far, and the letters that a panel's title has room for."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        num_rows = max(math.ceil(num_panels / sheet.num_columns), 1)
        panel_width = _SINGLE_WIDTH if sheet.num_columns == 1 else _PANEL_WIDTH
        size = (
            (panel_width + _BESIDE_PANEL) * sheet.num_columns + _BESIDE_ALL,
            (panel_width * ratio + _ABOVE_PANEL) * num_rows + _ABOVE_ALL,
        )
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout=layout)
        axes: list[Axes] = list(figure.subplots(num_rows, sheet.num_columns, squeeze=False).ravel())
        for i, one in enumerate(axes):
            one.set_axis_off()
            if i % sheet.num_columns == 0:
                one.set_ylabel(_text(wrapped([sheet.y_title], int(14 * panel_width * ratio))))
            if i + sheet.num_columns >= num_panels:
                one.set_xlabel(_text(wrapped([sheet.x_title], int(13 * panel_width))))
        figure.suptitle(_text(wrapped([sheet.title], int(9.5 * size[0]))))
        yield figure, axes, int(14 * panel_width)


def _set_scale(axes: Axes, name: str, scale: Scale) -> None:
    axes.set(**{f"{name}scale": "log" if scale.logarithmic else "linear", f"{name}lim": (scale.low, scale.high)})


def _write_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, EMPTY, transform=axes.transAxes, ha="center", va="center", color="#444444")


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles: dict[Any, Any] = {}
    for one in axes:
        # Not get_legend_handles_labels(), which leaves out names that begin with an underscore.
        for artist in (*one.lines, *one.patches):
            label = artist.get_label()
            if isinstance(label, str) and not label.startswith("_child"):
                handles.setdefault(label, artist)
    if handles:
        # With its handle; the columns of a legend are as wide as its longest label.
        letters, room = [len(label) + 8 for label in handles], 12 * figure.get_figwidth()
        num_columns = len(handles) if sum(letters) <= room else max(int(room / max(letters)), 1)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=num_columns)


def _fit_height(figure: Figure, axes: Sequence[Axes]) -> None:
    """Take away the room that panels of a fixed shape leave above and below."""
    figure.draw_without_rendering()
    boxes = [box for one in axes if (box := one.get_tightbbox()) is not None]
    height = max(box.y1 for box in boxes) - min(box.y0 for box in boxes)
    height += sum(one.get_window_extent().height for one in (*figure.texts, *figure.legends))
    figure.set_figheight(height / figure.dpi + 0.35)


def _text(lines: Sequence[str]) -> str:
    """Lines as they are: matplotlib takes what stands between two dollar signs for a formula."""
    return "\n".join(lines).replace("$", r"\$")


def _to_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()

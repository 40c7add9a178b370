"""Panels as an HTML page, by plotly: to turn, zoom and point at."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

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
    format_number,
    share_scales,
    wrapped,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# What plotly's pages of include_plotlyjs="directory" read from beside them.
LIBRARY = "plotly.min.js"

_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
# Pixels.
_PANEL_HEIGHT, _BAR_HEIGHT, _LINE_HEIGHT = 320, 400, 17
# Of maps, by how many there are in a row: they are as high as they are wide on a screen.
_MAP_HEIGHTS = {1: 440, 2: 440, 3: 340, 4: 270}
_TITLE_WIDTH = 44


def library() -> str:
    """The script that the pages read."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def draw_charts(sheet: Sheet, panels: Sequence[Chart | None]) -> str:
    """Charts as a page."""
    figure = _figure(sheet, panels, _PANEL_HEIGHT, kind="xy")
    in_legend: set[str] = set()
    axes: dict[tuple[str, Scale], str] = {}
    for i, panel in enumerate(panels):
        if panel is None:
            continue
        place = {"row": i // sheet.num_columns + 1, "col": i % sheet.num_columns + 1}
        subplot = figure.get_subplot(**place)
        for axis, scale in ((subplot.xaxis, panel.x_scale), (subplot.yaxis, panel.y_scale)):
            name = axis.plotly_name.replace("axis", "")
            axis.update(_axis(scale))
            # Panels of one scale zoom together.
            first = axes.setdefault((name[0], scale), name)
            if first != name:
                axis.matches = first
        if panel.x_ticks:
            labels = [_text(label.split("\n")) for label in panel.x_ticks.values()]
            figure.update_xaxes(tickvals=list(panel.x_ticks), ticktext=labels, tickangle=0, **place)
        if panel.is_empty:
            _write_empty(figure, place)
            continue
        for curve in panel.curves:
            figure.add_scatter(
                x=list(curve.x),
                y=_without_nan(curve.y),
                mode="lines" if curve.marker is None else "lines+markers",
                line={"color": curve.colour, "dash": _DASHES[curve.dash]},
                marker={"symbol": _MARKERS[(curve.marker or 0) % len(_MARKERS)], "size": 6},
                hovertemplate="%{x:.4g}: %{y:.6g}",
                **_legend_entry(curve.label, in_legend),
                **place,
            )
        if panel.rug:
            figure.add_scatter(
                x=list(panel.rug),
                y=[panel.y_scale.low * 1.3 if panel.y_scale.logarithmic else panel.y_scale.low] * len(panel.rug),
                mode="markers",
                marker={"symbol": "line-ns", "size": 18, "line": {"width": 2, "color": COLOURS[1]}},
                hovertemplate="%{x:.6g}",
                **_legend_entry(panel.rug_label, in_legend),
                **place,
            )
    return _to_page(figure, sheet)


def draw_maps(sheet: Sheet, panels: Sequence[Map | None]) -> str:
    """Maps as a page of contours."""
    scales = share_scales(panels)
    figure = _figure(sheet, panels, _MAP_HEIGHTS[sheet.num_columns], kind="xy")
    _add_colours(figure, scales.loss)
    low, high = scales.loss.linear(scales.loss.low), scales.loss.linear(scales.loss.high)
    in_legend: set[str] = set()
    for i, panel in enumerate(panels):
        if panel is None:
            continue
        place = {"row": i // sheet.num_columns + 1, "col": i % sheet.num_columns + 1}
        number = sum(one is not None for one in panels[: i + 1])
        figure.update_xaxes(_axis(scales.x), constrain="domain", **place)
        figure.update_yaxes(
            _axis(scales.y), constrain="domain", scaleanchor="x" if number == 1 else f"x{number}", **place
        )
        if panel.is_empty or min(len(panel.x), len(panel.y)) < 2:
            _write_empty(figure, place)
            continue
        if panel.has_gaps:
            figure.update_xaxes(showgrid=False, zeroline=False, **place)
            figure.update_yaxes(showgrid=False, zeroline=False, **place)
            _explain_gaps(figure, place, in_legend)
        figure.add_contour(
            **_losses(panel, scales.loss),
            contours={"start": low, "end": high, "size": (high - low) / NUM_LEVELS},
            line={"width": 0.3},
            connectgaps=False,
            **place,
        )
        for ends in combinations(panel.marks.values(), 2):
            x_ends, y_ends = zip(*ends, strict=True)
            line = {"color": "white", "dash": "dot", "width": 1.5}
            figure.add_scatter(x=x_ends, y=y_ends, mode="lines", line=line, hoverinfo="skip", showlegend=False, **place)
        for k, (name, (x, y)) in enumerate(panel.marks.items()):
            figure.add_scatter(
                x=[x],
                y=[y],
                mode="markers+text",
                text=_text([name[0]]) if len(panel.marks) > 1 else "",
                textposition="top right",
                textfont={"color": "white", "size": 15},
                marker={"symbol": _MARKERS[k], "size": 11, "color": "white", "line": {"width": 1.5, "color": "black"}},
                hovertemplate="%{x:.4g}, %{y:.4g}",
                **_legend_entry(name, in_legend),
                **place,
            )
    return _to_page(figure, sheet)


def draw_surfaces(sheet: Sheet, panels: Sequence[Map | None]) -> str:
    """Maps as a page of surfaces that can be turned."""
    scales = share_scales(panels)
    figure = _figure(sheet, panels, _MAP_HEIGHTS[sheet.num_columns], kind="surface")
    _add_colours(figure, scales.loss)
    in_legend: set[str] = set()
    for i, panel in enumerate(panels):
        if panel is None:
            continue
        place = {"row": i // sheet.num_columns + 1, "col": i % sheet.num_columns + 1}
        figure.update_scenes(
            xaxis={"title": {"text": "first direction"}} | _axis(scales.x),
            yaxis={"title": {"text": "second direction"}} | _axis(scales.y),
            zaxis={"title": {"text": ""}, "tickvals": scales.loss.main_ticks(), "tickfont": {"size": 10}}
            | _axis(scales.loss),
            aspectmode="manual",
            aspectratio={"x": 1, "y": 1, "z": 0.8},
            camera={"eye": {"x": 1.35, "y": -1.75, "z": 1.1}, "center": {"x": 0, "y": 0, "z": -0.1}},
            **place,
        )
        if panel.is_empty or min(len(panel.x), len(panel.y)) < 2:
            _write_empty_scene(figure, place)
            continue
        losses = _losses(panel, scales.loss)
        figure.add_surface(**losses | {"z": _rows(panel.losses), "surfacecolor": losses["z"]}, **place)
        for name, (x, y) in panel.marks.items():
            if x in panel.x and y in panel.y and math.isfinite(panel.losses[panel.y.index(y)][panel.x.index(x)]):
                loss = panel.losses[panel.y.index(y)][panel.x.index(x)]
                figure.add_scatter3d(
                    x=[x],
                    y=[y],
                    z=[loss],
                    mode="markers",
                    marker={"size": 5, "color": COLOURS[1]},
                    hovertemplate=f"loss {format_number(loss)}",
                    **_legend_entry(name, in_legend),
                    **place,
                )
    return _to_page(figure, sheet)


def _figure(sheet: Sheet, panels: Sequence[Chart | Map | None], panel_height: int, *, kind: str) -> Figure:
    from plotly.subplots import make_subplots

    num_rows = max(math.ceil(len(panels) / sheet.num_columns), 1)
    filled = [*panels, *[None] * (num_rows * sheet.num_columns - len(panels))]
    titles = [None if panel is None else wrapped(panel.title, _TITLE_WIDTH) for panel in filled]
    above = _LINE_HEIGHT * max(len(title or ()) for title in titles) + 12
    # Between two rows: the numbers of the upper one's axis, perhaps with names below, and the title of the lower.
    between = 50 + above
    inside = panel_height * num_rows + between * (num_rows - 1)
    top, bottom = 84 + above, 70
    specs = [None if panel is None else {"type": kind} for panel in filled]
    figure = make_subplots(
        num_rows,
        sheet.num_columns,
        specs=[specs[row * sheet.num_columns :][: sheet.num_columns] for row in range(num_rows)],
        subplot_titles=[_text(title) for title in titles if title is not None],
        x_title=_text([f"{sheet.x_title}; {sheet.y_title}"]) if kind == "surface" else None,
        horizontal_spacing=0.2 / sheet.num_columns if kind == "xy" else 0.02,
        vertical_spacing=between / inside,
    )
    height = inside + top + bottom
    figure.update_annotations(font_size=13)
    for i, panel in enumerate(panels if kind == "xy" else ()):
        place = {"row": i // sheet.num_columns + 1, "col": i % sheet.num_columns + 1}
        if panel is not None and i % sheet.num_columns == 0:
            figure.update_yaxes(title={"text": _text(wrapped([sheet.y_title], _TITLE_WIDTH)), "font_size": 13}, **place)
        if panel is not None and i + sheet.num_columns >= len(panels):
            figure.update_xaxes(title={"text": _text(wrapped([sheet.x_title], _TITLE_WIDTH)), "font_size": 13}, **place)
    figure.update_layout(
        template="plotly_white",
        title={
            "text": _text(wrapped([sheet.title], 110)),
            "x": 0.02,
            "y": 1 - 16 / height,
            "yanchor": "top",
            "font_size": 17,
        },
        height=height,
        margin={"t": top, "b": bottom, "l": 80, "r": 30},
        legend={"orientation": "h", "yref": "container", "y": 1 - 48 / height, "yanchor": "top", "x": 0},
    )
    return figure


def _axis(scale: Scale) -> dict[str, Any]:
    return {
        "type": "log" if scale.logarithmic else "linear",
        "range": [scale.linear(scale.low), scale.linear(scale.high)],
    }


def _losses(panel: Map, scale: Scale) -> dict[str, Any]:
    """What contours and surfaces have in common; z goes evenly along the scale of colours."""
    return {
        "x": list(panel.x),
        "y": list(panel.y),
        "z": _rows([[scale.linear(loss) for loss in row] for row in panel.losses]),
        "text": [[format_number(loss) for loss in row] for row in panel.losses],
        "hovertemplate": "%{x:.4g}, %{y:.4g}: %{text}<extra></extra>",
        "coloraxis": "coloraxis",
    }


def _add_colours(figure: Figure, scale: Scale) -> None:
    ticks = scale.ticks()
    figure.update_layout(
        coloraxis={
            "colorscale": COLOUR_MAP,
            "cmin": scale.linear(scale.low),
            "cmax": scale.linear(scale.high),
            "colorbar": {
                "title": {"text": "mean loss"},
                "lenmode": "pixels",
                "len": _BAR_HEIGHT,
                "y": 1,
                "yanchor": "top",
                "tickvals": [scale.linear(tick) for tick in ticks],
                "ticktext": [f"{tick:g}" for tick in ticks],
            },
        }
    )


def _legend_entry(label: str, in_legend: set[str]) -> dict[str, Any]:
    """One entry for all that have this label, by which they are switched on and off together."""
    is_first = label not in in_legend
    in_legend.add(label)
    return {"name": _text([label]), "legendgroup": label, "showlegend": is_first}


def _explain_gaps(figure: Figure, place: dict[str, int], in_legend: set[str]) -> None:
    figure.add_shape(
        type="rect",
        xref="x domain",
        yref="y domain",
        x0=0,
        x1=1,
        y0=0,
        y1=1,
        fillcolor=NO_LOSS_COLOUR,
        line_width=0,
        layer="below",
        **place,
    )
    marker = {"symbol": "square", "size": 11, "color": NO_LOSS_COLOUR}
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, **_legend_entry(NO_LOSS, in_legend), **place)


def _write_empty(figure: Figure, place: dict[str, int]) -> None:
    # A trace, or the panel's axes would not be drawn.
    figure.add_scatter(x=[None], y=[None], showlegend=False, **place)
    figure.add_annotation(
        text=_text(EMPTY.split("\n")), xref="x domain", yref="y domain", x=0.5, y=0.5, showarrow=False, **place
    )


def _write_empty_scene(figure: Figure, place: dict[str, int]) -> None:
    scene = figure.get_subplot(**place)
    figure.add_annotation(
        text=_text(EMPTY.split("\n")),
        xref="paper",
        yref="paper",
        x=sum(scene.domain.x) / 2,
        y=sum(scene.domain.y) / 2,
        showarrow=False,
    )


def _rows(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [_without_nan(row) for row in rows]


def _without_nan(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _text(lines: Sequence[str]) -> str:
    """Lines as they are: plotly takes angle brackets for HTML."""
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _to_page(figure: Figure, sheet: Sheet) -> str:
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs="directory",
        div_id="figure",
        config={"displaylogo": False, "responsive": True},
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(wrapped([sheet.title], 110))}</title>\n</head>\n<body>\n{drawn}\n</body>\n</html>\n"
    )

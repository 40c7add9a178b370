"""The figures of a report, from run folders; colours and themes are the page's business."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from safe_lab.ablation import Comparison
from safe_lab.ablation.comparison import Cell
from safe_lab.ablation.records import Record
from safe_lab.figures import direction_of
from safe_lab.policy import POLICIES
from safe_lab.run_folder import RunFolder

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's, which the colour-blind tell apart; without yellow and black, of which each is lost on one of the two themes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MEMORY = "resources/memory_mean_bytes"
_MIB = 1024**2
# Of a stacked chart: what is stacked, its heading, its unit and by what it is divided.
_STACKS = (
    ("resources/step_memory/", "_bytes", "Live bytes at a step's peak, MiB", _MIB),
    ("resources/flops/", "", "FLOPs so far, TFLOP", 1e12),
    ("resources/seconds/", "", "Seconds so far", 1.0),
)
# Points of a chart, points of a line, scorings and lines beyond which they are thinned: a page is to stay small.
_MOST_IN_CHART = 6000
_MOST_IN_LINE = 400
_MOST_SCORINGS = 60
_MOST_LINES = 60
# Of a chart, about what a variant's name takes up.
_LABEL_WIDTH, _LABEL_HEIGHT = 0.2, 0.08
_SCORING = ("scoring", "epoch", "depth", "unit", "normalized_score", "threshold", "frozen")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Style:
    """How a variant is drawn, in every chart of a page.

    Attributes:
        colour: Of its points and lines.
        symbol: Of its points.
        dash: Of its lines.
    """

    colour: str
    symbol: str
    dash: str


def choose_styles(variants: Sequence[str]) -> dict[str, Style]:
    """A style for each variant, no two alike as far as there are enough."""
    num = len(COLOURS)
    return {
        variant: Style(colour_of(i), SYMBOLS[(i + i // num) % num], _DASHES[i // num % len(_DASHES)])
        for i, variant in enumerate(variants)
    }


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        title: Above it.
        note: How to read it.
        figure: The figure.
    """

    title: str
    note: str
    figure: go.Figure


def draw_trade_off(comparison: Comparison, styles: Mapping[str, Style]) -> Chart | None:
    """The metric against mean memory: a point for each variant, with its seeds around it, and the Pareto front."""
    import plotly.graph_objects as go

    metric = comparison.rules.metric
    rows = [row for row in comparison.rows if metric in row.cells and _MEMORY in row.cells]
    if not rows:
        return None
    figure = go.Figure()
    points: list[tuple[float, float]] = []
    labelled: list[tuple[float, float]] = []
    width, height = (_extent(row.cells[name] for row in rows) for name in (_MEMORY, metric))
    for row in rows:
        y, x = row.cells[metric], row.cells[_MEMORY]
        style = {"color": styles[row.variant].colour, "symbol": styles[row.variant].symbol}
        seeds = [seed for seed in y.by_seed if seed in x.by_seed]
        figure.add_scatter(
            x=[x.by_seed[seed] / _MIB for seed in seeds],
            y=[y.by_seed[seed] for seed in seeds],
            mode="markers",
            marker=style | {"size": 6, "opacity": 0.4},
            legendgroup=row.variant,
            showlegend=False,
            text=[f"{row.variant}, seed {seed}" for seed in seeds],
            hovertemplate="%{text}: %{y:.4g}, %{x:.4g} MiB<extra></extra>",
        )
        # A name that would stand on another is left to the legend.
        is_free = all(
            abs(x.mean - a) > _LABEL_WIDTH * width or abs(y.mean - b) > _LABEL_HEIGHT * height for a, b in labelled
        )
        if is_free:
            labelled.append((x.mean, y.mean))
        figure.add_scatter(
            x=[x.mean / _MIB],
            y=[y.mean],
            mode="markers+text" if is_free else "markers",
            marker=style | {"size": 12},
            text=[row.variant],
            textposition="top center",
            name=row.variant,
            legendgroup=row.variant,
            error_x={"array": [(x.spread or 0) / _MIB], "thickness": 1},
            error_y={"array": [y.spread or 0], "thickness": 1},
            hovertemplate="%{text}: %{y:.4g}, %{x:.4g} MiB<extra></extra>",
        )
        points.append((x.mean / _MIB, y.mean))
    sign = direction_of(metric)
    front = [
        p for p in sorted(points) if not any(q != p and q[0] <= p[0] and sign * q[1] >= sign * p[1] for q in points)
    ]
    line = {"dash": "dot", "color": COLOURS[-1]}
    figure.add_scatter(
        x=[p[0] for p in front], y=[p[1] for p in front], mode="lines", name="Pareto front", line=line, hoverinfo="skip"
    )
    figure.update_layout(xaxis_title="mean live bytes, MiB", yaxis_title=metric)
    note = "Large: means of variants, with standard deviations over the seeds; small: their seeds. Up and to the left is better."
    return Chart(f"{metric} against memory", note if sign > 0 else note.replace("Up", "Down"), figure)


def _extent(cells: Iterable[Cell]) -> float:
    """From the least to the largest value of any seed."""
    values = [value for cell in cells for value in cell.by_seed.values()]
    return max(values) - min(values)


def draw_learning_curves(records: Sequence[Record], metric: str, styles: Mapping[str, Style]) -> Chart | None:
    """The metric over the epochs: the mean of each variant's seeds. Rows that cannot be read are left to :func:`draw_costs`."""
    import plotly.graph_objects as go

    by_variant: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if record.fault:
            continue
        with suppress(ValueError):
            for row in read_rows(record, "metrics.jsonl", ("epoch",)):
                if row.get(metric) is not None:
                    by_variant.setdefault(record.variant, {}).setdefault(row["epoch"], []).append(row[metric])
    if not by_variant:
        return None
    figure = go.Figure()
    for variant, values in by_variant.items():
        style, epochs = styles[variant], sorted(values)
        figure.add_scatter(
            x=epochs,
            y=_round(fmean(values[epoch]) for epoch in epochs),
            name=variant,
            mode="lines+markers",
            line={"color": style.colour, "dash": style.dash},
            marker={"symbol": style.symbol},
        )
    figure.update_layout(xaxis_title="epoch", yaxis_title=metric)
    return Chart(f"{metric} over training", "Means over the seeds of a variant, at each evaluation.", figure)


def draw_freezing(record: Record) -> Iterator[Chart]:
    """When what froze in a run, and its scores.

    Raises:
        ValueError: Its rows cannot be read.
    """
    rows = read_rows(record, "importance.jsonl", _SCORING)
    scored = [row for row in rows if row["normalized_score"] is not None]
    if scored or any(row["frozen"] for row in rows):
        yield _draw_timeline(rows)
    if scored:
        # The level of another policy is a share, and no score.
        has_threshold = record.config is not None and POLICIES[record.config.freezing.policy].level == "threshold"
        yield _draw_scores(scored, has_threshold=has_threshold)


def draw_costs(record: Record) -> Iterator[Chart]:
    """What a run cost over time.

    Raises:
        ValueError: Its rows cannot be read.
    """
    rows = read_rows(record, "metrics.jsonl", ("epoch",))
    logged = [row for row in rows if "resources/wall_seconds" in row]
    if logged:
        end = _last_row(record)
        for prefix, suffix, heading, scale in _STACKS:
            # What adds up begins with nothing, and ends after the last step.
            ends = [end] if any(key.startswith(prefix) for key in end) else []
            yield _draw_stack([*([{"epoch": 0.0}] if ends else []), *logged, *ends], prefix, suffix, heading, scale)


def _last_row(record: Record) -> dict[str, Any]:
    """What adds up over a run, at its very end, by the names of metrics.jsonl."""
    cost, epochs = record.result["resources"], record.result.get("epochs")
    by_kind = {"flops": cost.get("flops_by_phase"), "seconds": cost.get("seconds")}
    return {"epoch": epochs} | {
        f"resources/{what}/{kind}": value
        for what, amounts in by_kind.items()
        if isinstance(amounts, dict) and isinstance(epochs, int | float)
        for kind, value in amounts.items()
    }


def read_rows(record: Record, file: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        ValueError: It cannot be read, or a row lacks something.
    """
    try:
        rows = RunFolder(record.path, writes=False).rows(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    for i, row in enumerate(rows, start=1):
        lacking = [key for key in needed if key not in row] if isinstance(row, dict) else list(needed)
        if lacking:
            raise ValueError(f"{file} cannot be read: row {i} has no {', '.join(lacking)}")
    return rows


def _draw_timeline(rows: Sequence[Mapping[str, Any]]) -> Chart:
    import plotly.graph_objects as go

    every = sorted({row["scoring"] for row in rows})
    scorings = _thin(every, _MOST_SCORINGS)
    epochs = {row["scoring"]: row["epoch"] for row in rows}
    depths = sorted({row["depth"] for row in rows})
    names = shorten({row["depth"]: row["unit"] for row in rows})
    by_place = {(row["depth"], row["scoring"]): row for row in rows}

    def look(depth: int, scoring: int, key: str) -> Any:
        return by_place.get((depth, scoring), {}).get(key)

    froze = [
        (scoring, depth)
        for depth in depths
        for before, scoring in zip([None, *every], every, strict=False)
        if look(depth, scoring, "frozen") and (before is None or not look(depth, before, "frozen"))
    ]
    labels = {scoring: f"{scoring} ({epochs[scoring]:.3g})" for scoring in every}
    has_scores = any(row["normalized_score"] is not None for row in rows)
    scores = [
        [
            look(depth, scoring, "normalized_score") if has_scores else float(bool(look(depth, scoring, "frozen")))
            for scoring in scorings
        ]
        for depth in depths
    ]
    figure = go.Figure()
    figure.add_heatmap(
        x=[labels[scoring] for scoring in scorings],
        y=[names[depth] for depth in depths],
        z=[_round(values) for values in scores],
        colorscale="Cividis",
        colorbar={"title": "score" if has_scores else "frozen"},
        hovertemplate="%{y}, scoring %{x}: %{z:.4g}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure.add_scatter(
        # In the column that is shown, of those left out the one before.
        x=[labels[scorings[bisect_right(scorings, scoring) - 1]] for scoring, _ in froze],
        y=[names[depth] for _, depth in froze],
        mode="markers",
        # Dark and bright cells are both below it.
        marker={"symbol": "star", "size": 14, "color": "#FFFFFF", "line": {"width": 1.5, "color": "#000000"}},
        name="freezes",
        text=[labels[scoring] for scoring, _ in froze],
        hovertemplate="%{y} freezes at scoring %{text}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": "scoring (epoch)", "type": "category"},
        yaxis={"title": "unit, from the input up", "type": "category"},
        showlegend=False,
    )
    some = "" if len(scorings) == len(every) else f" ({len(scorings)} of {len(every)}, at even distances)"
    note = f"A row for each unit, a column for each scoring{some}; a star where the unit froze."
    return Chart("What froze when", note, figure)


def _draw_scores(rows: Sequence[Mapping[str, Any]], *, has_threshold: bool) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    by_unit: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_unit.setdefault(row["depth"], []).append(row)
    lines = _thin(sorted(by_unit.items()), _MOST_LINES)
    names = shorten({depth: history[0]["unit"] for depth, history in lines})
    for depth, history in lines:
        found = _thin(history, min(_MOST_IN_LINE, _MOST_IN_CHART // len(lines)))
        figure.add_scatter(
            x=_round(row["epoch"] for row in found),
            y=_round(row["normalized_score"] for row in found),
            mode="lines+markers",
            name=names[depth],
            line={"color": _shade(depth / max(len(by_unit) - 1, 1))},
            hovertemplate="%{fullData.name}: %{y:.4g}<extra></extra>",
        )
    thresholds = {row["epoch"]: row["threshold"] for row in rows if row["threshold"] is not None}
    if thresholds and has_threshold:
        figure.add_scatter(
            x=_round(_thin(list(thresholds), _MOST_IN_LINE)),
            y=_round(_thin(list(thresholds.values()), _MOST_IN_LINE)),
            mode="lines",
            name="threshold",
            line={"dash": "dash", "width": 3, "color": COLOURS[1]},
        )
    positive = [row["normalized_score"] for row in rows if row["normalized_score"] and row["normalized_score"] > 0]
    wide = bool(positive) and max(positive) > 100 * min(positive)
    figure.update_layout(
        xaxis_title="epoch",
        yaxis={"title": "score, as compared", "type": "log" if wide else "linear"},
        legend_title="unit",
    )
    note = "A frozen unit keeps the score it froze with."
    if not has_threshold:
        return Chart("Scores", note, figure)
    return Chart("Scores and threshold", f"A unit whose score falls under the threshold freezes. {note}", figure)


def _draw_stack(rows: Sequence[Mapping[str, Any]], prefix: str, suffix: str, heading: str, scale: float) -> Chart:
    import plotly.graph_objects as go

    thinned = _thin(rows, _MOST_IN_LINE)
    keys = [key for key in rows[-1] if key.startswith(prefix) and key.endswith(suffix)]
    figure = go.Figure()
    largest = {key: max(row.get(key) or 0 for row in rows) for key in keys}
    shown = [key for key in sorted(keys, key=lambda key: -largest[key]) if largest[key]]
    # As many as there are colours to tell apart; what is small stands together.
    alone = shown if len(shown) <= len(COLOURS) else shown[: len(COLOURS) - 1]
    groups = [(key.removeprefix(prefix).removesuffix(suffix), [key]) for key in alone]
    if len(alone) < len(shown):
        groups.append(("the rest", shown[len(alone) :]))
    for i, (name, members) in enumerate(groups):
        figure.add_scatter(
            x=_round(row["epoch"] for row in thinned),
            y=_round(sum(row.get(key) or 0 for key in members) / scale for row in thinned),
            stackgroup="all",
            name=name,
            line={"width": 0.5, "color": colour_of(i)},
        )
    figure.update_layout(xaxis_title="epoch", yaxis_title=heading)
    return Chart(heading, "Stacked by kind.", figure)


def _thin(values: Sequence[_Value], most: int) -> Sequence[_Value]:
    """At most so many of the values, at even distances, the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def shorten(names: Mapping[int, str]) -> dict[int, str]:
    """Dotted names without what all of them begin with.

    >>> shorten({0: "encoder.layer.0", 1: "encoder.layer.1"})
    {0: '0', 1: '1'}
    """
    parts = {key: name.split(".") for key, name in names.items()}
    most = min((len(found) for found in parts.values()), default=1) - 1
    first = next(iter(parts.values()), [])
    num_shared = 0
    while num_shared < most and all(found[num_shared] == first[num_shared] for found in parts.values()):
        num_shared += 1
    return {key: ".".join(found[num_shared:]) for key, found in parts.items()}


def _round(values: Iterable[float | None]) -> list[float | None]:
    """To what can be seen in a chart."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def colour_of(i: int) -> str:
    """Colour of the i-th of several."""
    return COLOURS[i % len(COLOURS)]


def _shade(share: float) -> str:
    """From one end of Cividis to the other, without its darkest and lightest, which are lost on one of the two themes."""
    low, high = (58, 96, 138), (222, 190, 60)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high, strict=True))

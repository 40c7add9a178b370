"""What a comparison comes to, in plain words and figures."""

from __future__ import annotations

from collections.abc import Iterator

from safe_lab.ablation import Comparison, Verdict
from safe_lab.ablation.comparison import Row
from safe_lab.ablation.show import difference_of, format_difference, format_interval
from safe_lab.figures import format_figure

# What is said of a variant's costs, where it is known.
_COSTS = {
    "resources/memory_peak_bytes": "peak memory",
    "resources/memory_mean_bytes": "mean memory",
    "resources/flops": "FLOPs",
    "resources/wall_seconds": "time",
    "resources/joules": "energy",
}
_ORDER = (
    Verdict.BETTER,
    Verdict.NO_WORSE,
    Verdict.NO_DIFFERENCE_FOUND,
    Verdict.NOT_ENOUGH_SEEDS,
    Verdict.WORSE,
    Verdict.NO_RUNS,
)


def describe(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """A variant and a sentence for each but the baseline, the good ones first."""
    others = [row for row in comparison.rows if row.verdict != Verdict.BASELINE]
    for row in sorted(others, key=lambda row: _ORDER.index(row.verdict)):
        yield row.variant, _describe_row(row, comparison)
    if not others:
        for row in comparison.rows:
            cell = row.cells.get(comparison.rules.metric)
            if cell is not None:
                yield row.variant, f"{comparison.rules.metric} {format_figure(comparison.rules.metric, cell.mean)}"


def _describe_row(row: Row, comparison: Comparison) -> str:
    metric = comparison.rules.metric
    cell = row.cells.get(metric)
    if cell is None or cell.difference is None:
        return f"{row.verdict}: {row.reason}"
    found = cell.difference
    interval = format_interval(metric, found)
    seeds = f"{len(found.by_seed)} seed{'s' if len(found.by_seed) > 1 else ''}"
    said = (
        f"{row.verdict} than {comparison.baseline}"
        if row.verdict in (Verdict.BETTER, Verdict.WORSE)
        else str(row.verdict)
    )
    said += f" ({row.reason}): " if row.reason else ": "
    said += f"{metric} {format_difference(metric, found)}"
    said += f" ({interval}, {seeds})" if interval else f" ({seeds})"
    costs = [
        f"{name} {format_difference(figure, difference)}"
        for figure, name in _COSTS.items()
        if (difference := difference_of(row, figure)) is not None
    ]
    return said + ("; " + ", ".join(costs) if costs else "") + "."

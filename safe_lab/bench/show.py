"""A comparison for people and for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from safe_lab import run_folder
from safe_lab.bench.compare import Comparison, Spread
from safe_lab.bench.processes import FIGURES

# Unit a figure is shown in, its size, and the decimals.
_SHOWN = {
    "metric": ("", 1, 4),
    "wall_seconds": ("s", 1, 1),
    "cpu_seconds": ("s", 1, 1),
    "tokens_per_second": ("", 1, 0),
    "peak_bytes": ("MiB", 2**20, 1),
    "mean_bytes": ("MiB", 2**20, 1),
    "mean_activation_bytes": ("MiB", 2**20, 1),
    "peak_rss_bytes": ("MiB", 2**20, 0),
    "device_peak_bytes": ("MiB", 2**20, 0),
    "flops": ("TFLOP", 1e12, 3),
    "joules": ("", 1, 0),
    "train_loss": ("", 1, 4),
}


def to_json(comparison: Comparison) -> str:
    """The fields of :class:`~safe_lab.bench.compare.Comparison` as JSON; what is not finite is null."""
    return json.dumps(json.loads(run_folder.to_json(asdict(comparison))), indent=1, ensure_ascii=False)


def print_tables(comparison: Comparison, console: Console) -> None:
    """Medians, ratios to the baseline with their range, whether the loss curves are the same, and what failed."""
    shown = [
        figure
        for figure in FIGURES
        if any(_median(values[figure]) is not None for values in comparison.variants.values())
    ]
    names = [figure.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ") for figure in shown]
    units = [f", {_SHOWN[figure][0]}" if _SHOWN[figure][0] else "" for figure in shown]
    headings = [name + unit for name, unit in zip(names, units, strict=True)]
    medians = Table("variant", *headings, title="medians", title_justify="left")
    ratios = Table("variant", *names, title=f"ratio to {comparison.baseline}: median, range", title_justify="left")
    for name, values in comparison.variants.items():
        medians.add_row(name, *(_write(figure, _median(values[figure])) for figure in shown))
        if name != comparison.baseline:
            ratios.add_row(name, *(_write_ratio(comparison.ratios[name][figure]) for figure in shown))
    if shown:
        console.print(medians)
        console.print(ratios)
    for name, difference in comparison.metric_differences.items():
        if difference["low"] is not None:
            metrics = comparison.variants[name]["metric"], comparison.variants[comparison.baseline]["metric"]
            pairs = sum(None not in pair for pair in zip(*metrics, strict=True))
            console.print(
                f"metric of {name} less {comparison.baseline}'s: {difference['mean']:+.4f}, "
                f"95 % interval {difference['low']:+.4f} to {difference['high']:+.4f} ({pairs} repetitions)",
                highlight=False,
            )
    if comparison.loss_curve_difference is not None:
        console.print(
            f"loss curves of {comparison.baseline} and {', '.join(comparison.same_curve)}: "
            f"largest difference {comparison.loss_curve_difference:.1e}, in {comparison.num_loss_rows} logged rows"
        )
    for line in comparison.environment_differences:
        console.print(f"not the same for all: {line}", markup=False, highlight=False, soft_wrap=True)
    for failure in comparison.failures:
        title = f"{failure['variant']}, repetition {failure['repetition']}: {failure['failure']}"
        console.print(title, markup=False, highlight=False, soft_wrap=True)


def _write(figure: str, value: float | None) -> str:
    _, size, decimals = _SHOWN[figure]
    return "-" if value is None else f"{value / size:,.{decimals}f}"


def _write_ratio(ratio: Spread) -> str:
    if ratio["median"] is None:
        return "-"
    # On a line of its own: a dozen figures stand side by side.
    spread = "" if ratio["min"] == ratio["max"] else f"\n{ratio['min']:.3f}-{ratio['max']:.3f}"
    return f"{ratio['median']:.3f}{spread}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

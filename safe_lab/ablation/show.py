"""An experiment for people: a table that lives while it runs, and one of what came out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from safe_lab.ablation.comparison import Comparison, Row, Verdict
from safe_lab.ablation.experiment_file import Experiment
from safe_lab.ablation.running import Progress, Show, State
from safe_lab.ablation.words import describe_claims, describe_rules, difference_of, format_difference, format_interval
from safe_lab.figures import format_figure

_NUMBER = re.compile(r"[-+]?\d[\d.e+-]*")


@contextmanager
def live(experiment: Experiment, console: Console) -> Iterator[Show]:
    """Show how the runs of an experiment stand: a table on a terminal, a line for each change elsewhere."""
    runs = {run: Progress(*run) for run in experiment.runs}
    warned: set[str] = set()

    def warn(progress: Progress) -> None:
        """By the first run of each variant that says it: its others say the same, with other figures."""
        for warning in progress.warnings:
            kind = f"{progress.variant}: {_NUMBER.sub('', warning)}"
            if kind not in warned:
                warned.add(kind)
                _say(console, f"warning: {progress.variant}, seed {progress.seed}: {warning}")

    if not console.is_terminal:
        shown: dict[tuple[str, int], State] = {}

        def tell(progress: Progress) -> None:
            run = (progress.variant, progress.seed)
            runs[run] = progress
            warn(progress)
            if shown.get(run) != progress.state:
                shown[run] = progress.state
                _say(console, _describe(progress, experiment, runs.values()))

        yield tell
        return
    with Live(_board(experiment, runs), console=console, refresh_per_second=4) as table:

        def update(progress: Progress) -> None:
            runs[progress.variant, progress.seed] = progress
            table.update(_board(experiment, runs))
            warn(progress)
            if progress.note and progress.state in (State.RUNNING, State.FAILED):
                _say(console, _describe(progress, experiment, runs.values()))

        yield update


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What came out: each variant with its metric, its costs, and what can be said."""
    rules = comparison.rules
    figures = [figure for figure in rules.figures if any(figure in row.cells for row in comparison.rows)]
    table = Table("variant", title=f"against {escape(comparison.baseline)}", title_justify="left")
    table.add_column(rules.metric.replace("/", "\n"), justify="right")
    table.add_column("difference\n(interval)", justify="right")
    table.add_column("p\ncorrected", justify="right")
    for figure in figures:
        table.add_column(figure.removeprefix("resources/").replace("_bytes", "").replace("_", "\n"), justify="right")
    table.add_column("", ratio=1)
    for row in comparison.rows:
        table.add_row(*_cells(row, comparison, figures))
    console.print(table)
    for row in comparison.rows:
        for seed, fault in row.faults.items():
            _say(console, f"{row.variant}, seed {seed}, is not in it: {' '.join(fault.splitlines()[:2])}")
    for warning in comparison.warnings:
        _say(console, f"warning: {warning}")
    for line in describe_claims(comparison):
        _say(console, line)
    _say(console, describe_rules(comparison))


def _cells(row: Row, comparison: Comparison, figures: Sequence[str]) -> list[str]:
    metric = comparison.rules.metric
    cell, found = row.cells.get(metric), difference_of(row, metric)
    shown = [escape(row.variant)]
    if cell is None:
        shown.append("")
    else:
        around = "" if cell.spread is None else f" \N{PLUS-MINUS SIGN} {format_figure(metric, cell.spread)}"
        shown.append(f"{format_figure(metric, cell.mean)}{around}")
    shown.append(
        "" if found is None else f"{format_difference(metric, found)}\n{format_interval(metric, found)}".strip()
    )
    p = "" if found is None or found.p_corrected is None else f"{found.p_corrected:.2g}"
    shown.append(p if found is None or found.effect_size is None else f"{p}\ng = {found.effect_size:.2f}")
    for figure in figures:
        cell, found = row.cells.get(figure), difference_of(row, figure)
        value = "" if cell is None else format_figure(figure, cell.mean)
        shown.append(
            f"{value}\n{format_difference(figure, found)}" if found is not None and found.is_relative else value
        )
    said = "" if row.verdict == Verdict.BASELINE else f"{row.verdict}: {row.reason}"
    return [*shown, escape(said)]


def _board(experiment: Experiment, runs: dict[tuple[str, int], Progress]) -> Table:
    table = Table("variant", title=f"{escape(experiment.name)}: {escape(experiment.metric)}", title_justify="left")
    for seed in experiment.seeds:
        table.add_column(f"seed {seed}", justify="right")
    for variant in experiment.variants:
        table.add_row(escape(variant), *(_short(runs[variant, seed], experiment) for seed in experiment.seeds))
    return table


def _short(progress: Progress, experiment: Experiment) -> str:
    latest = progress.latest.get(experiment.metric)
    value = "" if latest is None else format_figure(experiment.metric, latest)
    if progress.state == State.RUNNING:
        return f"[cyan]epoch {progress.latest.get('epoch', 0):.3g} {value}[/]"
    colour = {State.WAITING: "dim", State.FAILED: "red"}.get(progress.state, "green")
    return f"[{colour}]{value or progress.state}[/]"


def _describe(progress: Progress, experiment: Experiment, runs: Sequence[Progress] | object) -> str:
    assert not isinstance(runs, str)
    ended = sum(run.state not in (State.WAITING, State.RUNNING) for run in runs)  # type: ignore[attr-defined]
    name = f"{progress.variant}, seed {progress.seed} ({ended}/{len(experiment.runs)})"
    latest = progress.latest.get(experiment.metric)
    if progress.state == State.RUNNING:
        return f"{name} begins" + (f", as {progress.note}" if progress.note else "")
    if progress.state == State.FAILED:
        return f"{name} failed: {' '.join(progress.note.splitlines()[:2])}"
    if progress.state == State.KEPT:
        return f"{name} was there"
    return f"{name} finished" + (
        "" if latest is None else f": {experiment.metric} {format_figure(experiment.metric, latest)}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)

"""An experiment for people: a table that lives while it runs, and one of what came out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from safe_lab.ablation.caveats import kind_of
from safe_lab.ablation.columns import Column, columns_of, tell, tell_test
from safe_lab.ablation.comparison import Comparison, Verdict
from safe_lab.ablation.experiment_file import Experiment
from safe_lab.ablation.running import Outlook, Progress, Show, State, foresee
from safe_lab.ablation.words import describe_claims, describe_rules
from safe_lab.figures import format_figure

_ENDLESS = 10_000
_NAME_WIDTH = 28


@contextmanager
def live(experiment: Experiment, console: Console) -> Iterator[Show]:
    """Show how the runs of an experiment stand: a table on a terminal, a line for each change elsewhere."""
    runs = {run: Progress(*run) for run in experiment.runs}
    warned: set[tuple[str, str]] = set()

    def warn(progress: Progress) -> None:
        """At once by the first run of each variant that says it, as hours of others may follow that come to nothing either."""
        new = [one for one in progress.warnings if (progress.variant, kind_of(one)) not in warned]
        warned.update((progress.variant, kind_of(one)) for one in new)
        for warning in new:
            _say(console, f"warning: {progress.variant}, seed {progress.seed}: {warning}")

    if not console.is_terminal:
        shown: dict[tuple[str, int], State] = {}

        def write(progress: Progress) -> None:
            run = (progress.variant, progress.seed)
            runs[run] = progress
            warn(progress)
            if shown.get(run) != progress.state:
                shown[run] = progress.state
                _say(console, _describe(progress, experiment, runs.values()))

        yield write
        return
    began = time.monotonic()
    with Live(_board(experiment, runs), console=console, refresh_per_second=4) as table:

        def update(progress: Progress) -> None:
            runs[progress.variant, progress.seed] = progress
            table.update(_board(experiment, runs, _say_left(runs.values(), time.monotonic() - began)))
            warn(progress)
            if progress.note and progress.state in (State.RUNNING, State.FAILED):
                _say(console, _describe(progress, experiment, runs.values()))

        yield update


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What came out: each variant with its metric, its costs, and what can be said; columns that do not fit are left out."""
    columns = columns_of(comparison)
    num_shown = len(columns)
    while num_shown > 1 and _width(_table(comparison, columns[:num_shown]), console) > console.width:
        num_shown -= 1
    console.print(_table(comparison, columns[:num_shown]))
    if num_shown < len(columns):
        _say(console, f"Not shown here: {', '.join(column.name for column in columns[num_shown:])}.")
    for row in comparison.rows:
        if row.verdict != Verdict.BASELINE:
            _say(console, f"{row.variant}: {row.verdict}" + (f" ({row.reason})" if row.reason else ""))
    for row in comparison.rows:
        for seed, fault in row.faults.items():
            _say(console, f"{row.variant}, seed {seed}, is not in it: {' '.join(fault.splitlines()[:2])}")
    for warning in comparison.warnings:
        _say(console, f"warning: {warning}")
    for line in describe_claims(comparison):
        _say(console, line)
    if rules := describe_rules(comparison):
        _say(console, rules)


def _width(table: Table, console: Console) -> int:
    """That of a table of which nothing is cut."""
    return Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum


def _table(comparison: Comparison, columns: Sequence[Column]) -> Table:
    title = f"against {escape(comparison.baseline)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    # Long names are those of a grid, and may differ by their last figure.
    table.add_column("variant", overflow="fold", max_width=_NAME_WIDTH)
    for i, column in enumerate(columns):
        table.add_column(escape(column.heading).replace(", ", "\n").replace(" ", "\n"), justify="right", no_wrap=True)
        if i == 0:
            table.add_column("p\ncorrected", justify="right", no_wrap=True)
    for row in comparison.rows:
        shown = [escape(row.variant)]
        for i, column in enumerate(columns):
            told = tell(comparison, row, column)
            # Of the metric everything, of the others what can be taken in at a glance.
            first = f"{told.value} {told.spread}".strip() if i == 0 else told.value
            shown.append("\n".join(filter(None, (first, told.difference, told.interval if i == 0 else ""))))
            if i == 0:
                shown.append("\n".join(filter(None, tell_test(comparison, row))))
        table.add_row(*shown)
    return table


def tell_outlook(experiment: Experiment) -> list[dict[str, Any]]:
    """What training the experiment would do, as plain values: ``variant``, ``seed``, ``outlook`` and ``why``."""
    return [
        {"variant": variant, "seed": seed, "outlook": what.value, "why": why}
        for (variant, seed), what, why in foresee(experiment)
    ]


def print_outlook(experiment: Experiment, console: Console) -> None:
    """What training the experiment would do: how many runs are kept, and which are not."""
    outlook = foresee(experiment)
    for (variant, seed), what, why in outlook:
        if what != Outlook.KEPT:
            _say(console, f"{variant}, seed {seed}: {what}" + (f": {why}" if why else ""))
    numbers = Counter(what for _, what, _ in outlook)
    _say(
        console,
        f"{len(outlook)} runs in {experiment.folder}: " + ", ".join(f"{n} {what}" for what, n in numbers.items()),
    )
    others = sorted(
        str(path.relative_to(experiment.folder))
        for path in experiment.folder.glob("*/seed-*/")
        if (path.parent.name, path.name) not in {(variant, f"seed-{seed}") for variant, seed in experiment.runs}
    )
    if others:
        _say(console, f"left alone, as the file does not name them: {', '.join(others)}")


def _say_left(runs: Iterable[Progress], seconds: float) -> str:
    """About how long it takes yet, at the pace so far; empty as long as nothing tells."""
    states = Counter(run.state for run in runs)
    ended = states[State.FINISHED] + states[State.FAILED]
    left = states[State.WAITING] + states[State.RUNNING]
    return f", some {math.ceil(seconds / ended * left / 60)} min left" if ended and left else ""


def _board(experiment: Experiment, runs: dict[tuple[str, int], Progress], left: str = "") -> Table:
    title = f"{escape(experiment.name)}: {escape(experiment.metric)}{left}"
    table = Table("variant", title=title, title_justify="left")
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
    return f"{name} {'was there' if progress.state == State.KEPT else 'finished'}" + (
        "" if latest is None else f": {experiment.metric} {format_figure(experiment.metric, latest)}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)

"""A replay for people, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from safe_lab.figures import format_figure
from safe_lab.replay.costs import read_truth
from safe_lab.replay.replaying import Comparison, Replay
from safe_lab.run_folder import differences


def print_tables(replayed: Replay, comparisons: Sequence[Comparison], console: Console) -> None:
    """What would have frozen when, what that would have cost beside what the run did, and how far such figures are off."""
    recording = replayed.recording
    changes = differences(recording.config, replayed.config)
    _say(console, f"{recording.path}: " + ("; ".join(changes) if changes else "its own schedule"))
    if replayed.without_effect:
        policy = replayed.config.freezing.policy
        _say(console, f"without effect, as policy {policy} does not ask for it: {', '.join(replayed.without_effect)}")
    console.print(_timeline(replayed))
    if replayed.history.stale_share:
        _say(
            console,
            f"{replayed.history.stale_share:.0%} of the scores are of an earlier scoring, as their units were frozen in the run; "
            "a run with policy safe and final_threshold 0 records them all",
        )
    if replayed.no_forecast:
        _say(console, f"What it would have cost cannot be told: {replayed.no_forecast}")
    else:
        console.print(_costs(replayed))
    for line in describe_accuracy(comparisons):
        _say(console, line)


def describe_accuracy(comparisons: Sequence[Comparison]) -> list[str]:
    """How far replays were from runs that were trained so, in sentences."""
    if not comparisons:
        return [
            "How far this is from the truth was not measured: no run beside this one was trained with another schedule "
            "(--against RUN names one elsewhere)."
        ]
    lines = [f"Held against the runs that were trained with other schedules: {len(comparisons)}."]
    scored = [c for c in comparisons if c.by_scores and c.unit_scorings]
    if scored:
        right, total = sum(c.right for c in scored), sum(c.unit_scorings for c in scored)
        at_once, froze = sum(c.at_once for c in scored), sum(c.froze for c in scored)
        lines.append(
            f"Where the schedule goes by scores ({len(scored)} of them), {right / total:.1%} of {total} unit-scorings are right; "
            f"of {froze} units that froze, {at_once} did so at the same scoring."
        )
    named = {
        "mean memory": "resources/memory_mean_bytes",
        "peak": "resources/memory_peak_bytes",
        "FLOPs": "resources/flops",
        "seconds": "resources/wall_seconds",
    }
    figures = [
        f"{name} {fmean(errors):.1%} (at worst {max(errors):.1%})"
        for name, key in named.items()
        if (errors := [abs(c.errors[key]) for c in comparisons if key in c.errors])
    ]
    return [*lines, "Off by, on average: " + ", ".join(figures) + "."] if figures else lines


def _timeline(replayed: Replay) -> Table:
    table = Table(title="what would have frozen when", title_justify="left")
    for heading in ("scoring", "epoch", "threshold"):
        table.add_column(heading, justify="right")
    table.add_column("froze, by place from the input")
    table.add_column("frozen", justify="right")
    table.add_column("depth", justify="right")
    num_units = replayed.history.num_units
    for t, moment in enumerate(replayed.history.moments, start=1):
        depth = next((unit for unit in range(num_units) if unit not in moment.frozen), num_units)
        table.add_row(
            str(t),
            f"{moment.epoch:.4g}",
            "" if moment.level is None else f"{moment.level:.4g}",
            ", ".join(f"{unit}{' (stale)' if unit in moment.stale else ''}" for unit in moment.froze),
            f"{len(moment.frozen)} of {num_units}",
            str(depth),
        )
    return table


def _costs(replayed: Replay) -> Table:
    was = read_truth(replayed.recording)
    table = Table(title="what it would have cost", title_justify="left")
    for heading in ("", "this run", "replay", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, value in replayed.forecast.items():
        if name.startswith("frozen"):
            continue
        shown = [format_figure(name, figure) for figure in (was[name], value)]
        table.add_row(escape(name), *shown, f"{value / was[name] - 1:+.1%}" if was[name] else "")
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)

"""What the person sees: a progress bar, a line at each freeze event, a table at the end.

On a terminal the bar moves; in a log file a line is written for each epoch. :class:`Console` with ``quiet`` shows nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from safe_lab import tracking
from safe_lab.byte_size import format_bytes
from safe_lab.freezing import Freezer, Scoring
from safe_lab.gauging import VALIDATION
from safe_lab.resources import TRAINING as TRAINING_ACTIVITIES
from safe_lab.sharpness import summarize
from safe_lab.sharpness.gauge import TRAINING
from safe_lab.units import Unit

# Loggers of what may go wrong on one process of several.
_OF_ONE_PROCESS = ("safe_lab.prefix.cache", "safe_lab.trainer")
# Share of padding from which a run points out what can be done about it.
_MUCH_PADDING = 0.25


class Console:
    """The terminal of one run."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to standard error, or nothing at all."""
        self.rich = RichConsole(stderr=True, quiet=quiet)
        if not self.rich.is_terminal:
            self.rich = RichConsole(stderr=True, quiet=quiet, width=140)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.rich,
            disable=quiet or not self.rich.is_terminal,
        )
        self._task: TaskID | None = None
        self._loss = ""

    def say(self, line: str) -> None:
        """One line, as it is."""
        self.rich.print(escape(line), highlight=False, soft_wrap=True)

    def start(self, num_steps: int, step: int) -> None:
        """Begin at ``step``."""
        self._progress.start()
        self._task = self._progress.add_task("training", total=num_steps, completed=step)

    def advance(self, step: int, freezer: Freezer) -> None:
        """An optimizer step was done."""
        if self._task is not None and not self._progress.disable:
            state = f"threshold {_number(freezer.level)} frozen {freezer.frozen_share:.0%} depth {freezer.frozen_depth}"
            self._progress.update(self._task, completed=step, description=f"{self._loss}{state}")

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row of metrics was written."""
        self._loss = f"loss {row[tracking.LOSS]:.4f} "

    def evaluated(self, epoch: float, metrics: Mapping[str, float]) -> None:
        """An evaluation was made."""
        self.say(
            f"epoch {epoch:5.2f}  {self._loss} " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )

    def scored(self, scoring: Scoring, units: Sequence[Unit], epoch: float, effect: Mapping[str, int | None]) -> None:
        """A scoring was made; if something froze, a line about that, and one about what it is turned into."""
        if not scoring.froze:
            return
        froze = ", ".join(
            units[i].name + ("" if scoring.normalized is None else f" ({scoring.normalized[i]:.3g})")
            for i in scoring.froze
        )
        self.say(
            f"epoch {epoch:5.2f}  freeze at threshold {_number(scoring.level)}: {froze}; "
            f"frozen share {scoring.frozen_share:.0%}, frozen depth {scoring.frozen_depth} of {len(units)}"
        )
        turned_into = _describe(effect)
        if turned_into:
            self.say(f"             {turned_into}")

    def measured(self, epoch: float, sharpness: Mapping[str, float]) -> None:
        """The sharpness was measured."""
        self.say(f"epoch {epoch:5.2f}  sharpness: " + describe_sharpness(sharpness))

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def summarize(self, result: Mapping[str, Any], folder: Path) -> None:
        """The tables at the end, and where the files are."""
        title = f"task metrics after step {result['selected_step']} of {result['steps']}"
        metrics = Table("metric", "value", title=title, title_justify="left")
        for name, value in result["metrics"].items():
            metrics.add_row(name, f"{value:.4f}")
        for name, value in result["baselines"].items():
            metrics.add_row(f"baseline: {name}", f"{value:.4f}")
        self.rich.print(metrics)
        if not result["timeline"]:
            self._finish(result, folder)
            return
        adapters = Table(
            "depth",
            "adapter",
            "first score",
            "last score",
            "last compared",
            "frozen at epoch",
            "threshold then",
            title="adapters",
            title_justify="left",
        )
        for adapter in result["adapters"]:
            adapters.add_row(
                str(adapter["depth"]),
                escape(adapter["unit"]),
                _number(adapter["first_score"]),
                _number(adapter["last_score"]),
                _number(adapter["normalized_score"]),
                _number(adapter["frozen_at_epoch"]),
                _number(adapter["threshold"]),
            )
        self.rich.print(adapters)
        timeline = Table(
            "scoring",
            "epoch",
            "threshold",
            "frozen share",
            "frozen depth",
            title="freezing over time",
            title_justify="left",
        )
        for scoring in result["timeline"]:
            timeline.add_row(
                str(scoring["scoring"]),
                _number(scoring["epoch"]),
                _number(scoring["threshold"]),
                f"{scoring['frozen_share']:.0%}",
                str(scoring["frozen_depth"]),
            )
        self.rich.print(timeline)
        self._finish(result, folder)

    def _finish(self, result: Mapping[str, Any], folder: Path) -> None:
        self._show_resources(result["resources"], result["tokens"], result["processes"])
        if result["unfrozen_forecast"]:
            self._show_savings(result["resources"], result["unfrozen_forecast"])
        if result["sharpness"] is not None:
            self.show_sharpness({"": result["sharpness"]})
        self.say(f"files: {folder}  (adapter for PEFT: {folder / 'adapter'})")

    def show_sharpness(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """A table of the single numbers of one run or several, over the training sample and the validation sample."""
        columns = {
            (run, sample): summarize(figures if sample == TRAINING else figures[sample])
            for run, figures in runs.items()
            for sample in (TRAINING, VALIDATION)
            if sample == TRAINING or sample in figures
        }
        table = Table("", title="sharpness", title_justify="left")
        for run, sample in columns:
            table.add_column(escape(f"{run} {sample}".strip()), justify="right")
        for name in dict.fromkeys(name for values in columns.values() for name in values):
            if not name.endswith(("_standard_error", "_converged")):
                mark = " *" if "adaptive" in name or name == "effective_weight_trace" else ""
                label = name.replace("_", " ") + mark
                table.add_row(label, *(_with_error(values, name) for values in columns.values()))
        self.rich.print(table)
        self.say("* does not change with LoRA's rescaling B -> cB, A -> A/c  ! not within sharpness.tolerance")
        for run, figures in runs.items():
            left_out = [*figures["left_out"], *figures.get(VALIDATION, {}).get("left_out", ())]
            if left_out:
                self.say(f"{run} the budget ended before: {', '.join(left_out)}".strip())

    def _show_resources(self, resources: Mapping[str, Any], num_tokens: int, processes: Mapping[str, Any]) -> None:
        memory = Table("live memory", "at the peak", "mean over the run", title="resources", title_justify="left")
        for kind, peak in resources["memory_peak_by_kind"].items():
            mean = resources["memory_mean_by_kind"][kind]
            if peak or mean:
                memory.add_row(kind, format_bytes(peak), format_bytes(mean))
        memory.add_section()
        memory.add_row(
            f"all (peak in {resources['memory_peak_in']})",
            format_bytes(resources["memory_peak_bytes"]),
            format_bytes(resources["memory_mean_bytes"]),
        )
        self.rich.print(memory)
        costs = Table("activity", "TFLOP", "seconds", "of the time")
        flops, seconds, wall = resources["flops_by_phase"], resources["seconds"], resources["wall_seconds"]
        for activity, spent in seconds.items():
            if spent or flops.get(activity):
                costs.add_row(activity, _tera(flops.get(activity)), f"{spent:.2f}", f"{spent / wall:.1%}")
        costs.add_section()
        costs.add_row("all", _tera(resources["flops"]), f"{wall:.2f}", "")
        self.rich.print(costs)
        joules = resources["joules"]
        energy = "no energy meter" if joules is None else f"{joules:.0f} J"
        traced, scaled = resources["traced_micro_steps"], resources["scaled_micro_steps"]
        if processes["count"] > 1:
            self.say(f"of {processes['count']} processes: bytes of each, FLOPs of all, seconds of the first")
        if processes["unaccounted"]:
            self.say(
                f"what {processes['unaccounted']} more cost, which trained before the run was resumed, is in no figure here"
            )
        else:
            padding = 1 - num_tokens / resources["tokens_computed"]
            hint = "; savings.trim_padding cuts it" if padding > _MUCH_PADDING else ""
            self.say(f"{padding:.0%} of what was computed in training is padding{hint}")
        self.say(
            f"{resources['tokens_per_second']:.0f} tokens/s; {energy}; bytes and FLOPs traced on {traced} of "
            f"{traced + scaled} micro-steps, scaled on the others"
        )

    def _show_savings(self, resources: Mapping[str, Any], forecast: Mapping[str, Any]) -> None:
        """What the run cost beside what it would have, had nothing frozen."""
        flops, seconds = resources["flops_by_phase"], resources["seconds"]
        spent = {
            "TFLOP": (resources["flops"] / 1e12, forecast["flops"] / 1e12, "{:.4g}"),
            "seconds": (
                sum(seconds[activity] for activity in (*TRAINING_ACTIVITIES, "evaluation", "scoring", "freezing")),
                forecast["seconds"],
                "{:.1f}",
            ),
            "mean activations, MiB": (
                resources["memory_mean_by_kind"]["activations"] / 2**20,
                forecast["activations_mean_bytes"] / 2**20,
                "{:.1f}",
            ),
            "mean live MiB": (resources["memory_mean_bytes"] / 2**20, forecast["memory_mean_bytes"] / 2**20, "{:.1f}"),
            "peak live MiB": (resources["memory_peak_bytes"] / 2**20, forecast["memory_peak_bytes"] / 2**20, "{:.1f}"),
        }
        table = Table("", "this run", "unfrozen, forecast", "saved", title="savings", title_justify="left")
        for name, (ours, unfrozen, form) in spent.items():
            table.add_row(
                name, form.format(ours), form.format(unfrozen), f"{1 - ours / unfrozen:.1%}" if unfrozen else "-"
            )
        self.rich.print(table)
        self.say(
            "The forecast is the part of the run before the first freeze event, carried on to the end, at its seconds a FLOP: on "
            "a busy machine trust the FLOPs. memory.budget and savings.trim_padding are on both sides; scoring, and what ran for "
            f"the cache or in its place ({flops['scoring'] / 1e12:.3g} and {flops['cache'] / 1e12:.3g} TFLOP), on this run's."
        )


def describe_sharpness(figures: Mapping[str, float]) -> str:
    """Its single numbers in one line, those with an error with that."""
    names = (name for name in figures if not name.endswith(("_standard_error", "_converged")))
    return ", ".join(f"{name.replace('_', ' ')} {_with_error(figures, name)}" for name in names)


def _describe(effect: Mapping[str, int | None]) -> str:
    """What freezing is turned into, in a sentence; empty if into nothing."""
    parts = []
    if effect["folded_layers"]:
        parts.append(f"{effect['folded_layers']} adapter layers folded")
    if effect["prefix_depth"]:
        parts.append(f"{effect['prefix_depth']} layers skipped")
    if effect["cached_examples"]:
        size = format_bytes(effect["cache_bytes"] or 0)
        parts.append(f"{effect['cached_examples']} examples cached behind layer {effect['cached_depth']} ({size})")
    if effect["micro_batch_rows"]:
        parts.append(f"micro-batches of {effect['micro_batch_rows']} rows or more")
    return ", ".join(parts)


def log_to(console: Console, *, rank: int = 0) -> None:
    """Show warnings of safe_lab, on the console without tearing the progress bar.

    Args:
        console: Quiet or not.
        rank: Number of this process among those of the run; of all but 0 only what they alone may have met is shown.
    """
    logger = logging.getLogger("safe_lab")
    logger.propagate = False
    if rank:
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"process {rank}: %(levelname)s %(message)s"))
        handler.addFilter(lambda record: record.name in _OF_ONE_PROCESS)
    else:
        shown = RichConsole(stderr=True, width=console.rich.width) if console.rich.quiet else console.rich
        handler = RichHandler(console=shown, show_time=False, show_path=False, markup=False)
    logger.handlers = [handler]


def _with_error(figures: Mapping[str, float], name: str) -> str:
    error = figures.get(f"{name}_standard_error")
    mark = "" if figures.get(f"{name}_converged", True) else " !"
    return _number(figures.get(name)) + ("" if not error else f" \N{PLUS-MINUS SIGN} {error:.2g}") + mark


def _tera(flops: int | None) -> str:
    return "-" if not flops else f"{flops / 1e12:.4g}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

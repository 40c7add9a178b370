"""What a study came to: the best trial or the Pareto front, as a table, as JSON, and as YAML files that train it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from safe_lab import config as configuration
from safe_lab import yaml_core
from safe_lab.figures import format_figure
from safe_lab.run_folder import RunFolder
from safe_lab.sweep import roster as stored
from safe_lab.sweep.roster import Roster, root_of
from safe_lab.sweep.study_file import Constraint, StudyFile

# Shares below this are not printed.
_SHOWN = 0.01


@dataclass(frozen=True)
class Outcome:
    """A study as it stands.

    Attributes:
        study_file: What was searched.
        roster: Its trials.
        importance: Share of each key in what makes a trial good, by objective.
    """

    study_file: StudyFile
    roster: Roster
    importance: Mapping[str, Mapping[str, float]]

    @cached_property
    def front(self) -> list[FrozenTrial]:
        """Trials that keep the constraints, and that none of these is better than in one objective and no worse in the others.

        Of one objective it is the best trial, and of equals the first.
        """
        signs = [-1 if direction == "maximize" else 1 for direction in self.study_file.objectives.values()]
        solutions = [
            (trial, [sign * value for sign, value in zip(signs, trial.values, strict=True)])
            for trial in self.roster.of_state(TrialState.COMPLETE)
            if keeps_constraints(trial) and stored.SAME_AS not in trial.user_attrs
        ]
        found = [
            (trial, losses)
            for trial, losses in solutions
            if not any(_dominates(other, losses) for _, other in solutions)
        ]
        in_order = [trial for trial, _ in sorted(found, key=lambda entry: (entry[1], root_of(entry[0])))]
        # Two workers may have trained one point at a time.
        front = [
            trial for i, trial in enumerate(in_order) if all(trial.params != other.params for other in in_order[:i])
        ]
        return front[:1] if len(signs) == 1 else front

    @cached_property
    def nearest(self) -> FrozenTrial | None:
        """Where trials have ended and none is a solution, the one that breaks the constraints by the smallest shares of them."""
        known = [
            trial for trial in self.roster.finished if len(self.constrained(trial)) == len(self.study_file.constraints)
        ]
        if self.front or not known or not self.study_file.constraints:
            return None
        return min(known, key=self._excess_share)

    def constrained(self, trial: FrozenTrial) -> dict[Constraint, float]:
        """The figures that are to keep constraints: means over a trial's seeds, or, where it was turned away, the forecast."""
        by_figure, forecast = trial.user_attrs.get(stored.BY_SEED, {}), trial.user_attrs.get(stored.FORECAST, {})
        if stored.TURNED_AWAY in trial.user_attrs:
            return {one: forecast[one.text] for one in self.study_file.constraints if one.text in forecast}
        return {one: fmean(by_figure[one.figure]) for one in self.study_file.constraints if one.figure in by_figure}

    def _excess_share(self, trial: FrozenTrial) -> float:
        return sum(
            max(constraint.excess(value), 0.0) / (abs(constraint.bound) or 1.0)
            for constraint, value in self.constrained(trial).items()
        )

    @property
    def known_points(self) -> list[FrozenTrial]:
        """Complete trials of points that the study file names, or those that had been trained there before."""
        complete = self.roster.of_state(TrialState.COMPLETE)
        named = [trial for trial in complete if stored.KNOWN in trial.user_attrs]
        roots = {trial.user_attrs.get(stored.SAME_AS, root_of(trial)) for trial in named}
        return [trial for trial in complete if root_of(trial) in roots and stored.SAME_AS not in trial.user_attrs]

    @property
    def all_failed(self) -> bool:
        """Whether trials have ended, and every one of them without a result."""
        finished = self.roster.finished
        return bool(finished) and all(trial.state == TrialState.FAIL for trial in finished)

    def values_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial was given, by dotted key."""
        return self.study_file.space.read(trial.params)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        roster = self.roster
        return {
            "study": self.study_file.settings.name,
            "complete": len(roster.of_state(TrialState.COMPLETE)),
            "pruned": len(roster.of_state(TrialState.PRUNED)),
            "failed": len(roster.of_state(TrialState.FAIL)),
            "open": len(roster.open),
            "taken_up": roster.num_taken_up,
            "front": [self._entry(trial) for trial in self.front],
            "nearest": None if self.nearest is None else root_of(self.nearest),
            "trials": [self._describe(trial) for trial in self.roster.finished],
            "turned_away": {
                str(root_of(trial)): trial.user_attrs[stored.TURNED_AWAY]
                for trial in roster.of_state(TrialState.PRUNED)
                if stored.TURNED_AWAY in trial.user_attrs
            },
            "forecast_errors": {
                constraint.text: errors
                for constraint in self.study_file.constraints
                if (errors := self.roster.forecast_errors(constraint))
            },
            "importance": {name: dict(shares) for name, shares in self.importance.items()},
            "failures": {
                str(root_of(trial)): trial.user_attrs.get(stored.FAILURE, "")
                for trial in roster.of_state(TrialState.FAIL)
            },
        }

    def _describe(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial that has ended, on the front or not."""
        attributes, is_complete = trial.user_attrs, trial.state == TrialState.COMPLETE
        forecast = attributes.get(stored.FORECAST)
        found = self.constrained(trial)
        return {
            "trial": root_of(trial),
            "state": trial.state.name.lower(),
            "reason": attributes.get(stored.FAILURE) or attributes.get(stored.TURNED_AWAY),
            # Of a pruned trial Optuna keeps the last report, which is not the figure at the end.
            "values": dict(zip(self.study_file.objectives, trial.values, strict=True)) if is_complete else None,
            "constraints": {
                constraint.text: {
                    "value": found.get(constraint) if is_complete else None,
                    "forecast": None if forecast is None else forecast.get(constraint.text),
                    "is_kept": constraint.excess(found[constraint]) <= 0 if constraint in found else None,
                }
                for constraint in self.study_file.constraints
            },
            "same_as": attributes.get(stored.SAME_AS),
            "killed": attributes.get(stored.KILLED, 0),
            "forecast_from": attributes.get(stored.FORECAST_FROM) or None,
            "no_forecast": attributes.get(stored.NO_FORECAST) or None,
            "settings": self.values_of(trial),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial that has ended: its number and state, its objectives, whether it is on the front, its settings."""
        front = {trial.number for trial in self.front}
        objectives = list(self.study_file.objectives)
        keys = [parameter.key for parameter in self.study_file.space.parameters]
        rows = []
        for trial in self.roster.finished:
            # Of a pruned trial Optuna keeps the last report, which is not the figure at the end.
            found = trial.values if trial.state == TrialState.COMPLETE else [None] * len(objectives)
            settings = self.values_of(trial)
            rows.append(
                {
                    "trial": root_of(trial),
                    "state": trial.state.name.lower(),
                    **dict(zip(objectives, found, strict=True)),
                    "on_front": trial.number in front,
                    **{key: settings.get(key) for key in keys},
                }
            )
        return rows

    def _entry(self, trial: FrozenTrial) -> dict[str, Any]:
        return {
            "trial": root_of(trial),
            "values": dict(zip(self.study_file.objectives, trial.values, strict=True)),
            "spread": trial.user_attrs.get(stored.SPREAD),
            "by_seed": trial.user_attrs.get(stored.BY_SEED),
            "settings": self.values_of(trial),
            "folder": str(self.study_file.config_of(root_of(trial), {}, 0).run_folder.parent),
        }

    def _say_threads(self, trial: FrozenTrial) -> str:
        """With how many threads a trial was trained, by which its last bits hang."""
        folder = self.study_file.folder_of(root_of(trial))
        try:
            found = json.loads((folder / f"seed-{self.study_file.settings.seeds[0]}" / "environment.json").read_text())
            return f"# It was trained with OMP_NUM_THREADS={found['threads']}; with another number the last bits may differ.\n"
        except (OSError, ValueError, KeyError, TypeError):
            # It was trained on another machine.
            return ""

    def export(self, folder: Path) -> list[Path]:
        """Write each point of the front as a YAML file that trains it again, to the same bits on the same machine.

        Its runs go to ``<output_dir>/<study>-front/trial-<n>/``; with several seeds the file is of the first of them.
        """
        files, written = RunFolder(folder), []
        head = f"# Study {self.study_file.settings.name}, trial "
        seeds = self.study_file.settings.seeds
        for trial in self.front:
            config = self.study_file.config_of(root_of(trial), self.values_of(trial), seeds[0])
            config = config.model_copy(update={"name": f"{config.name}-front"})
            named = zip(self.study_file.objectives, trial.values, strict=True)
            found = ", ".join(f"{name} {value:.6g}" for name, value in named)
            of = f" (means over seeds {', '.join(map(str, seeds))})" if len(seeds) > 1 else ""
            file = f"trial-{root_of(trial):04d}.yaml"
            files.write(
                file,
                f"{head}{root_of(trial)}: {found}{of}.\n{self._say_threads(trial)}" + configuration.dump(config),
            )
            written.append(folder / file)
        # Those of an earlier export that have been beaten since.
        for other in set(folder.glob("trial-*.yaml")) - set(written):
            if other.read_text(encoding="utf-8").startswith(head):
                other.unlink()
        return written


def keeps_constraints(trial: FrozenTrial) -> bool:
    """Whether a trial counts as a solution."""
    return all(excess <= 0 for excess in trial.constraints.values())


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return first != second and all(ours <= theirs for ours, theirs in zip(first, second, strict=True))


def print_tables(outcome: Outcome, console: Console) -> None:
    """The best trial or the front, and how the trials ended."""
    objectives = outcome.study_file.objectives
    title = "best trial" if len(objectives) == 1 else "Pareto front"
    table = Table("trial", title=f"{outcome.study_file.settings.name}: {title}", title_justify="left")
    for name, direction in objectives.items():
        group, _, figure = name.rpartition("/")
        table.add_column("\n".join(filter(None, (group, escape(figure), f"({direction})"))), justify="right")
    bounds = [one for one in outcome.study_file.constraints if one.figure not in objectives]
    for constraint in bounds:
        group, _, figure = constraint.figure.rpartition("/")
        table.add_column(
            "\n".join(filter(None, (group, escape(figure), f"({constraint.describe_bound()})"))), justify="right"
        )
    keys = [parameter.key for parameter in outcome.study_file.space.parameters]
    # The name of a section that all keys are of is said once.
    sections = {key.partition(".")[0] for key in keys}
    section = f"{sections.pop()}." if len(sections) == 1 else ""
    table.add_column(f"settings ({section}...)" if section else "settings", ratio=1)
    on_front = {trial.number for trial in outcome.front}
    beside = [trial for trial in outcome.known_points if trial.number not in on_front]
    for trial in [*outcome.front, *beside]:
        values, found = outcome.values_of(trial), outcome.constrained(trial)
        settings = ", ".join(f"{key.removeprefix(section)} {_plain(value)}" for key, value in values.items())
        kept = [format_figure(one.figure, found[one]) for one in bounds]
        number, style = (f"{root_of(trial)}", None) if trial.number in on_front else (f"{root_of(trial)}, known", "dim")
        table.add_row(number, *_numbers(trial, objectives), *kept, settings, style=style)
    if outcome.front or beside:
        console.print(table)
    if not outcome.front and outcome.roster.finished:
        _print_nearest(outcome, console)
    for name, shares in outcome.importance.items():
        if shares:
            listed = ", ".join(f"{key} {share:.0%}" for key, share in shares.items() if share >= _SHOWN)
            told = len(
                [
                    trial
                    for trial in outcome.roster.of_state(TrialState.COMPLETE)
                    if stored.SAME_AS not in trial.user_attrs
                ]
            )
            console.print(
                f"a good {name} hangs on (as far as {told} trials tell) {listed}", markup=False, highlight=False
            )
    counts = outcome.to_dict()
    line = f"{counts['complete']} complete, {counts['pruned']} pruned, {counts['failed']} failed"
    if counts["taken_up"]:
        line += f", {counts['taken_up']} taken up from a worker that was gone"
    if counts["open"]:
        line += f", {counts['open']} not ended"
    again = sum(trial["same_as"] is not None for trial in counts["trials"])
    if again:
        line += f"; {again} of the complete came to a point that had been trained, and took its figures"
    line = f"trials: {line}"
    console.print(line, highlight=False)
    if counts["turned_away"]:
        console.print(
            f"not trained, as they would break a constraint: {len(counts['turned_away'])} of the pruned",
            highlight=False,
        )
    for text, errors in counts["forecast_errors"].items():
        mean, worst = fmean(map(abs, errors)), max(map(abs, errors))
        line = (
            f"forecasts for {text} were off by {mean:.1%}, {worst:.1%} at worst (trainings to tell by: {len(errors)})"
        )
        console.print(line, markup=False, highlight=False)
    broken = sum(not keeps_constraints(trial) for trial in outcome.roster.of_state(TrialState.COMPLETE))
    if broken:
        console.print(f"trained, and a constraint is broken: {broken} of the complete", highlight=False)
    for number, reason in counts["failures"].items():
        console.print(f"trial {number} failed: {' '.join(reason.splitlines()[:2])}", markup=False, highlight=False)


def _print_nearest(outcome: Outcome, console: Console) -> None:
    name, nearest = outcome.study_file.settings.name, outcome.nearest
    if not outcome.study_file.constraints:
        console.print(f"{name}: no trial is complete", highlight=False)
        return
    trained = outcome.roster.of_state(TrialState.COMPLETE)
    said = "no trial that was trained keeps the constraints" if trained else "no trial is complete"
    console.print(f"{name}: {said}", highlight=False)
    if nearest is None:
        return
    figures = ", ".join(
        f"{constraint.figure} {format_figure(constraint.figure, value)} ({constraint.describe_bound()} is asked for)"
        for constraint, value in outcome.constrained(nearest).items()
    )
    forecast = " by its forecast" if stored.TURNED_AWAY in nearest.user_attrs else ""
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in outcome.values_of(nearest).items())
    console.print(
        f"nearest is trial {root_of(nearest)}{forecast}: {figures}; {settings}", highlight=False, soft_wrap=True
    )


def _numbers(trial: FrozenTrial, objectives: Mapping[str, str]) -> list[str]:
    spread = trial.user_attrs.get(stored.SPREAD) or {}
    return [
        format_figure(name, value)
        + (f" \N{PLUS-MINUS SIGN} {format_figure(name, spread[name])}" if name in spread else "")
        for name, value in zip(objectives, trial.values, strict=True)
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(yaml_core.write(value, flow=True).removesuffix("...\n").strip())

"""Who has which trial, and what is left to do: read off the trials of a study as they stand in its storage.

Optuna counts trials; here *entries* are counted. An entry is what a trial set out to find, and stays the same entry when the
trial's worker dies and another trial takes it up. So that every worker on every machine comes to the same view without asking
another, everything hangs on what is stored with the trials:

``cut_off``
    The trial was left by a dead worker, which whoever noticed has said here before it marked the trial as failed.
``ticket``
    What a trial stands for that must be there once: a known point, or the taking up of trial n. Two workers may add the same one
    at the same moment; the one with the lower number counts, and the other is void.
``known``
    Its point is one that the study file names.
``root``
    Number of the first trial of its entry, after which the run folders are named.
``deaths``, ``reached``
    How many workers have died of the entry since it last came further, and how far it had come when this trial began.
``killed``
    How often its training was ended by a signal, and begun again from its checkpoint.
``same_as``
    Root of the trial whose point it came to again, and whose figures it was therefore given.
``void``
    It was never begun: it was one too many, or came to a point that had been tried, and another was drawn instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState, create_trial

if TYPE_CHECKING:
    from safe_lab.sweep.study_file import Constraint

CUT_OFF = "cut_off"
TICKET = "ticket"
ROOT = "root"
VOID = "void"
OWNER = "owner"
DEATHS = "deaths"
REACHED = "reached"
BEAT = "beat"
FAILURE = "failure"
KNOWN = "known"
KILLED = "killed"
SPREAD = "spread"
BY_SEED = "by_seed"
SAME_AS = "same_as"
FORECAST = "forecast"
FORECAST_FROM = "forecast_from"
NO_FORECAST = "no_forecast"
TURNED_AWAY = "turned_away"

# What a trial that takes up another has of it.
_GO_ON = (KNOWN, KILLED, FORECAST, FORECAST_FROM, NO_FORECAST)


@dataclass(frozen=True)
class Roster:
    """The trials of a study.

    Attributes:
        trials: In the order of their numbers.
        num_trials: Entries that the study is to have. What has begun beyond that number is no concern of anybody's, unless it has
            come to its end.
    """

    trials: Sequence[FrozenTrial]
    num_trials: int

    @cached_property
    def entries(self) -> Mapping[int, FrozenTrial]:
        """The newest trial of each entry, by the number of its first."""
        entries: dict[int, FrozenTrial] = {}
        tickets: set[str] = set()
        for trial in self.trials:
            ticket = trial.user_attrs.get(TICKET)
            if VOID in trial.user_attrs or ticket in tickets:
                continue
            if ticket is not None:
                tickets.add(ticket)
            entries[root_of(trial)] = trial
        return entries

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that came to an end of their own."""
        return [trial for trial in self.entries.values() if trial.state.is_finished() and not is_cut_off(trial)]

    def of_state(self, state: TrialState) -> list[FrozenTrial]:
        """Those of the finished ones that ended so."""
        return [trial for trial in self.finished if trial.state == state]

    @property
    def open(self) -> list[FrozenTrial]:
        """Trials that wait or run, or were cut off and wait to be taken up."""
        return [trial for trial in self._wanted if not trial.state.is_finished() or is_cut_off(trial)]

    @property
    def cut_off(self) -> list[FrozenTrial]:
        """Trials that were cut off and have not been taken up."""
        return [trial for trial in self._wanted if is_cut_off(trial)]

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials that a worker has, dead or alive."""
        return [trial for trial in self._wanted if trial.state == TrialState.RUNNING]

    @property
    def waiting(self) -> list[FrozenTrial]:
        """Trials that wait for a worker."""
        return [trial for trial in self._wanted if trial.state == TrialState.WAITING]

    @property
    def _wanted(self) -> list[FrozenTrial]:
        """The newest trials of the first entries, as many as there are to be."""
        return [self.entries[root] for root in sorted(self.entries)[: self.num_trials]]

    @property
    def num_taken_up(self) -> int:
        """How often a trial was cut off and taken up."""
        return sum(is_cut_off(trial) for trial in self.trials) - len(self.cut_off)

    @property
    def void_and_running(self) -> list[FrozenTrial]:
        """Trials that nobody counts, and that their workers may have died of ending."""
        return [trial for trial in self.trials if VOID in trial.user_attrs and trial.state == TrialState.RUNNING]

    def find_same(self, params: Mapping[str, object], number: int) -> FrozenTrial | None:
        """A trial at the point of trial ``number`` that was trained, was turned away, or began before it; if there is one."""
        there = [trial for trial in self.entries.values() if trial.params == params and SAME_AS not in trial.user_attrs]
        trained = [trial for trial in there if trial.state == TrialState.COMPLETE]
        tried = [trial for trial in there if TURNED_AWAY in trial.user_attrs and trial.state == TrialState.PRUNED]
        begun = [trial for trial in there if trial.state == TrialState.RUNNING and trial.number < number]
        return next(iter([*trained, *tried, *begun]), None)

    def forecast_errors(self, constraint: Constraint) -> list[float]:
        """How far forecasts of a constraint's figure were off where the trial was trained all the same: forecast / truth - 1.

        Infinite where the truth was 0 and the forecast was not.
        """
        errors = []
        for trial in self.of_state(TrialState.COMPLETE):
            forecast = trial.user_attrs.get(FORECAST, {}).get(constraint.text)
            # Forecasts are of the first seed.
            found = trial.user_attrs.get(BY_SEED, {}).get(constraint.figure)
            if forecast is not None and found and SAME_AS not in trial.user_attrs:
                truth = found[0]
                errors.append(forecast / truth - 1 if truth else 0.0 if forecast == truth else math.inf)
        return errors

    def is_one_too_many(self, number: int) -> bool:
        """Whether a trial that has just been asked for, by its number, must not be begun."""
        return all(trial.number != number for trial in self._wanted)


def is_cut_off(trial: FrozenTrial) -> bool:
    """Whether a dead worker has left it. One that was only out of reach, and has ended its trial well, has not."""
    return trial.state == TrialState.FAIL and CUT_OFF in trial.user_attrs


def root_of(trial: FrozenTrial) -> int:
    """Number of the first trial of its entry."""
    root: int = trial.user_attrs.get(ROOT, trial.number)
    return root


def take_up(trial: FrozenTrial) -> FrozenTrial:
    """The trial that takes up a cut-off one: with the values it had, and new ones for what had not been drawn yet.

    What samplers have noted with it (the point of a grid, a generation) goes on with it too.
    """
    attributes = {key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints")}
    # Of a known point some values may not have been drawn yet.
    fixed = {**attributes.get("fixed_params", {}), **trial.params}
    if fixed:
        attributes["fixed_params"] = fixed
    tickets = {
        TICKET: f"takes up {trial.number}",
        ROOT: root_of(trial),
        DEATHS: trial.user_attrs.get(DEATHS, 0) + 1,
        REACHED: trial.user_attrs.get(REACHED),
        **{key: trial.user_attrs[key] for key in _GO_ON if key in trial.user_attrs},
    }
    return create_trial(state=TrialState.WAITING, system_attrs=attributes, user_attrs=tickets)

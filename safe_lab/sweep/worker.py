"""A worker of a study: takes one trial after the other, trains its runs, and tells what came of it.

Any number of them, on any machines, work on one study; they share its storage and nothing else. What each of them does at any
moment it can be killed in, and another goes on from there: a trial that a dead worker has left is marked as such and asked for
anew, under the number of its first try, so that it finds that one's checkpoints.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from safe_lab.config import Config
from safe_lab.figures import read_figure
from safe_lab.nursery import Start
from safe_lab.section import ConfigError
from safe_lab.sweep import roster as stored
from safe_lab.sweep.owner import Watch, describe_owner
from safe_lab.sweep.roster import Roster, root_of, take_up
from safe_lab.sweep.study_file import StudyFile
from safe_lab.trainings import Ended, Evaluation, remove_leftovers, train

if TYPE_CHECKING:
    from safe_lab.sweep.prefilter import Prefilter

log = logging.getLogger(__name__)

_IDLE_SECONDS = 1.0
_FAILURE_LENGTH = 1500
# Workers that may die of one trial without it coming further: what kills them each time will do so again.
_MOST_DEATHS = 10
# Trials drawn one after the other at points that were tried, after which the sampler is taken to have no other to offer.
_MOST_REDRAWN = 10


@dataclass
class Worker:
    """One of the workers of a study.

    Attributes:
        study_file: What is searched.
        study: Where it is kept.
        start: Starts the processes of runs.
        deadline: Time (since the epoch) after which no more trials are begun; None: no limit.
    """

    study_file: StudyFile
    study: Study
    start: Start
    deadline: float | None = None
    _redrawn: int = 0
    _beat: int = 0
    _beat_at: float = -math.inf
    _watch: Watch = field(init=False)
    _prefilter: Prefilter | None = None

    def __post_init__(self) -> None:
        """Look after the others from the start."""
        self._watch = Watch(self.study_file.settings.heartbeat)

    def work(self) -> None:
        """Take trials until the study has come to its end."""
        while True:
            roster = self.read_roster()
            self._take_up_dead(roster)
            if len(roster.finished) >= roster.num_trials:
                return
            in_time = self.deadline is None or time.time() < self.deadline
            try:
                if in_time and (roster.waiting or len(roster.entries) < roster.num_trials):
                    self._run(self.study.ask())
                elif in_time or roster.running:
                    # All have begun, and one of them may yet be left by its worker.
                    time.sleep(_IDLE_SECONDS)
                else:
                    return
            except UpdateFinishedTrialError:
                log.warning(
                    "a trial was taken up by another worker while this one was out of reach; what came of it here is not counted"
                )

    def read_roster(self) -> Roster:
        """The trials as they stand."""
        return Roster(self.study.get_trials(deepcopy=False), self.study_file.settings.num_trials)

    def _take_up_dead(self, roster: Roster) -> None:
        for trial in roster.running:
            if self._watch.is_dead(trial):
                self._cut_off(trial)
        for trial in roster.void_and_running:
            if self._watch.is_dead(trial):
                with suppress(UpdateFinishedTrialError):
                    self.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        for trial in self.read_roster().cut_off:
            self.study.add_trial(take_up(trial))

    def _cut_off(self, trial: FrozenTrial) -> None:
        """Mark a trial as left, unless it has ended in the meantime."""
        storage, key = self.study._storage, trial._trial_id
        with suppress(UpdateFinishedTrialError):
            storage.set_trial_user_attr(key, stored.CUT_OFF, True)
            storage.set_trial_state_values(key, TrialState.FAIL)

    def _run(self, trial: Trial) -> None:
        trial.set_user_attr(stored.OWNER, describe_owner())
        if self.read_roster().is_one_too_many(trial.number):
            # Another worker was faster.
            self._void(trial)
            return
        number = trial.user_attrs.get(stored.ROOT, trial.number)
        self._beat_at = -math.inf
        values = self.study_file.space.suggest(trial)
        if self._is_spared(trial):
            return
        self._redrawn = 0
        deaths = self._count_deaths(trial, number)
        if deaths >= _MOST_DEATHS:
            reason = f"{deaths} workers died of it, one after the other, without a newer checkpoint"
            self._tell(trial, [Ended("failed", {}, reason)])
            return
        self._tell(trial, self._train(trial, number, values))

    def _is_spared(self, trial: Trial) -> bool:
        """Whether a trial came to a point that has been tried, or is being tried.

        Another is drawn instead, unless the sampler has no other to offer. Then, and for a point that was named, a trained one's
        figures are taken, as with the same seeds it would come to the same again; whether one that was turned away still would be
        is looked at anew.
        """
        same = self.read_roster().find_same(trial.params, trial.number)
        if same is None:
            return False
        if stored.TICKET not in trial.user_attrs and self._redrawn < _MOST_REDRAWN:
            self._redrawn += 1
            self._void(trial)
            return True
        if same.state != TrialState.COMPLETE:
            return False
        self._redrawn = 0
        trial.set_user_attr(stored.SAME_AS, root_of(same))
        self._complete(trial, same.user_attrs[stored.BY_SEED])
        return True

    def _void(self, trial: Trial) -> None:
        """End a trial that nobody is to count."""
        trial.set_user_attr(stored.VOID, True)
        self._end(trial, TrialState.FAIL)

    def _count_deaths(self, trial: Trial, number: int) -> int:
        """How many workers have died of a trial since it last came further."""
        folder = self.study_file.folder_of(number)
        found = [*folder.glob("seed-*/result.json"), *folder.glob("seed-*/checkpoints/step-*")]
        reached = sorted(str(path.relative_to(folder)) for path in found)
        deaths: int = trial.user_attrs.get(stored.DEATHS, 0)
        if reached != trial.user_attrs.get(stored.REACHED):
            deaths = 0
        trial.set_user_attr(stored.DEATHS, deaths)
        trial.set_user_attr(stored.REACHED, reached)
        return deaths

    def _train(self, trial: Trial, number: int, values: Mapping[str, Any]) -> list[Ended]:
        """The runs of all seeds, up to the first one that has no result."""
        settings = self.study_file.settings
        runs: list[Ended] = []
        for place, seed in enumerate(settings.seeds):
            try:
                config = self.study_file.config_of(number, values, seed)
            except ConfigError as error:
                return [*runs, Ended("failed", {}, str(error))]
            # One that is taken up was let through before.
            is_new = place == 0 and not config.run_folder.exists()
            if settings.prefilter and is_new and self._turns_away(trial, config):
                return [Ended("stopped", {})]
            watch = _Pruning(trial, settings.pruner.name, next(iter(settings.objectives)), place)
            ended = train(
                config,
                start=self.start,
                watch=watch.sees,
                tick=lambda: self._live(trial),
                died=lambda _: trial.set_user_attr(stored.KILLED, trial.user_attrs.get(stored.KILLED, 0) + 1),
            )
            if ended.how == "finished":
                ended = self._check_figures(ended)
            runs.append(ended)
            if not settings.keep_checkpoints:
                self._live(trial)
                remove_leftovers(config)
            if ended.how != "finished":
                return runs
            if settings.pruner.name == "wilcoxon" and self._is_hopeless(trial, place, ended):
                return [*runs, Ended("stopped", {})]
        return runs

    def _turns_away(self, trial: Trial, config: Config) -> bool:
        """Whether a trial is not worth to be trained; what its runs are thought to come to is noted in any case."""
        if self._prefilter is None:
            # It plans, and so imports torch, which a worker needs for nothing else.
            from safe_lab.sweep.prefilter import Prefilter

            self._prefilter = Prefilter(self.study_file)
        with ThreadPoolExecutor(1) as pool:
            # Planning a large model may take longer than may pass without a sign of life.
            forecasting = pool.submit(self._prefilter.forecast, config)
            while not wait([forecasting], timeout=_IDLE_SECONDS).done:
                self._live(trial)
        forecast = forecasting.result()
        trial.set_user_attr(stored.FORECAST, dict(forecast.by_constraint))
        trial.set_user_attr(stored.FORECAST_FROM, forecast.told_from)
        trial.set_user_attr(stored.NO_FORECAST, forecast.untold[:_FAILURE_LENGTH])
        roster, constraints = self.read_roster(), self.study_file.constraints
        errors = {constraint.text: roster.forecast_errors(constraint) for constraint in constraints}
        reason = self._prefilter.find_reason(forecast, errors)
        if reason is None:
            return False
        for constraint in constraints:
            if constraint.text in forecast.by_constraint:
                trial.set_constraint(constraint.text, constraint.excess(forecast.by_constraint[constraint.text]))
        trial.set_user_attr(stored.TURNED_AWAY, reason)
        return True

    def _check_figures(self, ended: Ended) -> Ended:
        """As it was, or failed if an objective is missing or not finite."""
        wanted = [*self.study_file.objectives, *(constraint.figure for constraint in self.study_file.constraints)]
        try:
            for name in wanted:
                if not math.isfinite(read_figure(ended.result, name)):
                    return Ended("failed", {}, f"{name} is not finite")
        except ValueError as error:
            return Ended("failed", {}, str(error))
        return ended

    def _is_hopeless(self, trial: Trial, place: int, ended: Ended) -> bool:
        """By the Wilcoxon test over the seeds so far; not after the last, when all is known."""
        (objective,) = self.study_file.objectives
        trial.report(read_figure(ended.result, objective), place)
        return place + 1 < len(self.study_file.settings.seeds) and trial.should_prune()

    def _tell(self, trial: Trial, runs: Sequence[Ended]) -> None:
        last = runs[-1]
        if last.how == "failed":
            trial.set_user_attr(stored.FAILURE, last.reason[:_FAILURE_LENGTH])
            self._end(trial, TrialState.FAIL)
            return
        if last.how == "stopped":
            self._end(trial, TrialState.PRUNED)
            return
        results = [run.result for run in runs]
        by_figure = {
            name: [read_figure(result, name) for result in results]
            for name in (*self.study_file.objectives, *(bound.figure for bound in self.study_file.constraints))
        }
        self._complete(trial, by_figure)

    def _complete(self, trial: Trial, by_figure: Mapping[str, Sequence[float]]) -> None:
        """End a trial with its figures, seed by seed."""
        for constraint in self.study_file.constraints:
            trial.set_constraint(constraint.text, constraint.excess(fmean(by_figure[constraint.figure])))
        trial.set_user_attr(stored.BY_SEED, by_figure)
        if len(self.study_file.settings.seeds) > 1:
            trial.set_user_attr(stored.SPREAD, {name: stdev(found) for name, found in by_figure.items()})
        means = [fmean(by_figure[name]) for name in self.study_file.objectives]
        self._end(trial, TrialState.COMPLETE, means)

    def _end(self, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        try:
            self.study.tell(trial, values, state=state)
        except (ValueError, UpdateFinishedTrialError):
            # Cut off by another; unless it was this very answer, which the storage had heard before it failed.
            if self.study.get_trials(deepcopy=False)[trial.number].state != state:
                raise UpdateFinishedTrialError from None

    def _live(self, trial: Trial) -> None:
        """A sign of life, when one is due."""
        now = time.monotonic()
        if now - self._beat_at >= self.study_file.settings.heartbeat:
            self._beat_at = now
            self._beat += 1
            trial.set_user_attr(stored.BEAT, self._beat)


class _Pruning:
    """Reports a run's evaluations to the pruner, and says when it is to end."""

    def __init__(self, trial: Trial, pruner: str, objective: str, place: int) -> None:
        self._trial = trial
        # By the first seed's evaluations: those of the others would stand at the same steps.
        self._prunes = pruner not in ("none", "wilcoxon") and place == 0
        self._objective = objective

    def sees(self, row: Evaluation) -> bool:
        """An evaluation was made."""
        # Null where it was not finite: the figure at the end is what the trial fails by.
        if not self._prunes or row.get(self._objective) is None:
            return False
        self._trial.report(row[self._objective], row["step"])
        return self._trial.should_prune()

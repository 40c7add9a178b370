"""Start the workers of a study on this machine, start those anew that die, and show what all of them do."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from safe_lab import yaml_core
from safe_lab.child import started, why_ended
from safe_lab.figures import format_figure
from safe_lab.run_folder import RunFolder
from safe_lab.sweep import roster as stored
from safe_lab.sweep.roster import Roster, root_of
from safe_lab.sweep.study_file import StudyFile

STORAGE_VARIABLE = "SAFE_LAB_SWEEP_STORAGE"
# Deaths of a worker one after the other, each within a minute of its start, after which it is not started anew.
_MOST_DEATHS = 5
_SOON_SECONDS = 60.0
_POLL_SECONDS = 0.5


@dataclass
class Supervisor:
    """Looks after the workers on this machine.

    Attributes:
        study_file: What is searched.
        study: Where it is kept.
        address: Of its storage.
        environments: Of each worker's processes, on top of this one's.
        show: Called with a line whenever a trial has begun or ended, on whichever machine.
    """

    study_file: StudyFile
    study: Study
    address: str
    environments: Sequence[Mapping[str, str]]
    show: Callable[[str], None]
    _told: dict[int, TrialState] = field(default_factory=dict)
    _deaths: Counter[int] = field(default_factory=Counter)
    _started_at: dict[int, float] = field(default_factory=dict)
    _deadline: float | None = None
    _given_up: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until the study has come to its end, or its timeout.

        A worker that dies again and again is given up, and the others go on.

        Raises:
            RuntimeError: All of them were given up.
        """
        self._told = {trial.number: trial.state for trial in self._read().trials}
        timeout = self.study_file.settings.timeout
        self._deadline = None if timeout is None else time.time() + timeout
        # Of this command: another one on this study may have other workers, another sampler, another way to this folder.
        files = RunFolder(self.study_file.folder)
        files.write(self._name("study", "yaml"), yaml_core.write(self.study_file.settings.model_dump(mode="json")))
        with ExitStack() as held:
            held.callback((files.path / self._name("study", "yaml")).unlink, missing_ok=True)
            workers = {i: self._start(i, held) for i in range(len(self.environments))}
            while workers:
                time.sleep(_POLL_SECONDS)
                for i, process in list(workers.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del workers[i]
                    if code != 0 and self._is_to_go_on(i, code):
                        workers[i] = self._start(i, held)
                self._tell_news()
        self._tell_news()
        if len(self._given_up) == len(self.environments):
            raise RuntimeError("\n".join(self._given_up))

    def _start(self, worker: int, held: ExitStack) -> subprocess.Popen[bytes]:
        self._started_at[worker] = time.monotonic()
        environment = dict(self.environments[worker]) | {STORAGE_VARIABLE: self.address}
        arguments = [
            *("safe_lab.sweep.worker_process", str(self.study_file.folder / self._name("study", "yaml"))),
            *(str(self.study_file.settings.num_trials), "none" if self._deadline is None else str(self._deadline)),
        ]
        return held.enter_context(started(arguments, self._log(worker), environment))

    def _log(self, worker: int) -> Path:
        return self.study_file.folder / self._name("worker", f"{worker}.log")

    @staticmethod
    def _name(what: str, ending: str) -> str:
        """A file of this command's own; others may share the folder."""
        return f"{what}-{socket.gethostname()}-{os.getpid()}.{ending}"

    def _is_to_go_on(self, worker: int, code: int) -> bool:
        """Whether a worker that has died is to be started anew."""
        why = why_ended(code, self._log(worker))
        soon = time.monotonic() - self._started_at[worker] < _SOON_SECONDS
        self._deaths[worker] = self._deaths[worker] + 1 if soon else 1
        if self._deaths[worker] == _MOST_DEATHS:
            self._given_up.append(f"worker {worker} ended {_MOST_DEATHS} times, each soon after its start: {why}")
            self.show(self._given_up[-1])
            return False
        self.show(f"worker {worker} ended ({' '.join(why.splitlines()[:2])}), and is started anew")
        return True

    def _read(self) -> Roster:
        return Roster(self.study.get_trials(deepcopy=False), self.study_file.settings.num_trials)

    def _tell_news(self) -> None:
        roster = self._read()
        for trial in roster.trials:
            before = self._told.get(trial.number)
            if trial.state in (before, TrialState.WAITING) or stored.VOID in trial.user_attrs:
                continue
            if trial.state == TrialState.RUNNING and stored.BEAT not in trial.user_attrs:
                # It is just being drawn.
                continue
            self._told[trial.number] = trial.state
            self.show(self._describe(trial, len(roster.finished)))

    def _describe(self, trial: FrozenTrial, finished: int) -> str:
        name = f"trial {root_of(trial)}"
        done = f"{finished}/{self.study_file.settings.num_trials}"
        drawn = ", ".join(f"{key}={value}" for key, value in self.study_file.space.read(trial.params).items())
        if trial.state == TrialState.RUNNING:
            begun = "begins" if root_of(trial) == trial.number else "goes on"
            return f"{name} {begun}: {drawn}"
        if stored.is_cut_off(trial):
            return f"{name}: its worker is gone; it is taken up again"
        if trial.state == TrialState.COMPLETE:
            same = trial.user_attrs.get(stored.SAME_AS)
            if same is not None:
                return f"{name} ({done}): the same point as trial {same}, and not trained again"
            named = zip(self.study_file.objectives, trial.values, strict=True)
            reason = trial.user_attrs.get(stored.NO_FORECAST)
            times = trial.user_attrs.get(stored.KILLED)
            killed = f" (killed and gone on with: {times})" if times else ""
            untold = f" (not forecast: {' '.join(reason.splitlines()[:1])})" if reason else ""
            return (
                f"{name} ({done}): "
                + ", ".join(f"{figure} {format_figure(figure, value)}" for figure, value in named)
                + killed
                + untold
            )
        if trial.state == TrialState.PRUNED:
            reason = trial.user_attrs.get(stored.TURNED_AWAY)
            return f"{name} ({done}): " + ("pruned" if reason is None else f"not trained ({drawn}): {reason}")
        return f"{name} ({done}): failed, {' '.join(trial.user_attrs.get(stored.FAILURE, '').splitlines()[:2])}"

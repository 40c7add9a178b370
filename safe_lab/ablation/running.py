"""Train the runs of an experiment that are missing, several at a time, and tell how each of them stands."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum

from safe_lab.ablation.experiment_file import Experiment
from safe_lab.ablation.records import find_change, read_record
from safe_lab.child import read_warnings
from safe_lab.config import Config
from safe_lab.nursery import Nursery, Start, start_afresh
from safe_lab.trainings import Evaluation, find_other_run, is_finished, lacks_sharpness, log_of, remove_leftovers, train


class State(StrEnum):
    """How a run stands."""

    WAITING = "waiting"
    RUNNING = "running"
    KEPT = "kept"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """A run of the experiment, as it stands.

    Attributes:
        variant: Its variant.
        seed: Its seed.
        state: Whether it waits, runs, was there before, or has ended.
        note: Why it failed, or what made it begin anew.
        latest: Its newest row with an evaluation.
        warnings: What it has warned of.
    """

    variant: str
    seed: int
    state: State = State.WAITING
    note: str = ""
    latest: Evaluation = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Show = Callable[[Progress], None]


class Outlook(StrEnum):
    """What is to become of a run."""

    KEPT = "kept"
    MEASURED = "kept, and its sharpness measured"
    RESUMED = "resumed from its checkpoint"
    BEGUN = "begun"
    REDONE = "trained anew, the old one removed"
    REFUSED = "refused"


def foresee(experiment: Experiment) -> list[tuple[tuple[str, int], Outlook, str]]:
    """What :func:`run_missing` would do: variant and seed of each run, what becomes of it, and why."""
    return [(run, *_foresee(experiment.config_of(*run))) for run in experiment.runs]


def _foresee(config: Config) -> tuple[Outlook, str]:
    if is_finished(config):
        return Outlook.KEPT, ""
    fault = find_other_run(config)
    if fault:
        changed = find_change(config.run_folder, config)
        return (Outlook.REDONE, changed) if changed else (Outlook.REFUSED, fault)
    if lacks_sharpness(config):
        return Outlook.MEASURED, ""
    has_checkpoint = any((config.run_folder / "checkpoints").glob("step-*"))
    return (Outlook.RESUMED if has_checkpoint else Outlook.BEGUN), ""


def run_missing(
    experiment: Experiment, environments: Sequence[Mapping[str, str]], show: Show, *, on_gpus: bool
) -> list[Progress]:
    """Train every run of an experiment that is not there yet, and those that a changed file asks for anew.

    A finished run of the same configuration is kept, an unfinished one goes on from its checkpoint. What fails is told, and the
    others go on.

    Args:
        experiment: What is to be there.
        environments: One for each training that may go on at a time; see :func:`safe_lab.hardware.environments`.
        show: Called whenever a run's state or newest evaluation has changed; from several threads, one at a time.
        on_gpus: Whether each has a GPU, so that it cannot be forked.

    Returns:
        How each run stands, in the order of ``experiment.runs``.

    Raises:
        OSError: The machine is at fault: a disk that is full, or gone. The same call goes on once that is mended.
        KeyboardInterrupt: The trainings have been ended; they go on from their checkpoints.
    """
    board = _Board(experiment, show)
    with ThreadPoolExecutor(len(environments)) as pool:
        try:
            workers = [pool.submit(board.work, environment, on_gpus) for environment in environments]
            for worker in workers:
                worker.result()
        finally:
            # With an interrupt, or where one has met a fault of the machine, the others end too.
            board.stop.set()
    return list(board.runs.values())


class _StoppedError(Exception):
    """The training is to end, as all are."""


class _Board:
    """What there is to do, and how it stands; workers are threads, each of which watches one training at a time."""

    def __init__(self, experiment: Experiment, show: Show) -> None:
        self.experiment = experiment
        self.stop = threading.Event()
        self.runs = {run: Progress(*run) for run in experiment.runs}
        self._show = show
        self._lock = threading.Lock()
        self._left: deque[tuple[str, int]] = deque()
        for run in experiment.runs:
            if is_finished(experiment.config_of(*run)):
                found = read_record(experiment.config_of(*run).run_folder)
                self._set(run, state=State.KEPT, latest=found.result.get("metrics", {}))
                if not experiment.settings.keep_checkpoints:
                    # Of one that was killed right after its end.
                    remove_leftovers(experiment.config_of(*run))
            else:
                self._left.append(run)

    def work(self, environment: Mapping[str, str], on_gpus: bool) -> None:
        """Train one run after the other, until none is left."""
        try:
            if on_gpus:
                self._train_all(lambda arguments, log: start_afresh(arguments, log, environment))
            else:
                with closing(Nursery(environment)) as nursery:
                    self._train_all(nursery.start)
        except _StoppedError:
            return
        except BaseException:
            self.stop.set()
            raise

    def _train_all(self, start: Start) -> None:
        while not self.stop.is_set():
            try:
                run = self._left.popleft()
            except IndexError:
                return
            self._train(run, start)

    def _train(self, run: tuple[str, int], start: Start) -> None:
        config = self.experiment.config_of(*run)
        outlook, why = _foresee(config)
        is_redone = outlook == Outlook.REDONE
        self._set(run, state=State.RUNNING, note=why if is_redone else "")

        def watch(row: Evaluation) -> bool:
            self._set(run, latest=row)
            return False

        ended = train(config, start=start, watch=watch, tick=self._tick, overwrite=is_redone)
        if ended.how == "finished":
            self._set(run, warnings=read_warnings(log_of(config.run_folder)))
            if not self.experiment.settings.keep_checkpoints:
                remove_leftovers(config)
            self._set(run, state=State.FINISHED, note="")
        else:
            self._set(run, state=State.FAILED, note=ended.reason)

    def _tick(self) -> None:
        if self.stop.is_set():
            raise _StoppedError

    def _set(self, run: tuple[str, int], **changes: object) -> None:
        with self._lock:
            self.runs[run] = replace(self.runs[run], **changes)  # type: ignore[arg-type]
            self._show(self.runs[run])

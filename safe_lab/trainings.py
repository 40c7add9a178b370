"""Trainings in processes of their own, each with its run folder, configuration and log: watched, and begun again when killed."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safe_lab import config as configuration
from safe_lab import run_folder
from safe_lab.child import FAULT_OF_MACHINE, why_ended
from safe_lab.config import Config
from safe_lab.nursery import Start
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError

logger = logging.getLogger(__name__)

# Deaths by a signal without a newer checkpoint after which a run is given up: what kills it each time will do so again.
_MOST_DEATHS = 3
_POLL_SECONDS = 0.5

Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        how: With a result, without one, or because ``watch`` said so.
        result: What result.json holds; empty without one.
        reason: Why there is none.
    """

    how: Literal["finished", "failed", "stopped"]
    result: Mapping[str, Any]
    reason: str = ""


def train(
    config: Config,
    *,
    start: Start,
    watch: Callable[[Evaluation], bool],
    tick: Callable[[], None],
    died: Callable[[str], None] = lambda _: None,
    overwrite: bool = False,
) -> Ended:
    """Train in a process of its own, from the newest checkpoint if the run was begun before.

    Killed by a signal, it is started again, and goes on from its checkpoint.

    Args:
        config: The run.
        start: Starts the process.
        watch: Called with each row of metrics.jsonl that has an evaluation, once each and in order; True ends the run.
        tick: Called again and again while the run goes on; what it raises ends the run.
        died: Called with why, each time that a signal has ended it.
        overwrite: Remove what the folder holds of another configuration, and begin anew.

    Raises:
        OSError: It was the machine's fault: a disk that is full, or gone. The run can go on once that is mended.
    """
    path = config.run_folder
    deaths, reached = 0, None
    # What somebody trains there at this moment is not what was asked to be removed.
    overwrite = overwrite and not _is_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(path.parent).write(f"{path.name}.yaml", configuration.dump(config))
    log = log_of(path)
    rows = _Evaluations(path)
    while True:
        _wait_until_free(path, tick)
        fault = find_other_run(config)
        if fault and not overwrite:
            return Ended("failed", {}, fault)
        file = str((path.parent / f"{path.name}.yaml").absolute())
        # A run that was killed after its training is measured from its folder.
        measures = not fault and lacks_sharpness(config)
        begin = "--overwrite" if fault else "--resume"
        with start(["sharpness", str(path)] if measures else ["train", file, begin, "--quiet"], log) as process:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                tick()
                if fault and (fault := find_other_run(config)):
                    # What lies there yet is not this run's.
                    continue
                if any(watch(row) for row in rows.read()):
                    return Ended("stopped", {})
        code = process.returncode
        if code == 0 and any(watch(row) for row in rows.read()):
            return Ended("stopped", {})
        if code == 0 and (measures or not lacks_sharpness(config)):
            return _read_result(path)
        if code == 0 or (code > 0 and _is_held(path)):
            # To be measured yet, or another was faster to train there.
            deaths = 0
            continue
        if code == FAULT_OF_MACHINE:
            raise OSError(why_ended(code, log))
        if code > 0:
            return Ended("failed", {}, why_ended(code, log))
        newest = max((entry.name for entry in (path / "checkpoints").glob("step-*")), default=None)
        died(why_ended(code, log).splitlines()[0])
        deaths, reached = (1 if newest != reached else deaths + 1), newest
        if deaths == _MOST_DEATHS:
            return Ended("failed", {}, f"{why_ended(code, log)}\n{deaths} times without a newer checkpoint")
        logger.warning(
            "%s: %s; it goes on from %s", path, why_ended(code, log).splitlines()[0], newest or "its beginning"
        )


def log_of(path: Path) -> Path:
    """Where the process that trains in a run folder writes what it has to say."""
    return path.parent / f"{path.name}.log"


def check_data(config: Config) -> None:
    """Whether data can be read and have the columns they need, before one training after the other fails by it.

    Raises:
        ConfigError: They cannot, or have not.
    """
    from safe_lab.data import read_splits

    data = config.data
    columns = (data.text_column, data.text_pair_column, data.label_column)
    try:
        # Of which rows are held out nothing here depends.
        read_splits(data.task, data.path, columns, data.labels, None, config.seed)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from None


def remove_leftovers(config: Config) -> None:
    """Remove what only a run that goes on has use for."""
    path = config.run_folder
    caches = [] if config.savings.keep_cache else [path / "cache", *path.glob("cache-*")]
    for folder in (path / "checkpoints", *caches):
        shutil.rmtree(folder, ignore_errors=True)


def is_finished(config: Config) -> bool:
    """Whether a run has ended in its folder, and been measured if it was to be."""
    try:
        run_folder.check(config, resume=True, overwrite=False)
    except run_folder.AlreadyFinishedError:
        return _read_result(config.run_folder).how == "finished" and not lacks_sharpness(config)
    except ConfigError:
        return False
    return False


def lacks_sharpness(config: Config) -> bool:
    """Whether a run has ended, and its sharpness, which was to be measured, has not been."""
    if config.sharpness.when == "never" or not (config.run_folder / "result.json").exists():
        return False
    return _read_result(config.run_folder).result.get("sharpness") is None


def _read_result(path: Path) -> Ended:
    try:
        return Ended("finished", json.loads((path / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return Ended("failed", {}, f"{path}: its result cannot be read ({error})")


def find_other_run(config: Config) -> str | None:
    """What stands against training in a run folder; an unfinished or finished run of this configuration does not."""
    try:
        run_folder.check(config, resume=True, overwrite=False)
    except run_folder.AlreadyFinishedError:
        return None
    except ConfigError as error:
        return str(error)
    return None


def _wait_until_free(path: Path, tick: Callable[[], None]) -> None:
    """Wait while another process trains there: one that a dead worker left is about to end, one out of reach will end its run."""
    while _is_held(path):
        tick()
        time.sleep(_POLL_SECONDS)


def _is_held(path: Path) -> bool:
    try:
        with (path / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # Not there yet; or a disk without locks, on which the run will say so.
        return False
    return False


class _Evaluations:
    """The evaluations in a metrics.jsonl that grows, and that a run which is resumed cuts back and writes again."""

    def __init__(self, path: Path) -> None:
        self._path = path / "metrics.jsonl"
        self._size = -1
        self._seen = -1

    def read(self) -> Iterator[Evaluation]:
        """Those that are new."""
        try:
            # All of it: a place to go on from would be lost where the file is cut back and grows again in between.
            lines = self._path.read_bytes()
        except FileNotFoundError:
            return
        if len(lines) == self._size:
            return
        self._size = len(lines)
        for line in lines[: lines.rfind(b"\n") + 1].split(b"\n"):
            try:
                row = json.loads(line or b"{}")
            except ValueError:
                # A disk's fault, which the run itself will tell of if it minds.
                continue
            if any(key.startswith("validation") for key in row) and row["step"] > self._seen:
                self._seen = row["step"]
                yield row

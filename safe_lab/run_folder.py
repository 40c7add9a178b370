"""The folder of a run: who may write into it, what lies in it, and its files row by row.

``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``importance.jsonl``, ``events.jsonl``, ``result.json``, ``adapter/``,
``checkpoints/``; the columns are documented in docs/run_folder.md.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_lab import config as configuration
from safe_lab.config import Config
from safe_lab.section import ConfigError
from safe_lab.whole_file import whole_file

if TYPE_CHECKING:
    from safe_lab.processes import Processes

log = logging.getLogger(__name__)

ROW_FILES = ("metrics.jsonl", "importance.jsonl", "events.jsonl")
# Only where there are several processes, and where sharpness is measured during training.
PROCESS_ROWS = "processes.jsonl"
SHARPNESS_ROWS = "sharpness.jsonl"
_PERHAPS = (PROCESS_ROWS, SHARPNESS_ROWS)


class RunFolderError(ConfigError):
    """A run folder that cannot be used as asked; the message says what to do."""


class AlreadyFinishedError(RunFolderError):
    """The run folder holds this very run, finished."""


class RunFolder:
    """A run folder held by this process."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """Name the folder; :func:`claim` opens it for writing.

        Args:
            path: The folder.
            writes: False on all processes of a run but one: what they are asked to write is left to that one.
        """
        self.path = path
        self._writes = writes

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run came to, or None if it has not ended."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def append(self, file: str, row: Mapping[str, Any]) -> None:
        """Add a row to one of the JSONL files."""
        if not self._writes:
            return
        with (self.path / file).open("a", encoding="utf-8") as stream:
            stream.write(to_json(row) + "\n")

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The rows of one of the JSONL files."""
        path = self.path / file
        if not path.exists():
            return []
        # Not splitlines(): it also breaks at separators that JSON leaves inside a string.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def sizes(self) -> dict[str, int]:
        """Bytes of each JSONL file, to which a resumed run cuts them back; they survive a power cut from here on."""
        if not self._writes:
            return {}
        files = [*ROW_FILES, *(file for file in _PERHAPS if (self.path / file).exists())]
        for file in files:
            with (self.path / file).open("a") as stream:
                os.fsync(stream.fileno())
        return {file: (self.path / file).stat().st_size for file in files}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut the JSONL files back to ``sizes``: rows after a checkpoint will be written again.

        Raises:
            RunFolderError: A file is shorter than it was at the checkpoint, or a row is damaged; nothing is cut then.
        """
        if not self._writes:
            return
        for file, size in sizes.items():
            path = self.path / file
            path.touch()
            with path.open("rb") as stream:
                kept = stream.read(size)
            if len(kept) < size:
                raise RunFolderError(f"{path}: {len(kept)} bytes, {size} at the checkpoint: rows were lost")
            try:
                for line in kept.split(b"\n"):
                    json.loads(line or b"0")
            except ValueError:
                raise RunFolderError(f"{path}: a row was altered, it is no JSON any more") from None
        for file, size in sizes.items():
            os.truncate(self.path / file, size)
        for file in _PERHAPS:
            if file not in sizes:
                (self.path / file).unlink(missing_ok=True)

    def remove_caches(self) -> None:
        """Remove what further machines' activation caches have left here, where they share this disk.

        Those of a run that goes on with fewer processes have no other to remove theirs.
        """
        if not self._writes:
            return
        for folder in self.path.glob("cache-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, file: str, text: str) -> None:
        """Write a file whole or not at all."""
        if not self._writes:
            return
        with whole_file(self.path / file) as stream:
            stream.write(text.encode())


@contextmanager
def claim(config: Config, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Hold the run folder of a configuration while the run writes to it.

    Raises:
        RunFolderError: A live run holds it; it holds a finished or unfinished run, or one of another configuration, and neither
            ``resume`` nor ``overwrite`` says what is to become of it.
    """
    path = config.run_folder
    with hold(
        path, "a live run is writing to this folder; wait for it, or give this run another name, variant or seed"
    ):
        check(config, resume=resume, overwrite=overwrite)
        if overwrite:
            _empty(path)
        yield RunFolder(path)


@contextmanager
def claim_together(config: Config, processes: Processes, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """As :func:`claim`, for all processes of a run: process 0 holds the folder, and what it finds is told to all."""
    if not processes.is_main:
        refusal = processes.broadcast(None)
        if refusal is not None:
            raise refusal
        yield RunFolder(config.run_folder, writes=False)
        return
    with ExitStack() as held:
        try:
            folder = held.enter_context(claim(config, resume=resume, overwrite=overwrite))
        except RunFolderError as error:
            processes.broadcast(error)
            raise
        processes.broadcast(None)
        yield folder


@contextmanager
def hold(path: Path, held_by_another: str) -> Iterator[None]:
    """Make a folder and hold it while this process writes to it.

    Args:
        path: The folder.
        held_by_another: What to say if another process holds it.

    Raises:
        RunFolderError: Another process holds it, or it cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The lock goes with the process, however it ends.
        lock = (path / ".lock").open("w")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be written to ({error})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"{path}: {held_by_another}") from None
        yield


def check(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Whether the run folder of a configuration can be used as asked.

    Raises:
        AlreadyFinishedError: It holds this very run, finished.
        RunFolderError: It holds another run or an unfinished one, and neither ``resume`` nor ``overwrite`` says what is to
            become of it.
    """
    path = config.run_folder
    if overwrite or not (path / "config.yaml").exists():
        return
    finished = (path / "result.json").exists()
    state = "a finished" if finished else "an unfinished"
    try:
        before = configuration.load(path / "config.yaml")
        # Who is told of a run, by which path its folder is reached, and what is measured of it, changes nothing about it.
        same: dict[str, Any] = {"tracking": before.tracking, "output_dir": before.output_dir}
        if not finished:
            same["sharpness"] = before.sharpness
        found = differences(before, config.model_copy(update=same) if resume else config)
    except ConfigError as error:
        raise RunFolderError(
            f"{path}: holds {state} run whose config.yaml this version cannot read ({error}); --overwrite removes it"
        ) from None
    if found:
        raise RunFolderError(
            f"{path}: holds {state} run of another configuration ({'; '.join(found)}); "
            "--overwrite removes it, or give this run another name or variant"
        )
    if finished:
        raise AlreadyFinishedError(
            f"{path}: this run has finished already, its result is in result.json; --overwrite runs it again"
        )
    if not resume:
        raise RunFolderError(
            f"{path}: holds an unfinished run of this configuration; --resume goes on with it, --overwrite starts anew"
        )


def _empty(path: Path) -> None:
    # Killed in between, it must be taken neither for a finished run nor for the beginning of another: what says which run it was
    # goes last.
    order = {"result.json": 0, "checkpoints": 1, "config.yaml": 3}
    for entry in sorted(path.iterdir(), key=lambda entry: order.get(entry.name, 2)):
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def differences(old: Config, new: Config) -> list[str]:
    """Where two configurations differ: a dotted key, the old and the new value, a line each."""
    return [f"{key}: {before} there, {after} here" for key, (before, after) in changed_keys(old, new).items()]


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Where two configurations differ: the old and the new value by dotted key."""

    def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    before, after = dict(flatten(old.model_dump(mode="json"))), dict(flatten(new.model_dump(mode="json")))
    return {key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)}


def to_json(value: Any) -> str:
    """JSON on one line; what JSON has no number for (NaN, infinity) becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: finite(entry) for key, entry in value.items()}
        return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), ensure_ascii=False)

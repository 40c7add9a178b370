"""A training in a process of its own, which ends with the one that started it, and says why it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_LAST_LINES = 8
_WARNING = "WARNING "
_INDENT = " " * len(_WARNING)
_SAID = ("stopped: ", "error: ")
# Runs a command of safe-lab that ends with the process that started it.
CHILD = "safe_lab.cli.child"
# Exit code where it was the machine's fault (a full disk, a file system that is gone), and will go well once that is mended.
FAULT_OF_MACHINE = 75
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def started(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python -m <arguments>``, whose module calls :func:`end_with_parent`; leaving ends it if it still runs.

    Args:
        arguments: Module and its arguments.
        log: File for what it prints.
        environment: On top of this process's.
    """
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,  # closes when this process ends, and the other ends then
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUIET, **environment},
            start_new_session=True,  # Ctrl-C comes here alone
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, kill -9 included."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def num_threads(count: int) -> dict[str, str]:
    """The environment of a process that computes with so many threads."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def why_ended(code: int, log: Path) -> str:
    """Why a process ended otherwise than well: its exit code or signal, and what it said of it, or its last lines."""
    return f"{_reason(code)}\n{_cause(log)}".strip()


def read_warnings(log: Path) -> tuple[str, ...]:
    """What a process has warned of, as its log has it: each warning once, its lines put together; nothing without a log."""
    found: list[str] = []
    within = False
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        # Of a terminal's width, as rich writes them: what goes on is indented.
        if within and line.startswith(_INDENT):
            found[-1] += f" {line.strip()}"
            continue
        within = line.startswith(_WARNING)
        if within:
            found.append(line.removeprefix(_WARNING).strip())
    return tuple(dict.fromkeys(found))


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log that are not empty."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    return "\n".join([line for line in lines if line][-count:])


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (" (was memory short?)" if name == "SIGKILL" else "")


def _cause(log: Path) -> str:
    lines = last_lines(log, _LAST_LINES)
    said = [line for line in lines.splitlines() if line.startswith(_SAID)]
    return said[-1] if said else lines

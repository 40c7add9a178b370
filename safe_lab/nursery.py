"""Trainings by the dozen: each forked from a process that has imported all they need, some five seconds' work done once.

The nursery (:mod:`safe_lab.cli.nursery`) imports and computes nothing, so that what it forks begins as a fresh process does, with
the same bits to come. On a GPU trainings are started afresh instead: CUDA does not outlive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from types import MappingProxyType
from typing import Any, Protocol

from safe_lab.child import CHILD, QUIET, started


class Running(Protocol):
    """A process that was started, as :class:`subprocess.Popen` has it."""

    returncode: Any

    def poll(self) -> int | None:
        """Its exit code, or the signal that ended it as a negative number; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The same, waited for.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """


Start = Callable[[Sequence[str], Path], AbstractContextManager[Running]]


def start_afresh(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> AbstractContextManager[Running]:
    """Run a command of ``safe-lab`` in a new process; leaving ends it if it still runs.

    Args:
        arguments: The command and its arguments.
        log: File for what it prints.
        environment: On top of this process's.
    """
    return started([CHILD, *arguments], log, environment)


@dataclass
class Nursery:
    """Starts commands of ``safe-lab``, one at a time, by forking; they end with this process.

    Attributes:
        environment: Of theirs, on top of this process's.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def start(self, arguments: Sequence[str], log: Path) -> Iterator[Running]:
        """Run a command in a fork; leaving ends it if it still runs.

        Args:
            arguments: The command and its arguments.
            log: File for what it prints.

        Raises:
            OSError: The process that forks has ended of itself; why stands in what this process prints.
        """
        log.write_bytes(b"")
        order = json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n"
        forked = _Forked(self._order(order.encode()))
        try:
            yield forked
        finally:
            forked.end()

    def close(self) -> None:
        """End it, and what it has forked."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _order(self, line: bytes) -> subprocess.Popen[bytes]:
        """Hand a line to the process that forks, which is started if there is none; it does not wait for an answer."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "safe_lab.cli.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **QUIET, **self.environment},
                # Unbuffered: what has been read from it is what select() does not tell of any more.
                bufsize=0,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        # Should it end at this very moment, no answer comes, which is told as such.
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
        return self._process


@dataclass
class _Forked:
    """A command that was ordered, as its nursery tells of it: first its process id, then how it ended."""

    nursery: subprocess.Popen[bytes]
    pid: int | None = None
    returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        assert self.nursery.stdout is not None
        while self.returncode is None:
            if not select([self.nursery.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            line = self.nursery.stdout.readline()
            if not line:
                # With the nursery everything ends that it has forked.
                self.returncode = self.nursery.wait()
                if self.returncode >= 0:
                    raise OSError(f"the process that trainings are forked from ended, with exit code {self.returncode}")
            elif self.pid is None:
                self.pid = int(line)
            else:
                self.returncode = int(line)
        return self.returncode

    def end(self) -> None:
        """End it, if it still runs."""
        if self.poll() is not None:
            return
        if self.pid is None:
            # Not forked yet.
            self.nursery.kill()
        else:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.wait()

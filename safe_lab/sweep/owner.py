"""Which worker has a trial, and whether it is still alive."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial

from safe_lab.sweep.roster import BEAT, OWNER

_MISSED_BEATS = 3
_CLOCK_SECONDS = 10.0


def describe_owner() -> dict[str, Any]:
    """This process, so that another on the same machine can tell whether it is still there."""
    return {"machine": _machine(), "process": os.getpid(), "since": psutil.Process().create_time()}


@dataclass
class _Silence:
    beat: Any
    looked_at: float
    seconds: float = 0.0


class Watch:
    """Looks after the workers of other trials.

    A worker on this machine is dead once its process is gone. Of one elsewhere all there is is its beat, a number in the storage
    that it raises again and again: it is dead once that has stood still for three beats, by this machine's own clock, so that the
    clocks of the machines need not agree. Time in which this worker did not look, as the storage was away, is none in which the
    other was silent.
    """

    def __init__(self, heartbeat_seconds: float) -> None:
        """Watch workers that raise their beat every ``heartbeat_seconds``."""
        self._heartbeat_seconds = heartbeat_seconds
        self._seen: dict[int, _Silence] = {}

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is gone."""
        owner, beat = trial.user_attrs.get(OWNER), trial.user_attrs.get(BEAT)
        if owner is not None and owner["machine"] == _machine():
            return not _is_alive(owner)
        now = time.monotonic()
        seen = self._seen.get(trial.number)
        if seen is None or seen.beat != beat:
            self._seen[trial.number] = _Silence(beat, now)
            return False
        seen.seconds += min(now - seen.looked_at, self._heartbeat_seconds)
        seen.looked_at = now
        return seen.seconds > _MISSED_BEATS * self._heartbeat_seconds


def _machine() -> str:
    """A name for this machine since it was started; of a container its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbering = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        # Not Linux: a machine that was started anew may have the same process numbers, at other times.
        boot = numbering = ""
    return f"{socket.gethostname()} {boot} {numbering}".strip()


def _is_alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["process"])
        # Not to the bit: it is counted from the time at which the machine was started, which moves as its clock is set.
        same = abs(process.create_time() - owner["since"]) < _CLOCK_SECONDS
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

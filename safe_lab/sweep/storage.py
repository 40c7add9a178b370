"""Where a study is kept: SQLite for one worker, a journal file for several on one machine, a database or gRPC proxy for many.

``sqlite:///PATH``, ``journal://PATH``, ``postgresql://...``, ``mysql://...``, any other URL that SQLAlchemy knows, and
``grpc://HOST:PORT`` for Optuna's proxy in front of one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from safe_lab.section import ConfigError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# Scheme of an address -> the driver that is taken for it, and what brings that.
_DRIVERS = {
    "postgresql": ("psycopg", "postgresql+psycopg", "postgresql"),
    "postgres": ("psycopg", "postgresql+psycopg", "postgresql"),
    "mysql": ("pymysql", "mysql+pymysql", "mysql"),
}
FIRST_PATIENCE_SECONDS = 30.0
PATIENCE_SECONDS = 600.0
_LONGEST_PAUSE_SECONDS = 30.0
# How the names of Optuna's questions to a storage begin.
_CALLS = ("create_", "delete_", "get_", "set_")


def default_path(folder: Path, *, several: bool) -> Path:
    """The study's own file in its folder, for one worker or several."""
    return folder / ("study.journal" if several else "study.db")


def default_address(folder: Path, *, several: bool) -> str:
    """The address of that file."""
    return f"{'journal://' if several else 'sqlite:///'}{default_path(folder, several=several)}"


def takes_one_worker(address: str) -> bool:
    """Whether only one worker may write there."""
    return address.startswith("sqlite")


def hide_password(address: str) -> str:
    """An address as it may be shown.

    >>> hide_password("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    shown = re.sub(r"(://[^:/@]*:).*@", r"\1***@", address)
    return re.sub(r"(password=)[^&]*", r"\1***", shown)


def open_storage(address: str) -> BaseStorage:
    """The storage at an address; whatever it is asked is asked again while it does not answer, for ten minutes.

    An answer that got lost may have been heard all the same. A trial that was asked for twice has one that nobody owns, which is
    taken up like any that was left.

    Raises:
        ConfigError: There is no such kind of storage, its driver is missing, or it does not answer.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        raise ConfigError(f"--storage {address}: an address such as postgresql://user@host/database is needed")
    build, shown = _builder(scheme, address, rest), f"storage {hide_password(address)}"
    try:
        storage = _patiently(build, what=shown, seconds=FIRST_PATIENCE_SECONDS)
    except _failures() as error:
        raise ConfigError(f"{shown} does not answer: {_first_line(error)}") from None
    for name in dir(storage):
        if name.startswith(_CALLS):
            setattr(storage, name, partial(_call_patiently, getattr(storage, name), what=shown))
    return storage


def _call_patiently(call: Callable[..., Answer], *arguments: Any, what: str, **named: Any) -> Answer:
    try:
        return _patiently(lambda: call(*arguments, **named), what=what, seconds=PATIENCE_SECONDS)
    except _failures() as error:
        raise ConnectionError(f"{what} does not answer: {_first_line(error)}") from error


def _builder(scheme: str, address: str, rest: str) -> Callable[[], BaseStorage]:
    if scheme == "journal":
        # Optuna asks for a subclass of a lock that it does not export, and uses these two methods of it (5.0).
        return lambda: JournalStorage(JournalFileBackend(rest, lock_obj=_FlockOnJournal(rest)))  # type: ignore[arg-type]
    if scheme == "grpc":
        if find_spec("grpc") is None:
            raise ConfigError(f"storage {address}: no driver; pip install grpcio brings it")
        host, _, port = rest.strip("/").rpartition(":")
        if not (host and port.isdigit()):
            raise ConfigError(f"--storage {address}: it reads grpc://HOST:PORT")
        return lambda: _open_proxy(host, int(port))
    if scheme in _DRIVERS:
        module, full_scheme, extra = _DRIVERS[scheme]
        if find_spec(module) is None:
            raise ConfigError(f"storage {hide_password(address)}: no driver; pip install 'safe-lab[{extra}]' brings it")
        address = f"{full_scheme}://{rest}"
    return lambda: _open_database(address)


def _open_database(address: str) -> BaseStorage:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    # A connection that the server has closed in the meantime is opened anew.
    known = address.startswith(tuple(driver for _, driver, _ in _DRIVERS.values()))
    engine: dict[str, Any] = {"pool_pre_ping": True} | ({"connect_args": {"connect_timeout": 10}} if known else {})
    try:
        # With the cache that Optuna puts before a database; which reads braces in an address as its own.
        braced = address.replace("{", "{{").replace("}", "}}")
        return get_storage(RDBStorage(braced, engine_kwargs={} if address.startswith("sqlite") else engine))
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(f"storage {hide_password(address)}: {_first_line(error)}") from None


def _open_proxy(host: str, port: int) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=10)
    # It answers, and what it stands in front of does too.
    proxy.get_all_studies()
    return proxy


def _patiently(ask: Callable[[], Answer], *, what: str, seconds: float) -> Answer:
    """Ask a storage, and ask again, with longer and longer pauses, while it does not answer.

    Args:
        ask: The question.
        what: Whom, for the warning.
        seconds: After which the last failure is raised.
    """
    pause, began = 0.5, time.monotonic()
    while True:
        try:
            return ask()
        except _failures() as error:
            if time.monotonic() - began + pause > seconds:
                raise
            log.warning("%s does not answer (%s); trying again in %.0f s", what, _first_line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _failures() -> tuple[type[Exception], ...]:
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    found: list[Any] = [StorageInternalError, DBAPIError, PoolTimeoutError, ConnectionError, TimeoutError]
    if find_spec("grpc") is not None:
        import grpc

        found.append(grpc.RpcError)
        found.append(grpc.FutureTimeoutError)
    return tuple(found)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _FlockOnJournal:
    """Holds a journal by a lock that goes with the process, however it ends, and mends what a process left that died in a write.

    Optuna's own locks (5.0) are files that a killed process leaves behind, for which the others wait half a minute; and a line
    that was written in part makes the whole journal unreadable as soon as the next one is added to it.
    """

    def __init__(self, journal: str) -> None:
        self._journal = Path(journal)
        self._lock_path = Path(f"{journal}.lock-held")
        self._held: Any = None

    def acquire(self) -> bool:
        self._held = self._lock_path.open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        _cut_last_line(self._journal)
        return True

    def release(self) -> None:
        self._held.close()
        self._held = None


def _cut_last_line(path: Path) -> None:
    """Remove what stands behind the last line end of a file."""
    with path.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0:
            return
        stream.seek(size - 1)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        kept = stream.read().rfind(b"\n") + 1
        stream.truncate(kept)
        log.warning("%s: its last line was cut off in a write and is removed", path)

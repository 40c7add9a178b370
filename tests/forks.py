"""``safe-lab`` in forks of this process, which has imported what it needs already.

A study takes a command, a worker, a nursery and trainings, which, fresh, import torch and transformers over and over. A fork is a
process of its own all the same, with its own log and exit code. What is said of processes that are killed is tested on fresh
ones.
"""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState


class Fork:
    """A call in a process of its own, as :class:`subprocess.Popen` has it; leaving ends it."""

    def __init__(self, call, stdout, stderr, environment=()):
        read, self._held = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._held)
            _become(call, read, stdout, stderr, dict(environment))
        os.close(read)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._held)

    def poll(self):
        """Its exit code, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        """The same, waited for."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode


def command(arguments, stdout, stderr, environment=(), folder="."):
    """A command of ``safe-lab``, begun in a folder, whose workers and trainings are forks too."""
    words = [str(argument) for argument in arguments]
    if torch.cuda.is_available():
        # CUDA does not outlive a fork.
        return _start_fresh(words, stdout, stderr, environment, folder)

    def call():
        from safe_lab.ablation import running
        from safe_lab.bench import processes
        from safe_lab.cli import main
        from safe_lab.sweep import supervisor, worker_process

        processes.started = supervisor.started = _started
        running.Nursery = worker_process.Nursery = _Nursery
        os.chdir(folder)
        sys.argv = ["safe-lab", *words]
        return main(words)

    return Fork(call, stdout, stderr, environment)


def _start_fresh(words, stdout, stderr, environment, folder):
    with Path(stdout).open("a") as printed, Path(stderr).open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "safe_lab", *words],
            stdout=printed,
            stderr=said,
            env=os.environ | dict(environment),
            cwd=folder,
        )


@contextmanager
def _started(arguments, log, environment):
    """In place of :func:`safe_lab.child.started`."""
    log.write_bytes(b"")
    with Fork(lambda: importlib.import_module(arguments[0]).main(arguments[1:]), log, log, environment) as fork:
        yield fork


class _Nursery:
    """In place of :class:`safe_lab.nursery.Nursery`."""

    def __init__(self, environment=()):
        self._environment = environment

    @contextmanager
    def start(self, arguments, log):
        from safe_lab.cli import main

        log.write_bytes(b"")
        with Fork(lambda: main(list(arguments)), log, log, self._environment) as fork:
            yield fork

    def close(self):
        pass


def _become(call, stdin, stdout, stderr, environment):
    code = 1
    try:
        os.setsid()
        os.dup2(stdin, 0)
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        # In place of pytest's.
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        for logger in (logging.getLogger(), logging.getLogger("safe_lab")):
            logger.handlers.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= environment
        AcceleratorState._reset_state(reset_partial_state=True)
        code = call()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as a process that was started has its last words
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

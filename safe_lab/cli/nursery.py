"""Forks commands of ``safe-lab``, one at a time, having imported what they need: ``python -m safe_lab.cli.nursery``.

A line of JSON on standard input, ``{"arguments": [...], "log": PATH}``, starts one; its process id comes on standard output,
and when it has ended its exit code, or the signal as a negative number. At the end of standard input everything ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn, TextIO

from safe_lab.child import end_with_parent
from safe_lab.cli.words import quiet_libraries

# What a training imports one way or another. Threads do not outlive a fork: those of numpy's linear algebra are made anew
# (OpenBLAS sees to that), and nothing else of this may start one.
_IMPORTED = (
    "safe_lab.run",
    "safe_lab.saved",
    "safe_lab.console",
    "datasets",
    "peft",
    "transformers.models.auto",
    "sklearn.metrics",
)


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    # What imports print is no answer.
    os.dup2(2, 1)
    quiet_libraries()
    for name in _IMPORTED:
        importlib.import_module(name)
    # What is there by now stays where it is, shared by all.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        held, holds = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(holds)
            os.close(answers.fileno())
            _become(order["arguments"], order["log"], held)
        os.close(held)
        print(pid, file=answers, flush=True)
        threading.Thread(target=_tell_end, args=(pid, holds, answers), daemon=True).start()
    # What still runs holds the other end of a pipe that closes now.
    os._exit(0)


def _tell_end(pid: int, holds: int, answers: TextIO) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(holds)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(arguments: list[str], log: str, held: int) -> NoReturn:
    """Run a command in this process, which was just forked, and end."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(held, 0)  # closes when the nursery ends, and this process ends then
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.setsid()
        sys.argv = ["safe-lab", *arguments]
        end_with_parent()
        from safe_lab.cli import main as run

        code = run(arguments)
    except SystemExit as ended:
        code = (0 if ended.code is None else 1) if not isinstance(ended.code, int) else ended.code
    except BaseException:  # noqa: BLE001 - the interpreter's own last words, as of a process that was started
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

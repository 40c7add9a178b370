"""What the commands share: how words are read, and how a person is told what is wrong with them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2
INTERRUPTED = 130
_SECONDS_FOR_PROCESS_0 = 5.0


class Parser(argparse.ArgumentParser):
    """Words in full alone; of several processes with the same ones, the first says what is wrong with them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        from safe_lab import launch

        if launch.rank() > 0:
            # As in tell: if this one is still there after that, the first had other words.
            time.sleep(_SECONDS_FOR_PROCESS_0)
        super().error(message)


def add_config(parser: Parser) -> None:
    """A YAML file and overrides."""
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key and value, in YAML")


def check_config_given(parser: Parser, chosen: argparse.Namespace) -> None:
    """End with a message if there is no YAML file among the words."""
    # A file's name may have an equals sign in it.
    if chosen.config is None or ("=" in chosen.config and not Path(chosen.config).is_file()):
        parser.error("a YAML file is needed first, such as experiments/quickstart.yaml")


def quiet_libraries() -> None:
    """Leave what is to be said to this package."""
    # Before torch and the libraries are imported: they read these once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)


def wide_console() -> Console:
    """Standard output, in a file as wide as tables want it."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def refuse(error: object) -> int:
    """Say what is wrong with what was given; returns the exit code."""
    tell("\n".join(f"error: {line}" for line in str(error).splitlines()))
    return BAD_INPUT


def tell(message: object, *, of_this_process: bool = False) -> None:
    """Print what went wrong, for all processes of a job alike unless it is of this one."""
    from safe_lab import launch

    rank = launch.rank()
    if rank and not of_this_process:
        # The launcher ends all of them once one has ended, so that process 0 must have its say first; and if this one is still
        # there after that, process 0 had nothing to say.
        time.sleep(_SECONDS_FOR_PROCESS_0)
        of_this_process = True
    prefix = f"process {rank}: " if of_this_process and launch.is_one_of_several() else ""
    print(f"{prefix}{message}", file=sys.stderr, flush=True)

"""The command line: ``safe-lab train``. Bad input gets one clear message and exit code 2; a traceback is for our bugs.

torch is imported only once a run starts, so that help and the answer to a bad configuration come in an instant.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safe_lab import config as configuration
from safe_lab import run_folder
from safe_lab.config import ConfigError

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="safe-lab",
        description="SAFE: adapter tuning that freezes what no longer matters, and measures what that buys.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["train"],
        help="train: tune a model as a YAML file says (safe-lab train --help lists every field)",
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] == "train":
        return train(words[1:])
    chosen = parser.parse_args(words)
    if chosen.version:
        from importlib.metadata import version

        print(f"safe-lab {version('safe-lab')}")
        return 0
    parser.print_help()
    return BAD_INPUT if words else 0


def train(arguments: Sequence[str]) -> int:
    """``safe-lab train``: one run from one YAML file."""
    parser = argparse.ArgumentParser(
        prog="safe-lab train",
        description="Tune a model as a YAML file says. A dotted key overrides a field: training.epochs=3 freezing.metric=fisher",
        add_help=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key and value, in YAML")
    parser.add_argument(
        "-h", "--help", action="store_true", help="this text, with every field of the YAML file, and exit"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved YAML and exit")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove what the run folder holds, and start anew")
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.help:
        parser.print_help()
        print_fields()
        return 0
    if chosen.config is None or "=" in chosen.config:
        parser.error("a YAML file is needed first, such as experiments/quickstart.yaml")
    if chosen.resume and chosen.overwrite:
        parser.error("--resume goes on, --overwrite starts anew: choose one")
    try:
        config = configuration.load(chosen.config, chosen.overrides)
    except ConfigError as error:
        return _refuse(str(error))
    if chosen.print_config:
        print(configuration.dump(config), end="")
        return 0
    return _run(config, resume=chosen.resume, overwrite=chosen.overwrite, quiet=chosen.quiet)


def _run(config: configuration.Config, *, resume: bool, overwrite: bool, quiet: bool) -> int:
    try:
        run_folder.check(config, resume=resume, overwrite=overwrite)
    except run_folder.AlreadyFinishedError as finished:
        print(finished, file=sys.stderr)
        return 0 if resume else BAD_INPUT
    except ConfigError as error:
        return _refuse(str(error))
    # Before torch and the libraries are imported: they read these once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from safe_lab.console import Console as RunConsole
    from safe_lab.console import log_to
    from safe_lab.run import run

    console = RunConsole(quiet=quiet)
    log_to(console)
    logging.captureWarnings(True)
    try:
        run(config, resume=resume, overwrite=overwrite, console=console)
    except ConfigError as error:
        return _refuse(str(error))
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"stopped: {error}; once that is mended, --resume goes on from the last checkpoint in {config.run_folder}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from the last checkpoint in {config.run_folder}", file=sys.stderr)
        return INTERRUPTED
    return 0


def print_fields() -> None:
    """Every field of a run's YAML: key, type, default, meaning."""
    table = Table(title="fields of the YAML file", title_justify="left", show_lines=False, expand=False)
    for heading, wrap in (("key", False), ("type", True), ("default", True), ("meaning", True)):
        table.add_column(heading, no_wrap=not wrap)
    for field in configuration.fields():
        table.add_row(*map(Text, field))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def _refuse(message: str) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT

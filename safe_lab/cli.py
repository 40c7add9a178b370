"""The command line. Bad input gets one clear message and exit code 2; a traceback is for our bugs.

A command is a function of its words, and a row of :data:`COMMANDS`. What it needs is imported when it runs: help comes in an
instant, and so does the answer to a bad configuration, without torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from safe_lab.config import Config

BAD_INPUT = 2
INTERRUPTED = 130
_SECONDS_FOR_PROCESS_0 = 5.0


class _Parser(argparse.ArgumentParser):
    """Words in full alone; of several processes with the same ones, the first says what is wrong with them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        from safe_lab import launch

        if launch.rank() > 0:
            # As in _tell: if this one is still there after that, the first had other words.
            time.sleep(_SECONDS_FOR_PROCESS_0)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]].run(words[1:])
    parser = _Parser(
        prog="safe-lab",
        description="SAFE: adapter tuning that freezes what no longer matters, and measures what that buys.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10s}{command.summary}" for name, command in COMMANDS.items())
        + "\n\nsafe-lab COMMAND --help tells more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    chosen = parser.parse_args(words)
    if chosen.command is not None:
        near = did_you_mean(chosen.command, COMMANDS)
        parser.error(f"there is no command {chosen.command!r}{near}; there are {', '.join(COMMANDS)}")
    if chosen.version:
        from importlib.metadata import version

        print(f"safe-lab {version('safe-lab')}")
        return 0
    parser.print_help()
    return BAD_INPUT if words else 0


def train(arguments: Sequence[str]) -> int:
    """``safe-lab train``: one run from one YAML file."""
    parser = _Parser(
        prog="safe-lab train",
        description="Tune a model as a YAML file says. A dotted key overrides a field: training.epochs=3 freezing.metric=fisher",
        add_help=False,
    )
    _add_config(parser)
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
    _check_config_given(parser, chosen)
    if chosen.resume and chosen.overwrite:
        parser.error("--resume goes on, --overwrite starts anew: choose one")

    from safe_lab import config as configuration
    from safe_lab.section import ConfigError

    try:
        config = configuration.load(chosen.config, chosen.overrides)
    except ConfigError as error:
        return _refuse(error)
    if chosen.print_config:
        print(configuration.dump(config), end="")
        return 0
    return _run(config, resume=chosen.resume, overwrite=chosen.overwrite, quiet=chosen.quiet)


def _run(config: Config, *, resume: bool, overwrite: bool, quiet: bool) -> int:
    from safe_lab import launch, run_folder
    from safe_lab.section import ConfigError

    try:
        launch.check()
        # Of several processes the first one looks, later, as only it may have the folder.
        if not launch.is_one_of_several():
            run_folder.check(config, resume=resume, overwrite=overwrite)
    except run_folder.AlreadyFinishedError as finished:
        print(finished, file=sys.stderr)
        return 0 if resume else BAD_INPUT
    except ConfigError as error:
        return _refuse(error)
    _quiet_libraries()
    from safe_lab.console import Console, log_to
    from safe_lab.memory import is_out_of_memory
    from safe_lab.processes import end_job, is_connection_lost
    from safe_lab.run import run

    console = Console(quiet=quiet or launch.rank() > 0)
    log_to(console, rank=launch.rank())
    goes_on = f"--resume goes on from the last checkpoint in {config.run_folder}"
    try:
        run(config, resume=resume, overwrite=overwrite, console=console)
    except run_folder.AlreadyFinishedError as finished:
        if launch.rank() == 0:
            print(finished, file=sys.stderr)
        return 0 if resume else BAD_INPUT
    except ConfigError as error:
        return _refuse(error)
    except FloatingPointError as error:
        _tell(f"stopped: {error}")
        return 1
    except OSError as error:
        _tell(f"stopped: {error}; once that is mended, {goes_on}", of_this_process=True)
        return 1
    except (RuntimeError, MemoryError) as error:
        if is_connection_lost(error):
            _tell(f"stopped: another process of this job has ended; {goes_on}", of_this_process=True)
        elif is_out_of_memory(error):
            _tell(
                f"stopped: memory ran out ({error}); set memory.budget or a smaller batch; {goes_on}",
                of_this_process=True,
            )
        else:
            raise
        return 1
    except KeyboardInterrupt:
        _tell(f"interrupted; {goes_on}")
        return INTERRUPTED
    end_job()
    return 0


def plan(arguments: Sequence[str]) -> int:
    """``safe-lab plan``: what a run would cost at every frozen depth, and what fits a memory budget."""
    parser = _Parser(
        prog="safe-lab plan",
        description="Predict peak memory by kind, FLOPs a step, trainable weights, optimizer and checkpoint size of a run at "
        "every frozen depth. Needs the configuration alone: no data, no weights, no GPU, no hub. model.path names a local "
        "folder with a config.json, or a known shape, as shape://roberta-large does.",
    )
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="also say which micro-batch, dtype, gradient checkpointing and frozen depth fit, say, 24GiB",
    )
    chosen = parser.parse_intermixed_args(arguments)
    _check_config_given(parser, chosen)

    from rich.console import Console

    from safe_lab import config as configuration
    from safe_lab.byte_size import parse_bytes
    from safe_lab.section import ConfigError

    try:
        config = configuration.load(chosen.config, chosen.overrides)
        budget_bytes = None if chosen.fit is None else parse_bytes(chosen.fit)
    except ConfigError as error:
        return _refuse(error)
    except ValueError as error:
        return _refuse(f"--fit: {error}")
    _quiet_libraries()
    from safe_lab import plan as planning
    from safe_lab.plan import show

    errors = Console(stderr=True)
    try:
        with errors.status("measuring steps on fake tensors"):
            planned = planning.plan(config)
            fit = None if budget_bytes is None else planning.find_fit(config, budget_bytes)
    except ValueError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    if chosen.json:
        print(show.to_json(planned, fit))
    else:
        show.print_tables(planned, fit, _wide_console())
    # For scripts: nothing fits.
    return 1 if fit is not None and fit.advice is None else 0


def bench(arguments: Sequence[str]) -> int:
    """``safe-lab bench``: transformers.Trainer and safe_lab side by side, measured in turn."""
    parser = _Parser(
        prog="safe-lab bench",
        description="Train the variants of a bench file in fresh processes that take turns (A B C A B C ...), and compare "
        "metric, seconds, memory and FLOPs with the baseline's. A dotted key overrides a field of the base: data.path=sst2",
    )
    _add_config(parser)
    parser.add_argument("--repetitions", type=int, metavar="N", help="trainings of each variant, instead of the file's")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the results; <output_dir>/bench-<name>/<time> by itself"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the bench in DIR: what is measured there already is kept"
    )
    chosen = parser.parse_intermixed_args(arguments)
    _check_config_given(parser, chosen)
    if chosen.resume and chosen.output is None:
        parser.error("--resume needs --output DIR, the folder of the bench to go on with")

    from rich.console import Console
    from rich.markup import escape

    from safe_lab import bench as benches
    from safe_lab.section import ConfigError

    errors = Console(stderr=True)
    status = errors.status("starting")

    def show(line: str, ended: bool) -> None:
        if ended:
            errors.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            status.update(escape(line[: errors.width - 4]))

    try:
        settings = benches.load(chosen.config, chosen.overrides, repetitions=chosen.repetitions)
        with benches.claim_folder(settings, chosen.output, resume=chosen.resume) as folder, status:
            comparison = benches.run(settings, folder, command=["safe-lab", "bench", *arguments], show=show)
    except ConfigError as error:
        return _refuse(error)
    except OSError as error:
        print(f"stopped: {error}; what was measured stays, and --output with --resume goes on with it", file=sys.stderr)
        return 1
    if chosen.json:
        print(benches.to_json(comparison))
    else:
        benches.print_tables(comparison, _wide_console())
    errors.print(f"files: {folder}", markup=False, highlight=False, soft_wrap=True)
    if comparison.failures:
        return 1
    if not comparison.complete:
        rest = f"the rest: safe-lab bench {folder / 'bench.yaml'} --output {folder} --resume"
        errors.print(rest, markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
    return 0


def sharpness(arguments: Sequence[str]) -> int:
    """``safe-lab sharpness``: curvature and landscape of finished runs, from their folders."""
    parser = _Parser(
        prog="safe-lab sharpness",
        description="Measure how sharp the minimum is that a finished run has found: Hessian trace, top eigenvalues, spectrum, "
        "rise of the loss in a ball and under noise, slices of its landscape. Writes result.json (under sharpness) and the "
        "folder sharpness of each run. Settings are those of the run's sharpness section (safe-lab train --help), overridden "
        "by key=value: samples=512 measures=[trace] landscape=[random_line]",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, or key=value")
    parser.add_argument(
        "--between",
        action="store_true",
        help="take the losses on the line between two runs, or the plane through three, and nothing of each by itself",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for what is of several runs together")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    chosen = parser.parse_intermixed_args(arguments)

    from pathlib import Path

    from safe_lab.section import ConfigError

    # A folder's name may have an equals sign in it.
    overrides = [word for word in chosen.runs if "=" in word and not Path(word).is_dir()]
    paths = [Path(word) for word in chosen.runs if word not in overrides]
    if not paths:
        parser.error("the folder of a finished run is needed, such as runs/quickstart/default/seed-0")
    for path in paths:
        if not path.is_dir():
            return _refuse(f"{path}: there is no such folder")
    _quiet_libraries()
    from safe_lab import launch
    from safe_lab.console import Console, log_to
    from safe_lab.memory import is_out_of_memory
    from safe_lab.processes import end_job, is_connection_lost
    from safe_lab.run_folder import to_json
    from safe_lab.saved import measure_between, measure_runs

    console = Console(quiet=launch.rank() > 0)
    log_to(console, rank=launch.rank())
    try:
        measure = measure_between if chosen.between else measure_runs
        output = None if chosen.output is None else Path(chosen.output)
        figures = measure(paths, overrides, output=output, console=console)
    except ConfigError as error:
        return _refuse(error)
    except FloatingPointError as error:
        _tell(f"stopped: {error}")
        return 1
    except OSError as error:
        _tell(f"stopped: {error}", of_this_process=True)
        return 1
    except (RuntimeError, MemoryError) as error:
        if is_connection_lost(error):
            _tell("stopped: another process of this job has ended", of_this_process=True)
        elif is_out_of_memory(error):
            _tell(f"stopped: memory ran out ({error}); lower sharpness.batch_tokens", of_this_process=True)
        else:
            raise
        return 1
    except KeyboardInterrupt:
        _tell("interrupted; what was measured of the runs before is in their folders")
        return INTERRUPTED
    end_job()
    if launch.rank() == 0:
        if chosen.json:
            print(to_json(next(iter(figures.values())) if len(figures) == 1 else figures))
        elif not chosen.between:
            console.show_sharpness(figures)
    return 0


def print_fields() -> None:
    """Every field of a run's YAML: key, type, default, meaning."""
    from rich.table import Table
    from rich.text import Text

    from safe_lab import config as configuration

    table = Table(title="fields of the YAML file", title_justify="left", show_lines=False, expand=False)
    for heading, wrap in (("key", False), ("type", True), ("default", True), ("meaning", True)):
        table.add_column(heading, no_wrap=not wrap)
    for field in configuration.fields():
        table.add_row(*map(Text, field))
    _wide_console().print(table)


@dataclass(frozen=True)
class Command:
    """One row of :data:`COMMANDS`.

    Attributes:
        summary: One line for ``safe-lab --help``.
        run: Takes the words after the command's name, returns the exit code.
    """

    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Command("tune a model as a YAML file says (train --help lists every field)", train),
        "plan": Command("predict memory, FLOPs and sizes of a run at every frozen depth, without weights", plan),
        "sharpness": Command("measure how sharp the minimum is that finished runs have found", sharpness),
        "bench": Command("measure transformers.Trainer and safe_lab side by side", bench),
    }
)


def _add_config(parser: _Parser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key and value, in YAML")


def _check_config_given(parser: _Parser, chosen: argparse.Namespace) -> None:
    if chosen.config is None or "=" in chosen.config:
        parser.error("a YAML file is needed first, such as experiments/quickstart.yaml")


def _quiet_libraries() -> None:
    # Before torch and the libraries are imported: they read these once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)


def _wide_console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _refuse(error: object) -> int:
    _tell("\n".join(f"error: {line}" for line in str(error).splitlines()))
    return BAD_INPUT


def _tell(message: object, *, of_this_process: bool = False) -> None:
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

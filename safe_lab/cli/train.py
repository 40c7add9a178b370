"""``safe-lab train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safe_lab.cli.words import (
    BAD_INPUT,
    INTERRUPTED,
    Parser,
    add_config,
    check_config_given,
    quiet_libraries,
    refuse,
    tell,
    wide_console,
)

if TYPE_CHECKING:
    from safe_lab.config import Config


def train(arguments: Sequence[str]) -> int:
    """``safe-lab train``: one run from one YAML file."""
    parser = Parser(
        prog="safe-lab train",
        description="Tune a model as a YAML file says. A dotted key overrides a field: training.epochs=3 freezing.metric=fisher",
        add_help=False,
    )
    add_config(parser)
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
    check_config_given(parser, chosen)
    if chosen.resume and chosen.overwrite:
        parser.error("--resume goes on, --overwrite starts anew: choose one")

    from safe_lab import config as configuration
    from safe_lab.section import ConfigError

    try:
        config = configuration.load(chosen.config, chosen.overrides)
    except ConfigError as error:
        return refuse(error)
    if chosen.print_config:
        print(configuration.dump(config), end="")
        return 0
    return _run(config, resume=chosen.resume, overwrite=chosen.overwrite, quiet=chosen.quiet)


def _run(config: Config, *, resume: bool, overwrite: bool, quiet: bool) -> int:
    from safe_lab import launch, run_folder
    from safe_lab.child import FAULT_OF_MACHINE
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
        return refuse(error)
    quiet_libraries()
    from safe_lab.console import Console, log_to
    from safe_lab.memory import is_out_of_memory
    from safe_lab.processes import end_job, is_connection_lost
    from safe_lab.run import run

    console = Console(quiet=quiet or launch.rank() > 0)
    log_to(console, rank=launch.rank())
    if resume and not (config.run_folder / "config.yaml").exists():
        console.say(f"{config.run_folder}: there is no run to go on with: it begins")
    goes_on = f"--resume goes on from the last checkpoint in {config.run_folder}"
    try:
        run(config, resume=resume, overwrite=overwrite, console=console)
    except run_folder.AlreadyFinishedError as finished:
        if launch.rank() == 0:
            print(finished, file=sys.stderr)
        return 0 if resume else BAD_INPUT
    except ConfigError as error:
        return refuse(error)
    except FloatingPointError as error:
        tell(f"stopped: {error}")
        return 1
    except OSError as error:
        tell(f"stopped: {error}; once that is mended, {goes_on}", of_this_process=True)
        return FAULT_OF_MACHINE
    except (RuntimeError, MemoryError) as error:
        if is_connection_lost(error):
            tell(f"stopped: another process of this job has ended; {goes_on}", of_this_process=True)
        elif is_out_of_memory(error):
            tell(
                f"stopped: memory ran out ({error}); set memory.budget or a smaller batch; {goes_on}",
                of_this_process=True,
            )
        else:
            raise
        return 1
    except KeyboardInterrupt:
        tell(f"interrupted; {goes_on}")
        return INTERRUPTED
    end_job()
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
    wide_console().print(table)

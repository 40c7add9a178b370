"""``safe-lab sweep``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from safe_lab.cli.words import INTERRUPTED, Parser, add_config, check_config_given, refuse, wide_console


def sweep(arguments: Sequence[str]) -> int:
    """``safe-lab sweep``: a study over freezing schedules, begun or gone on with."""
    parser = Parser(
        prog="safe-lab sweep",
        description="Search what a study file says with Optuna: each trial trains in processes of its own. The same command goes "
        "on with a study that was ended in any way, and joins one that runs. A dotted key overrides a field of the base: "
        "data.path=sst2",
    )
    add_config(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time on this machine")
    parser.add_argument("--trials", type=int, metavar="N", help="trials of the whole study, instead of the file's")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="where the study is kept: postgresql://..., mysql://..., grpc://HOST:PORT, journal://PATH, sqlite:///PATH; by "
        "itself a file in the study's folder, SQLite for one worker and a journal for several",
    )
    parser.add_argument("--export", metavar="DIR", help="write each point of the front as a YAML file that trains it")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    chosen = parser.parse_intermixed_args(arguments)
    check_config_given(parser, chosen)
    if chosen.workers < 1:
        parser.error(f"--workers {chosen.workers}: at least one is needed")

    from pathlib import Path

    from rich.console import Console

    from safe_lab import sweep as sweeping
    from safe_lab.run_folder import to_json
    from safe_lab.section import ConfigError

    errors = Console(stderr=True)

    def show(line: str) -> None:
        errors.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        study_file = sweeping.load(chosen.config, chosen.overrides, num_trials=chosen.trials)
        export = None if chosen.export is None else Path(chosen.export)
        outcome = sweeping.run(study_file, workers=chosen.workers, address=chosen.storage, export=export, show=show)
    except ConfigError as error:
        return refuse(error)
    except (RuntimeError, OSError) as error:
        print(f"stopped: {error}\nthe same command goes on with the study", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show("interrupted; the same command goes on with the study")
        return INTERRUPTED
    if chosen.json:
        print(to_json(outcome.to_dict()))
    else:
        sweeping.print_tables(outcome, wide_console())
    show(f"files: {study_file.folder}")
    # For scripts: there is nothing that did not fail.
    return 1 if outcome.all_failed else 0

"""``safe-lab sharpness``."""

from __future__ import annotations

from collections.abc import Sequence

from safe_lab.cli.words import INTERRUPTED, Parser, quiet_libraries, refuse, tell


def sharpness(arguments: Sequence[str]) -> int:
    """``safe-lab sharpness``: curvature and landscape of finished runs, from their folders."""
    parser = Parser(
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
            return refuse(f"{path}: there is no such folder")
    quiet_libraries()
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
        return refuse(error)
    except FloatingPointError as error:
        tell(f"stopped: {error}")
        return 1
    except OSError as error:
        tell(f"stopped: {error}", of_this_process=True)
        return 1
    except (RuntimeError, MemoryError) as error:
        if is_connection_lost(error):
            tell("stopped: another process of this job has ended", of_this_process=True)
        elif is_out_of_memory(error):
            tell(f"stopped: memory ran out ({error}); lower sharpness.batch_tokens", of_this_process=True)
        else:
            raise
        return 1
    except KeyboardInterrupt:
        tell("interrupted; what was measured of the runs before is in their folders")
        return INTERRUPTED
    end_job()
    if launch.rank() == 0:
        if chosen.json:
            print(to_json(next(iter(figures.values())) if len(figures) == 1 else figures))
        elif not chosen.between:
            console.show_sharpness(figures)
    return 0

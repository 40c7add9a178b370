"""``safe-lab ablate``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from safe_lab.cli.words import INTERRUPTED, Parser, add_config, check_config_given, refuse, wide_console


def ablate(arguments: Sequence[str]) -> int:
    """``safe-lab ablate``: an experiment of variants and seeds, begun or gone on with, and what it comes to."""
    parser = Parser(
        prog="safe-lab ablate",
        description="Train the variants of an experiment file with every seed, each run in a process of its own, and hold them "
        "against the baseline. What is there is kept, what the file has changed is trained anew, and the same command goes on "
        "with an experiment that was ended in any way. A dotted key overrides a field of the base: data.path=sst2",
    )
    add_config(parser)
    parser.add_argument("--baseline", metavar="VARIANT", help="hold the others against this one, instead of the file's")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trainings at a time on this machine")
    parser.add_argument(
        "--dry-run", action="store_true", help="tell which runs would be kept, begun, or trained anew, and train none"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    chosen = parser.parse_intermixed_args(arguments)
    check_config_given(parser, chosen)
    if chosen.workers < 1:
        parser.error(f"--workers {chosen.workers}: at least one is needed")

    from rich.console import Console

    from safe_lab import ablation, report
    from safe_lab.ablation import show
    from safe_lab.run_folder import to_json
    from safe_lab.section import ConfigError
    from safe_lab.whole_file import whole_file

    errors = Console(stderr=True)
    try:
        experiment = ablation.load(chosen.config, chosen.overrides, baseline=chosen.baseline)
        if chosen.dry_run:
            if chosen.json:
                print(to_json(show.tell_outlook(experiment)))
            else:
                show.print_outlook(experiment, wide_console())
            return 0
        with show.live(experiment, errors) as tell:
            comparison = ablation.run(experiment, workers=chosen.workers, show=tell)
    except ConfigError as error:
        return refuse(error)
    except OSError as error:
        print(f"stopped: {error}\nthe same command goes on with the experiment", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the experiment", file=sys.stderr)
        return INTERRUPTED
    if chosen.json:
        print(to_json(comparison.to_dict()))
    else:
        show.print_comparison(comparison, wide_console())
    page = experiment.folder / "report.html"
    try:
        with whole_file(page) as stream:
            stream.write(report.write_page(report.read_source([experiment.folder], baseline=chosen.baseline)).encode())
    except OSError as error:
        again = shlex.join(["safe-lab", "report", str(experiment.folder), "--output", str(page)])
        print(f"{page}: cannot be written ({error}); `{again}` makes it again", file=sys.stderr)
        return 1
    print(f"report: {page}", file=sys.stderr)
    # For scripts: nothing can be compared.
    return 1 if all(row.faults and not row.cells for row in comparison.rows) else 0

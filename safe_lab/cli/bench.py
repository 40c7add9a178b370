"""``safe-lab bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from safe_lab.cli.words import INTERRUPTED, Parser, add_config, check_config_given, refuse, wide_console


def bench(arguments: Sequence[str]) -> int:
    """``safe-lab bench``: transformers.Trainer and safe_lab side by side, measured in turn."""
    parser = Parser(
        prog="safe-lab bench",
        description="Train the variants of a bench file in fresh processes that take turns (A B C A B C ...), and compare "
        "metric, seconds, memory and FLOPs with the baseline's. A dotted key overrides a field of the base: data.path=sst2",
    )
    add_config(parser)
    parser.add_argument("--repetitions", type=int, metavar="N", help="trainings of each variant, instead of the file's")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the results; <output_dir>/bench-<name>/<time> by itself"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the bench in DIR: what is measured there already is kept"
    )
    chosen = parser.parse_intermixed_args(arguments)
    check_config_given(parser, chosen)
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
        return refuse(error)
    except OSError as error:
        print(f"stopped: {error}; what was measured stays, and --output with --resume goes on with it", file=sys.stderr)
        return 1
    if chosen.json:
        print(benches.to_json(comparison))
    else:
        benches.print_tables(comparison, wide_console())
    errors.print(f"files: {folder}", markup=False, highlight=False, soft_wrap=True)
    if comparison.failures:
        return 1
    if not comparison.complete:
        rest = f"the rest: safe-lab bench {folder / 'bench.yaml'} --output {folder} --resume"
        errors.print(rest, markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
    return 0

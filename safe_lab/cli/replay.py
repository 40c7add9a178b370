"""``safe-lab replay``."""

from __future__ import annotations

from collections.abc import Sequence

from safe_lab.cli.words import INTERRUPTED, Parser, quiet_libraries, refuse, wide_console


def replay(arguments: Sequence[str]) -> int:
    """``safe-lab replay``: when another schedule would have frozen what, and at what cost, from what a run has recorded."""
    parser = Parser(
        prog="safe-lab replay",
        description="Tell, from the scores that a finished run has recorded and without training, which units would have frozen "
        "when under another schedule, and by the planner what memory, FLOPs and time that run would have taken: "
        "safe-lab replay runs/sst2/default/seed-0 freezing.final_threshold=0.1 freezing.final=3. How far that is from the truth "
        "is measured on the finished runs beside it whose schedules are others.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key and value, in YAML")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="folder of a run to measure by, instead of those beside this one; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    chosen = parser.parse_intermixed_args(arguments)

    from pathlib import Path

    from safe_lab.section import ConfigError

    quiet_libraries()
    from rich.console import Console

    from safe_lab import replay as replaying
    from safe_lab.replay import show
    from safe_lab.run_folder import to_json

    errors = Console(stderr=True)
    try:
        replayer = replaying.Replayer(replaying.read_recording(Path(chosen.run)))
        config = replaying.configure(replayer.recording, chosen.overrides)
        with errors.status("replaying"):
            replayed = replayer.replay(config)
            against = [replaying.read_recording(Path(path)) for path in chosen.against]
            comparisons = [replayer.compare(other) for other in against] or replayer.compare_beside()
    except ConfigError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    if chosen.json:
        print(to_json(replayed.to_dict() | {"measured": [found.to_dict() for found in comparisons]}))
    else:
        show.print_tables(replayed, comparisons, wide_console())
    return 0

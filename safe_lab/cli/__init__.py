"""The command line. Bad input gets one clear message and exit code 2; a traceback is for our bugs.

A command is a function of its words, in a file of its own, and a row of :data:`COMMANDS`. What it needs is imported when it
runs: help comes in an instant, and so does the answer to a bad configuration, without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from safe_lab.cli.ablate import ablate
from safe_lab.cli.bench import bench
from safe_lab.cli.plan import plan
from safe_lab.cli.replay import replay
from safe_lab.cli.report import report
from safe_lab.cli.sharpness import sharpness
from safe_lab.cli.sweep import sweep
from safe_lab.cli.train import train
from safe_lab.cli.words import BAD_INPUT, Parser
from safe_lab.suggest import did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]].run(words[1:])
    parser = Parser(
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
        "ablate": Command("train variants with several seeds, and say what differs and whether that is real", ablate),
        "sweep": Command("search over freezing schedules with Optuna, on one core or many machines", sweep),
        "replay": Command(
            "tell from a finished run what another schedule would have frozen when, and its costs", replay
        ),
        "report": Command("write what runs or an experiment came to, as one page to read or as a table", report),
        "bench": Command("measure transformers.Trainer and safe_lab side by side", bench),
    }
)

"""``safe-lab plan``."""

from __future__ import annotations

from collections.abc import Sequence

from safe_lab.cli.words import (
    INTERRUPTED,
    Parser,
    add_config,
    check_config_given,
    quiet_libraries,
    refuse,
    wide_console,
)


def plan(arguments: Sequence[str]) -> int:
    """``safe-lab plan``: what a run would cost at every frozen depth, and what fits a memory budget."""
    parser = Parser(
        prog="safe-lab plan",
        description="Predict peak memory by kind, FLOPs a step, trainable weights, optimizer and checkpoint size of a run at "
        "every frozen depth. Needs the configuration alone: no data, no weights, no GPU, no hub. model.path names a local "
        "folder with a config.json, or a known shape, as shape://roberta-large does.",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="also say which micro-batch, dtype, gradient checkpointing and frozen depth fit, say, 24GiB",
    )
    chosen = parser.parse_intermixed_args(arguments)
    check_config_given(parser, chosen)

    from rich.console import Console

    from safe_lab import config as configuration
    from safe_lab.byte_size import parse_bytes
    from safe_lab.section import ConfigError

    try:
        config = configuration.load(chosen.config, chosen.overrides)
        budget_bytes = None if chosen.fit is None else parse_bytes(chosen.fit)
    except ConfigError as error:
        return refuse(error)
    except ValueError as error:
        return refuse(f"--fit: {error}")
    quiet_libraries()
    from safe_lab import plan as planning
    from safe_lab.plan import show

    errors = Console(stderr=True)
    try:
        with errors.status("measuring steps on fake tensors"):
            planned = planning.plan(config)
            fit = None if budget_bytes is None else planning.find_fit(config, budget_bytes)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    if chosen.json:
        print(show.to_json(planned, fit))
    else:
        show.print_tables(planned, fit, wide_console())
    # For scripts: nothing fits.
    return 1 if fit is not None and fit.advice is None else 0

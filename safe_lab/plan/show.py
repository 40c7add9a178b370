"""A plan for people, as tables, and for machines, as JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from safe_lab.byte_size import format_bytes
from safe_lab.memory.ledger import KINDS
from safe_lab.plan.fit import Fit, Option
from safe_lab.plan.rows import Plan


def to_json(plan: Plan, fit: Fit | None) -> str:
    """The plan as one JSON object; with ``fit`` under its name where it was asked for."""
    return json.dumps(plan.to_dict() | ({} if fit is None else {"fit": fit.to_dict()}), indent=1, ensure_ascii=False)


def print_tables(plan: Plan, fit: Fit | None, console: Console) -> None:
    """A line for each frozen depth, the notes, and what fits."""
    model, step = plan.model, plan.step
    accumulated = f" x {step['gradient_accumulation']}" if step["gradient_accumulation"] > 1 else ""
    precision = "" if step["mixed_precision"] == "none" else f", mixed precision {step['mixed_precision']}"
    checkpointing = ", gradient checkpointing" if step["gradient_checkpointing"] else ""
    _say(
        console,
        f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:,.1f} M weights, {step['adapter']}",
    )
    _say(
        console,
        f"a step: {step['batch_size']}{accumulated} examples x {step['tokens']} tokens, {step['dtype']}{precision}, "
        f"{step['attention']} attention{checkpointing}",
    )
    kinds = [kind for kind in KINDS if any(row.bytes[kind] for row in plan.rows)]
    table = Table(title=f"by frozen depth, in units ({step['unit']}) from the input", title_justify="left")
    for heading in ("depth", "peak", *kinds, "TFLOP a step", "of depth 0", "trainable", "checkpoint"):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        table.add_row(
            str(row.frozen_depth),
            format_bytes(row.peak_bytes),
            *(format_bytes(row.bytes[kind]) for kind in kinds),
            f"{row.flops_per_step / 1e12:.4g}",
            f"{row.flops_per_step / plan.rows[0].flops_per_step:.0%}",
            f"{row.trainable_parameters:,}",
            format_bytes(row.checkpoint_bytes),
        )
    console.print(table)
    if plan.stages:
        console.print(_stage_table(plan))
        _say(
            console,
            f"Gradients of the micro-batches add up to {step['batch_size']} examples; shorter rows go more at a time.",
        )
    if fit is not None:
        console.print(_fit_table(fit))
        _say(console, fit.sentence)
        _say(console, f"A micro-batch has {fit.rows_per_step} examples at the most here: training.batch_size sets it.")
    for note in plan.notes:
        _say(console, note)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _stage_table(plan: Plan) -> Table:
    table = Table(title=f"micro-batches within memory.budget, {plan.step['memory_budget']}", title_justify="left")
    for heading in ("depth", "longest rows at a time", "checkpointing", "peak"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        recomputes = "on" if stage.gradient_checkpointing else "off"
        peak = format_bytes(stage.peak_bytes)
        table.add_row(str(stage.frozen_depth), str(stage.micro_batch_rows), recomputes, peak)
    return table


def _fit_table(fit: Fit) -> Table:
    table = Table(
        title=f"what fits {format_bytes(fit.budget_bytes)}: largest micro-batch, of {fit.rows_per_step} examples a step",
        title_justify="left",
    )
    table.add_column("dtype")
    table.add_column("checkpointing")
    for largest in fit.options[0].largest:
        table.add_column(f"depth {largest.frozen_depth}", justify="right")
    table.add_column(f"{fit.batch_size} fit from depth", justify="right")
    for option in fit.options:
        table.add_row(*_cells(option))
    return table


def _cells(option: Option) -> list[str]:
    return [
        option.dtype,
        "on" if option.gradient_checkpointing else "off",
        *(
            f"{largest.batch_size} ({format_bytes(largest.peak_bytes)})"
            if largest.batch_size
            else f"- (1 takes {format_bytes(largest.peak_bytes)})"
            for largest in option.largest
        ),
        "none" if option.smallest_frozen_depth is None else str(option.smallest_frozen_depth),
    ]

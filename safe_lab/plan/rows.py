"""The plan of a run: what a step costs at every frozen depth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safe_lab.config import Config
from safe_lab.memory.ledger import KINDS, PHASES
from safe_lab.plan.depths import Figures, fill_depths, find_period
from safe_lab.plan.stages import StageRow, plan_stages
from safe_lab.plan.subject import Subject, build_subject

NOT_INCLUDED = (
    "Not in the figures: what an allocator keeps back, the CUDA context and the workspaces of libraries, scoring and evaluation, "
    "the headers of checkpoint files. The operators are those of the CPU: on CUDA fused attention keeps less."
)


@dataclass(frozen=True)
class Row:
    """What a run costs while the first ``frozen_depth`` units from the input are frozen.

    Attributes:
        frozen_depth: Length of the frozen run from the input, in units.
        peak_bytes: Most bytes live in a step.
        bytes: Those bytes by kind, :data:`safe_lab.memory.KINDS`; ``cache``: initial adapter and best weights.
        flops_per_step: Of an optimizer step with all its micro-batches.
        flops: The same by phase; recomputation is in ``backward``.
        trainable_parameters: Weights that still train.
        optimizer_bytes: State of the optimizer.
        checkpoint_bytes: Tensors of one checkpoint.
        measured: Whether a step was traced at this depth; else the row follows from those that were.
    """

    frozen_depth: int
    peak_bytes: int
    bytes: dict[str, int]
    flops_per_step: int
    flops: dict[str, int]
    trainable_parameters: int
    optimizer_bytes: int
    checkpoint_bytes: int
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        model: ``name`` (``model.path``), ``layers``, ``units`` and ``parameters``, adapters and head included.
        step: The settings that decide: rows, tokens, dtype and so on.
        rows: By frozen depth, from 0 to the number of units; of whole batches.
        stages: With ``memory.budget``, what it makes of a batch at some depths; without, nothing.
        notes: How the figures came about and what is not in them, in sentences.
    """

    model: dict[str, Any]
    step: dict[str, Any]
    rows: tuple[Row, ...]
    stages: tuple[StageRow, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def plan(config: Config) -> Plan:
    """Predict what a run costs at every frozen depth, from its configuration alone.

    Args:
        config: The run. Nothing of its data, weights or hub is touched.

    Raises:
        ValueError: The configuration asks for what there is not, the model can be run neither on fake nor real tensors, or not
            even a single row fits ``memory.budget``.
    """
    subject = build_subject(config)
    units = subject.rehearsal.units
    period = find_period(subject.rehearsal.model, units)
    figures, measured = fill_depths(len(units), period, lambda depth: _measure(config, subject, depth))
    return Plan(
        model={
            "name": config.model.path,
            "layers": subject.layers,
            "units": len(units),
            "parameters": subject.parameters,
        },
        step={
            "batch_size": config.training.batch_size,
            "gradient_accumulation": config.training.gradient_accumulation,
            "tokens": config.data.max_length,
            "labels": subject.num_labels,
            "dtype": config.model.dtype,
            "mixed_precision": config.training.mixed_precision,
            "attention": subject.attention,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            "memory_budget": config.memory.budget,
            "adapter": config.adapter.method,
            "unit": config.freezing.unit,
        },
        rows=tuple(_row(subject, depth, figures[depth], depth in measured) for depth in range(len(units) + 1)),
        stages=plan_stages(config, num_units=len(units), num_labels=subject.num_labels),
        notes=(*subject.notes, *_note_padding(config), _describe(len(measured), len(units) + 1, period), NOT_INCLUDED),
    )


def _measure(config: Config, subject: Subject, depth: int) -> Figures:
    rehearsal, accumulation = subject.rehearsal, config.training.gradient_accumulation
    trace = rehearsal.trace(range(depth), rows=config.training.batch_size, accumulating=accumulation > 1)
    return {
        **trace.peak,
        **{phase: flops * accumulation for phase, flops in trace.flops.items()},
        "peak_bytes": trace.peak_bytes,
        "trainable_parameters": rehearsal.num_trainable,
        "optimizer_bytes": rehearsal.optimizer_bytes,
    }


def _row(subject: Subject, depth: int, figures: Figures, measured: bool) -> Row:
    return Row(
        frozen_depth=depth,
        peak_bytes=figures["peak_bytes"] + subject.kept_bytes,
        bytes={kind: figures[kind] for kind in KINDS} | {"cache": subject.kept_bytes},
        flops_per_step=sum(figures[phase] for phase in PHASES),
        flops={phase: figures[phase] for phase in PHASES},
        trainable_parameters=figures["trainable_parameters"],
        optimizer_bytes=figures["optimizer_bytes"],
        checkpoint_bytes=subject.checkpoint_weight_bytes + figures["optimizer_bytes"],
        measured=measured,
    )


def _note_padding(config: Config) -> tuple[str, ...]:
    if config.savings.trim_padding is None:
        return ()
    return ("savings.trim_padding spares padding, of which a planned step has none: every row is full.",)


def _describe(num_measured: int, num_depths: int, period: int | None) -> str:
    if period is None:
        return (
            f"All {num_depths} depths were measured: the layers of this model differ, or are too few, for some to follow from "
            "others."
        )
    if num_measured == num_depths:
        return f"All {num_depths} depths were measured."
    why_many = ", as the peak moves with the depth" if 2 * num_measured > num_depths else ""
    return (
        f"{num_measured} of {num_depths} depths were measured{why_many}; the others follow, as every figure adds up layer by "
        "layer between them."
    )

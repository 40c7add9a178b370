"""Which settings fit a memory budget: micro-batch, dtype, gradient checkpointing, frozen depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from safe_lab.byte_size import format_bytes
from safe_lab.config import Config
from safe_lab.memory.budget import largest_within
from safe_lab.plan.subject import build_subject

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Largest:
    """What fits at one frozen depth.

    Attributes:
        frozen_depth: Units frozen from the input.
        batch_size: Most rows of a micro-batch that fit, no more than there are in an optimizer step; 0: not even one.
        peak_bytes: Of a micro-batch of that many rows; with 0, of a single row.
    """

    frozen_depth: int
    batch_size: int
    peak_bytes: int


@dataclass(frozen=True)
class Option:
    """What fits with one dtype, with or without gradient checkpointing.

    Attributes:
        dtype: Of the weights.
        gradient_checkpointing: Whether activations are recomputed.
        largest: Largest micro-batch with nothing frozen and at each quarter of the depth.
        smallest_frozen_depth: From which depth on the micro-batch as configured fits; None: at none.
    """

    dtype: str
    gradient_checkpointing: bool
    largest: tuple[Largest, ...]
    smallest_frozen_depth: int | None


@dataclass(frozen=True)
class Advice:
    """Settings to take: the same examples an optimizer step as configured, in micro-batches that fit."""

    dtype: str
    gradient_checkpointing: bool
    batch_size: int
    gradient_accumulation: int
    frozen_depth: int
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """The answer to ``--fit``.

    Attributes:
        budget_bytes: What there is.
        batch_size: Micro-batch as configured.
        rows_per_step: Examples of an optimizer step, which stay.
        options: What fits, by dtype and checkpointing.
        advice: The option to take; None: nothing fits while nothing is frozen, as in the first epochs of every run.
        sentence: The advice in words.
    """

    budget_bytes: int
    batch_size: int
    rows_per_step: int
    options: tuple[Option, ...]
    advice: Advice | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def find_fit(config: Config, budget_bytes: int) -> Fit:
    """Measure what fits: each answer was seen to fit, and one row more, or one unit less frozen, does not.

    The advice keeps the numerics first (the dtype as configured) and then the speed (no recomputation). It is for frozen
    depth 0, where every run begins; where not even a single row fits there, there is no advice.

    Args:
        config: The run. Its micro-batch times its accumulation stays the most that a micro-batch can be.
        budget_bytes: What there is.

    Raises:
        ValueError: As :func:`safe_lab.plan.subject.build_subject`.
    """
    rows_per_step = _rows_per_step(config)
    options: list[Option] = []
    candidates: list[Advice] = []
    for dtype in dict.fromkeys((config.model.dtype, *DTYPES)):
        for checkpointing in (False, True):
            settings = config.model.model_copy(update={"dtype": dtype, "gradient_checkpointing": checkpointing})
            option, candidate = _measure(config.model_copy(update={"model": settings}), budget_bytes)
            options.append(option)
            if candidate is not None:
                candidates.append(candidate)
    advice = next((candidate for candidate in candidates if candidate.frozen_depth == 0), None)
    later = min(candidates, key=lambda candidate: candidate.frozen_depth, default=None)
    return Fit(
        budget_bytes=budget_bytes,
        batch_size=config.training.batch_size,
        rows_per_step=rows_per_step,
        options=tuple(options),
        advice=advice,
        sentence=_advise(advice, later, options, rows_per_step, budget_bytes),
    )


def smallest_within(cost: Callable[[int], int], budget: int, most: int) -> int | None:
    """The smallest x from 0 to ``most`` with ``cost(x) <= budget``, for a cost that falls with x; None: there is none.

    The answer and its predecessor are both evaluated.

    >>> smallest_within(lambda x: 100 - 3 * x, 50, 24)
    17
    """
    if cost(0) <= budget:
        return 0
    if cost(most) > budget:
        return None
    too_few, fits = 0, most
    while fits - too_few > 1:
        x = (too_few + fits) // 2
        if cost(x) <= budget:
            fits = x
        else:
            too_few = x
    return fits


def _measure(config: Config, budget_bytes: int) -> tuple[Option, Advice | None]:
    """What fits with the model's settings as they are, and the micro-batch to take at the first depth where any does."""
    subject = build_subject(config)
    num_units, rows_per_step = len(subject.rehearsal.units), _rows_per_step(config)

    @cache
    def peak_bytes(depth: int, rows: int) -> int:
        trace = subject.rehearsal.trace(range(depth), rows=rows, accumulating=rows < rows_per_step)
        return trace.peak_bytes + subject.kept_bytes

    largest = []
    for depth in sorted({num_units * quarter // 4 for quarter in range(5)}):
        rows = largest_within(partial(peak_bytes, depth), budget_bytes, rows_per_step)
        largest.append(Largest(depth, rows, peak_bytes(depth, max(rows, 1))))
    smallest = smallest_within(lambda depth: peak_bytes(depth, config.training.batch_size), budget_bytes, num_units)
    option = Option(config.model.dtype, config.model.gradient_checkpointing, tuple(largest), smallest)
    first = next((entry for entry in largest if entry.batch_size), None)
    if first is None:
        return option, None
    rows = max(rows for rows in range(1, first.batch_size + 1) if rows_per_step % rows == 0)
    return option, Advice(
        dtype=option.dtype,
        gradient_checkpointing=option.gradient_checkpointing,
        batch_size=rows,
        gradient_accumulation=rows_per_step // rows,
        frozen_depth=first.frozen_depth,
        peak_bytes=peak_bytes(first.frozen_depth, rows),
    )


def _rows_per_step(config: Config) -> int:
    return config.training.batch_size * config.training.gradient_accumulation


def _advise(
    advice: Advice | None, later: Advice | None, options: Sequence[Option], rows_per_step: int, budget_bytes: int
) -> str:
    budget = format_bytes(budget_bytes)
    if later is None:
        least = min(largest.peak_bytes for option in options for largest in option.largest)
        return f"Nothing fits {budget}: a single row takes {format_bytes(least)} at the least."
    if advice is None:
        return (
            f"Nothing fits {budget} while nothing is frozen, as at the start of every run; {_describe(later)} would fit from "
            f"{later.frozen_depth} frozen units on."
        )
    return (
        f"To fit {budget}: {_describe(advice)} peaks at {format_bytes(advice.peak_bytes)} with nothing frozen, which leaves "
        f"{format_bytes(budget_bytes - advice.peak_bytes)} for what is not in the figures; a step keeps its {rows_per_step} "
        "examples."
    )


def _describe(advice: Advice) -> str:
    return (
        f"model.dtype={advice.dtype} model.gradient_checkpointing={str(advice.gradient_checkpointing).lower()} "
        f"training.batch_size={advice.batch_size} training.gradient_accumulation={advice.gradient_accumulation}"
    )

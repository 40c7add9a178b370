"""The memory budget: how many rows go through the model at once, so that the peak of all bytes stays within it.

:func:`plan_stage` finds the numbers out from rehearsed steps, as long as one set of units is frozen;
:func:`~safe_lab.memory.split.split_batch` cuts a loaded batch accordingly, so that the gradients of the parts add up to the
batch's::

    stage = plan_stage(rehearsal, frozen, budget_bytes=..., ...)
    for part, weight in split_batch(batch, stage.rows):
        (weight * model(**part).loss).backward()
    optimizer.step()
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from safe_lab.byte_size import format_bytes, parse_bytes
from safe_lab.memory.predict import Rehearsal, count_bytes

# Shorter rows than these are not rehearsed: they are planned for as if they were of this length.
_SHORTEST = 8
# With fewer of the longest rows than these, a share of the budget that matters is that of a single one.
_FEW = 8
# int64 for each token of a loaded batch, in which a rehearsed step has no part: ids, mask and token types of the whole that a
# micro-batch is cut from, and the micro-batch's own token types.
_LOADED_BYTES_PER_TOKEN = 4 * 8

# What there is no class of its own for.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Stage:
    """What fits the budget as long as one set of units is frozen.

    Attributes:
        gradient_checkpointing: Whether activations are to be recomputed.
        peak_bytes: Forecast for as many of the longest rows as fit, with all that is kept beside the model.
        most_rows: Most rows of a micro-batch, by the length of its longest row: entry ``n - 1`` is for n tokens.
        most_eval_rows: The same of a forward pass without gradients.
    """

    gradient_checkpointing: bool
    peak_bytes: int
    most_rows: tuple[int, ...]
    most_eval_rows: tuple[int, ...]

    def rows(self, length: int) -> int:
        """Most rows of a micro-batch whose longest row has ``length`` tokens; at least 1, and no more the longer it is.

        Raises:
            ValueError: The row is longer than what was planned for.
        """
        return _look_up(self.most_rows, length)

    def eval_rows(self, length: int) -> int:
        """Most rows of an evaluation batch whose longest row has ``length`` tokens.

        Raises:
            ValueError: The row is longer than what was planned for.
        """
        return _look_up(self.most_eval_rows, length)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for logs: of the numbers of rows those where they change, each with the length up to which it holds."""
        return {
            "gradient_checkpointing": self.gradient_checkpointing,
            "peak_bytes": self.peak_bytes,
            "rows": _find_changes(self.most_rows),
            "eval_rows": _find_changes(self.most_eval_rows),
        }


def plan_stage(
    rehearsal: Rehearsal,
    frozen: Collection[int],
    *,
    budget_bytes: int,
    kept_bytes: int,
    batch_rows: int,
    eval_batch_rows: int,
    longest: int,
    accumulating: bool = False,
    with_checkpointing: Callable[[], Rehearsal] | None = None,
) -> Stage:
    """Find the most rows whose peak stays within the budget, for every length of rows.

    Of the longest rows, for which it matters most, the answer was rehearsed, and one row more does not fit. Of shorter ones the
    answer fits without each having been rehearsed, and may not be quite the most: see :func:`fit_rows`.

    As the frozen run grows, so does the number of the longest rows, or it stays, provided that ``kept_bytes`` does not grow and
    checkpointing does not end.

    Args:
        rehearsal: Of the run's steps.
        frozen: Indices of the units that are frozen.
        budget_bytes: Most bytes live at any moment.
        kept_bytes: What is kept beside the model: ``Subject.kept_bytes``, folds, a cache in memory, the probe.
        batch_rows: Rows of a loaded batch.
        eval_batch_rows: Rows of a loaded evaluation batch.
        longest: Tokens of the longest row of all data.
        accumulating: An optimizer step has several loaded batches.
        with_checkpointing: Builds a rehearsal with gradient checkpointing, which is asked for only if without it, not even one
            of the longest rows fits: it computes most of the forward pass twice. None: not allowed, or on already.

    Raises:
        ValueError: Not even a single row fits; the message names the smallest budget that would do. After a first stage that
            fits this can be only where more is kept than freezing saves.
    """

    def peak(rehearsed: Rehearsal, rows: int, tokens: int) -> int:
        several = accumulating or rows < batch_rows
        trace = rehearsed.trace(frozen, rows=rows, tokens=tokens, accumulating=several)
        return trace.peak_bytes + kept_bytes + _LOADED_BYTES_PER_TOKEN * batch_rows * longest

    def eval_peak(rows: int, tokens: int) -> int:
        trace = rehearsal.trace_evaluation(rows=rows, tokens=tokens)
        return trace.peak_bytes + kept_bytes + _LOADED_BYTES_PER_TOKEN * eval_batch_rows * longest

    most_eval_rows = fit_rows(eval_peak, budget_bytes, eval_batch_rows, longest)
    least = []
    for build in filter(None, (lambda: rehearsal, with_checkpointing)):
        rehearsed = build()
        train_peak = cache(partial(peak, rehearsed))
        spared = 0 if accumulating else count_bytes(rehearsed.trained)
        most_rows = fit_rows(train_peak, budget_bytes, batch_rows, longest, spared_bytes=spared)
        if most_rows and most_eval_rows:
            return Stage(rehearsed.recomputes, train_peak(most_rows[-1], longest), most_rows, most_eval_rows)
        least.append(max(train_peak(1, longest), eval_peak(1, longest)))
    hint = "" if with_checkpointing or rehearsal.recomputes else ", or less with memory.gradient_checkpointing: true"
    raise ValueError(
        f"memory.budget: {format_bytes(budget_bytes)} is too small for even a single row of {longest} tokens at a time: the "
        f"smallest that will do is {_format_at_least(min(least))}{hint}"
    )


def fit_rows(
    peak: Callable[[int, int], int], budget_bytes: int, rows: int, longest: int, *, spared_bytes: int = 0
) -> tuple[int, ...]:
    r"""Most rows of a micro-batch whose peak is within a budget, for every length, from a few peaks.

    The bytes live after any one operator m grow with the rows b and the tokens n of each: most with every token, attention
    scores with every pair, pooled states with every row, masks and positions with the tokens alone, and weights not at all.

    .. math:: P(b, n) = \max_m \; b\, f_m(n) + g_m(n), \qquad f_m, g_m \text{ quadratic, with coefficients} \ge 0

    So P rises, and is convex, in b for each n and in n for each b, and bilinear interpolation between measured points is
    nowhere below it. Measured are: of the longest rows all, one, and what :func:`largest_within` asks for; and all rows at
    ever shorter lengths until they fit. A step to a shorter length is to a third at most, where the chord of a parabola lies a
    third above it; what grows with the tokens alone lies on its chord. A single row takes no more than one of the longest, which
    is near enough unless few of those fit: then a short one is measured too.

    Args:
        peak: ``peak(b, n)``: bytes at the peak of b rows of n tokens.
        budget_bytes: What there is.
        rows: Most rows there can be.
        longest: Tokens of the longest row.
        spared_bytes: What all the rows at once are spared: the gradients of the micro-batches before.

    Returns:
        Entry ``n - 1`` is for rows of n tokens; nothing if not even one of the longest rows fits.
    """
    at_longest: dict[int, int] = {}

    def measure(b: int) -> int:
        at_longest[b] = peak(b, longest)
        return at_longest[b]

    fewest = largest_within(measure, budget_bytes, rows)
    if fewest in (0, rows):
        return (rows,) * longest if fewest else ()
    # By length: the peak of all rows, and points of the convex function that holds for fewer.
    whole = {longest: at_longest[rows]}
    points: dict[int, dict[int, float]] = {longest: {**at_longest, rows: at_longest[rows] + spared_bytes}}
    single = {longest: at_longest[1]}
    if fewest < _FEW and longest > _SHORTEST:
        single[_SHORTEST] = peak(1, _SHORTEST)
    length = longest
    while whole[length] > budget_bytes and length > _SHORTEST:
        share = (budget_bytes - at_longest[1]) / (whole[length] - at_longest[1])
        length = max(int(share * length), length // 3, _SHORTEST)
        whole[length] = peak(rows, length)
        points[length] = {1: _interpolate(length, single), rows: whole[length] + spared_bytes}
    lengths = sorted(whole)

    def bound(b: int, n: int) -> float:
        known = [whole[one] if b == rows else _interpolate(b, points[one]) for one in lengths]
        return _interpolate(n, dict(zip(lengths, known, strict=True)))

    most, b = [], rows
    for n in range(1, longest + 1):
        while b > fewest and bound(b, n) > budget_bytes:
            b -= 1
        most.append(b)
    return tuple(most)


def largest_within(cost: Callable[[int], int], budget: int, most: int) -> int:
    """The largest x from 1 to ``most`` with ``cost(x) <= budget``, for a cost that rises with x and is convex; 0: there is none.

    The answer is evaluated, and its successor too unless it follows that it does not fit: a chord of a convex function lies
    above it between its ends, and below it beyond them. So a few evaluations do, each at another x.

    >>> largest_within(lambda x: 10 + 3 * x, 100, 64)
    30
    """
    too_many, too_much = most, cost(most)
    if too_much <= budget:
        return most
    if most == 1:
        return 0
    fits, fitting = 1, cost(1)
    if fitting > budget:
        return 0
    while too_many - fits > 1:
        x = fits + int((budget - fitting) / (too_much - fitting) * (too_many - fits))
        x = min(max(x, fits + 1), too_many - 1)
        value = cost(x)
        if value > budget:
            too_many, too_much = x, value
        elif value + (value - fitting) / (x - fits) > budget:
            return x
        else:
            fits, fitting = x, value
    return fits


def halved(stage: Stage) -> Stage:
    """The stage with half the rows, for when the forecast was too low; itself where there is but one row of any length left."""
    return replace(
        stage,
        most_rows=tuple(max(1, rows // 2) for rows in stage.most_rows),
        most_eval_rows=tuple(max(1, rows // 2) for rows in stage.most_eval_rows),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on an accelerator or the host.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _look_up(most_rows: tuple[int, ...], length: int) -> int:
    if length > len(most_rows):
        raise ValueError(
            f"a row has {length} tokens, and the memory budget was planned for rows of up to {len(most_rows)}"
        )
    return most_rows[max(length, 1) - 1]


def _find_changes(most_rows: tuple[int, ...]) -> list[dict[str, int]]:
    groups = itertools.groupby(enumerate(most_rows, start=1), key=lambda entry: entry[1])
    return [{"tokens": max(length for length, _ in group), "rows": rows} for rows, group in groups]


def _interpolate(x: float, points: Mapping[int, float]) -> float:
    return float(np.interp(x, sorted(points), [points[place] for place in sorted(points)]))


def _format_at_least(number: int) -> str:
    """A size as people read it, rounded up."""
    shown = number
    while parse_bytes(format_bytes(shown)) < number:
        shown += max(1, number // 4096)
    return format_bytes(shown)

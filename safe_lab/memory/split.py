"""Cut a loaded batch into micro-batches of like length, whose gradients add up to the batch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def split_batch(
    batch: Mapping[str, Any],
    most_rows: Callable[[int], int] | None = None,
    *,
    trim_padding: int | None = None,
    pad_to_multiple_of: int = 1,
) -> Iterator[tuple[dict[str, Any], float]]:
    r"""Cut a loaded batch into micro-batches, rows of like length together and without the padding they do not need.

    The weights are the shares of the rows, so for a loss that is a mean over rows

    .. math:: \sum_k w_k \, L(\text{part}_k) = L(\text{batch}), \qquad w_k = b_k / B,

    and the gradient is the same. A batch that goes in one piece keeps the order of its rows.

    Padding on the left stays where it is: cutting it off would move the tokens to other positions, which a model with absolute
    positions (BERT, GPT-2) takes for another text.

    Args:
        batch: Tensors of shape (B, ...) are cut by rows, and those of shape (B, T, ...) by columns too, with (B, T) the shape
            of ``attention_mask``; without a mask no column is cut. All else goes to each part as it is.
        most_rows: ``most_rows(length)``: rows of a part whose longest row has ``length`` tokens, as
            :meth:`~safe_lab.memory.budget.Stage.rows` tells; None: any number.
        trim_padding: What a part costs by itself, in tokens: the batch is cut wherever that spares more padding (see
            :func:`cut_rows`). None: only where ``most_rows`` says so.
        pad_to_multiple_of: Parts are cut to a multiple of so many tokens, as far as the batch reaches.

    Yields:
        A part, and its weight. The longest rows come first. No reference to a part is kept once the next is asked for.

    Raises:
        ValueError: There is no tensor in the batch, or ``most_rows`` gives less than 1.
    """
    lengths, columns, device = _measure_rows(batch)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    padded = [min(columns, pad_to_multiple_of * -(-max(1, lengths[row]) // pad_to_multiple_of)) for row in order]
    begin = 0
    for end in cut_rows(padded, most_rows, trim_padding=trim_padding):
        rows, length = order[begin:end], padded[begin]
        index = torch.tensor(rows, device=device) if len(rows) < len(order) else None
        # Not through a variable, which would keep the part alive while the next is worked on.
        yield (
            {name: _cut(value, index, (len(order), columns), length) for name, value in batch.items()},
            len(rows) / len(order),
        )
        begin = end


def cut_rows(
    lengths: Sequence[int], most_rows: Callable[[int], int] | None = None, *, trim_padding: int | None = None
) -> list[int]:
    r"""Where to cut rows, the longest first, into parts.

    .. math:: \min_{e_1 < \dots < e_K = B} \; \sum_k \left( (e_k - e_{k-1}) \, n_{e_{k-1}} + c \right)

    n_i: tokens of row i, which is the longest of the part that begins with it; c: ``trim_padding``. So each cut spares at least c
    tokens of padding. Solved from the last row to the first; of cuts that cost the same the parts are the larger ones.

    Args:
        lengths: Tokens of each row, in descending order.
        most_rows: Most rows of a part, by the tokens of its longest row; None: any number.
        trim_padding: What a part costs by itself, in tokens; None: more than any padding, so that each part but the last has as
            many rows as it may.

    Returns:
        For each part the index behind its last row.

    Raises:
        ValueError: ``most_rows`` gives less than 1.

    >>> cut_rows([50, 48, 20, 19, 18, 5], trim_padding=8)
    [2, 5, 6]
    >>> cut_rows([50, 48, 20, 19, 18, 5], lambda length: 4)
    [4, 6]
    """
    count = len(lengths)

    def most(first: int) -> int:
        rows = count if most_rows is None else most_rows(lengths[first])
        if rows < 1:
            raise ValueError(
                f"most_rows gives {rows} for rows of {lengths[first]} tokens, and a micro-batch needs at least 1"
            )
        return min(rows, count - first)

    # By the first row of a part: its rows, and the least that all rows from there on cost.
    best, costs = [0] * count, np.zeros(count + 1, dtype=np.int64)
    if trim_padding is not None:
        for first in reversed(range(count)):
            rows = np.arange(most(first), 0, -1)
            totals = rows * lengths[first] + costs[first + rows]
            least = int(totals.argmin())
            best[first], costs[first] = int(rows[least]), totals[least] + trim_padding
    ends: list[int] = []
    while (first := ends[-1] if ends else 0) < count:
        ends.append(first + (most(first) if trim_padding is None else best[first]))
    return ends


def _measure_rows(batch: Mapping[str, Any]) -> tuple[list[int], int, torch.device]:
    """Columns that each row takes up, all columns there are, and where the batch is."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        # Up to the last token, not the number of tokens: what is before and between them stays.
        return ((mask != 0) * places).amax(1).tolist(), mask.shape[1], mask.device
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), None)
    if first is None:
        raise ValueError(f"a batch without a tensor has no rows to split; its entries are {', '.join(batch) or 'none'}")
    columns = first.shape[1] if first.dim() > 1 else 1
    return [columns] * len(first), columns, first.device


def _cut(value: Any, rows: Tensor | None, shape: tuple[int, int], length: int) -> Any:
    """Some rows of a tensor, None: all, less the columns beyond ``length``."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != shape[0]:
        return value
    if value.dim() > 1 and value.shape[1] == shape[1]:
        value = value[:, :length]
    return value.contiguous() if rows is None else value[rows]

"""The fixed examples over which the loss is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from safe_lab.importance.probe import Batch

Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]


def draw_rows(dataset: Any, num_samples: int, seed: int) -> Any:
    """Up to ``num_samples`` rows of a split, the same for the same split and seed; the longest first."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    lengths = dataset["length"]
    return dataset.select(sorted(order, key=lambda i: (-lengths[i], i)))


def batch_by_tokens(rows: Any, collate: Collate, max_tokens: int) -> Iterator[Batch]:
    """Batches of like lengths, each of up to ``max_tokens`` tokens with padding, and of one row at least."""
    lengths = rows["length"]
    start = 0
    while start < len(lengths):
        # The longest come first, so that the first row of a batch is as wide as any.
        size = max(1, max_tokens // max(lengths[start], 1))
        yield collate([rows[i] for i in range(start, min(start + size, len(lengths)))])
        start += size

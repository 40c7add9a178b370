"""Where batches come from: loaders of the splits, the probe, and the blocks that a cache is filled from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader

from safe_lab.data.batches import EpochBatchSampler

log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def build_train_loader(
    dataset: Any, sampler: EpochBatchSampler, collate: Collate, *, seed: int, num_workers: int
) -> DataLoader[Any]:
    """Loader of the training split in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Making an iterator draws a seed: from the global stream, were there no generator, and resume would not be exact.
        generator=torch.Generator().manual_seed(seed),
    )


def build_eval_loader(
    dataset: Any,
    collate: Collate,
    batch_size: int,
    *,
    rank: int = 0,
    num_processes: int = 1,
    equally_many: bool = False,
) -> DataLoader[Any]:
    """Loader of a validation split, longest first: no padding to speak of, and out of memory at once if at all.

    Of several processes each gets every ``num_processes``-th batch, from ``rank`` on; there may be none for it. With
    ``equally_many`` those that have one fewer get the last one too, which comes after all others and does not count.
    """
    order = order_by_length(dataset["length"])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if equally_many:
        batches += [batches[-1]] * (-len(batches) % num_processes)
    return DataLoader(
        dataset,
        batch_sampler=batches[rank::num_processes],
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )


def build_probe(
    train: Any, collate: Collate, *, num_samples: int | None, max_batch_size: int, seed: int, multiple_of: int = 1
) -> list[dict[str, Tensor]]:
    """The fixed examples on which scores are computed: drawn from the training split, in batches of like length.

    Args:
        train: The training split.
        collate: Pads.
        num_samples: How many; None: 128, but at most 1 in 50 (so that all scoring together costs under 2 % of the FLOPs of
            training) and at least 16.
        max_batch_size: Most examples in a batch; there are about eight batches, which leaves little padding.
        seed: Seed of the draw.
        multiple_of: Each batch has a multiple of so many examples, and the probe as many as that allows, but for what is over.

    Raises:
        ValueError: Fewer than ``multiple_of`` examples are wanted or there.
    """
    available = len(train)
    wanted = max(16, multiple_of, min(128, available // 50)) if num_samples is None else num_samples
    if min(wanted, available) < multiple_of:
        raise ValueError(
            f"freezing.probe_samples: each of {multiple_of} processes that share a model needs an example, and there are "
            f"{min(wanted, available)}"
        )
    if num_samples is not None and wanted > available:
        log.warning(
            "freezing.probe_samples is %d, and the training split has %d examples: all are taken", wanted, available
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    drawn = drawn[: len(drawn) // multiple_of * multiple_of]
    rows = sorted((train[i] for i in drawn), key=lambda row: row["length"])
    size = min(max_batch_size, max(4, wanted // 8))
    size = max(size // multiple_of, 1) * multiple_of
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def iterate_blocks(datasets: Iterable[Any], collate: Collate, rows: int) -> Iterator[dict[str, Tensor]]:
    """All examples in batches of ``rows``, always the same ones, each dataset from its longest example down.

    No random stream is touched.
    """
    for dataset in datasets:
        order = order_by_length(dataset["length"])
        for start in range(0, len(order), rows):
            yield collate([dataset[i] for i in order[start : start + rows]])


def hash_rows(dataset: Any) -> str:
    """A hash of what a split holds: tokens, labels and lengths, row by row."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(dataset), 1000):
        columns = dataset[start : start + 1000]
        for name in sorted(columns):
            values = columns[name]
            rows = [np.asarray(value) for value in values] if isinstance(values[0], list) else [np.asarray(values)]
            digest.update(f"{name} {[len(row) for row in rows]}".encode())
            digest.update(np.concatenate(rows).tobytes())
    return digest.hexdigest()


def order_by_length(lengths: Sequence[int]) -> list[int]:
    """Indices, the longest first.

    >>> order_by_length([2, 5, 5, 3])
    [1, 2, 3, 0]
    """
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])

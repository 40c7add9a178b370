"""Which examples make a batch, in which order, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MEGABATCH = 50


class Collator:
    """Pads the rows of a batch to its longest.

    Args:
        tokenizer: Knows the padding token and side.
        pad_to_multiple_of: Round the length up to a multiple of this, which tensor cores like (8); None: do not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of shape (rows, tokens) by name, and ``labels`` of shape (rows,), int64 or float32."""
        inputs = [{name: row[name] for name in row if name not in ("labels", "length")} for row in rows]
        batch = dict(self._tokenizer.pad(inputs, pad_to_multiple_of=self._pad_to_multiple_of, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


class EpochBatchSampler:
    """Batches of row numbers, in an order that depends on (seed, epoch) alone.

    With ``group_by_length`` the rows are shuffled, sorted by length within stretches of 50 batches, and the batches
    shuffled; the batch with the longest row comes first in the epoch, so that a lack of memory shows at once. A batch
    that is not full is always the last.

    Of several processes each gets its share of every batch, rows ``rank``, ``rank + num_processes``, ..., so that they do
    together what one does, whatever their number. :meth:`weight` tells what its mean loss counts for.

    The global random streams are left untouched.

    Attributes:
        batch_size: Rows in a batch, of all processes together.
        drop_last: Leave out the last batch if it is not full.
        epoch: Set by :meth:`set_epoch`.
        start: Batches of this epoch to skip without reading them: where a resumed run goes on. Zero again in the next
            epoch.

    Raises:
        ValueError: No rows, a batch size below 1 or below the number of processes, or ``group_by_length`` without lengths.
    """

    def __init__(
        self,
        lengths_or_num_examples: Sequence[int] | int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if isinstance(lengths_or_num_examples, int):
            self._num_examples, self._lengths = lengths_or_num_examples, None
            if group_by_length:
                raise ValueError("group_by_length needs the length of each example, got only their number")
        else:
            self._lengths = np.asarray(lengths_or_num_examples)
            self._num_examples = len(self._lengths)
        if self._num_examples < 1 or batch_size < 1:
            raise ValueError(f"batches need examples and a size >= 1, got {self._num_examples} and {batch_size}")
        if batch_size < num_processes:
            raise ValueError(
                f"training.batch_size is {batch_size} of all processes together, and there are {num_processes} of them: "
                "give each at least one example"
            )
        self._rank, self._num_processes = rank, num_processes
        self._seed = seed
        self._shuffle = shuffle
        self._group_by_length = group_by_length
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order. A new epoch starts at its first batch; the same epoch again leaves ``start`` alone."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of batches in the whole epoch, skipped ones included."""
        full, rest = divmod(self._num_examples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self._seed, self.epoch))
        order = generator.permutation(self._num_examples) if self._shuffle else np.arange(self._num_examples)
        if self._group_by_length and self._lengths is not None:
            order = _group(order, self._lengths, self.batch_size, generator)
        for batch in range(self.start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # Without a share, a row that counts for nothing: the others wait for this process's gradients.
            yield (rows[self._rank :: self._num_processes] if self.weight(batch) else rows[:1]).tolist()

    def weight(self, batch: int) -> float:
        r"""What the mean loss of this process's rows of a batch counts for in a mean over processes.

        .. math:: w_r = P \, n_r / n

        with n rows in the batch, n_r of them here, P processes: 1 where all have as many, 0 without a row.

        >>> [EpochBatchSampler(7, 4, seed=0, rank=rank, num_processes=4).weight(1) for rank in range(4)]
        [1.3333333333333333, 1.3333333333333333, 1.3333333333333333, 0.0]
        """
        rows = min(self.batch_size, self._num_examples - batch * self.batch_size)
        return len(range(self._rank, rows, self._num_processes)) * self._num_processes / rows


def _group(
    order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], batch_size: int, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Bring rows of like length together; the longest row's batch first, a batch that is not full last."""
    longest = order[np.argmax(lengths[order])]
    # The rows of the batch that is not full are set aside before sorting, so that they are a random lot.
    rest = len(order) % batch_size
    body, tail = order[: len(order) - rest], order[len(order) - rest :]
    if longest in tail and len(body):
        tail[tail == longest], body[0] = body[0], longest
    stretches = np.split(body, range(MEGABATCH * batch_size, len(body), MEGABATCH * batch_size))
    body = np.concatenate([stretch[np.argsort(-lengths[stretch], kind="stable")] for stretch in stretches])
    batches = generator.permutation(body.reshape(-1, batch_size))
    if len(batches):
        first = int(np.flatnonzero((batches == longest).any(axis=1))[0])
        batches[[0, first]] = batches[[first, 0]]
    return np.concatenate([batches.ravel(), tail])

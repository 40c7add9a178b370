"""Reading ahead: rows of batches that are about to come, off the thread that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

Read = Callable[[Sequence[bytes], int], Tensor | None]


class ReadAhead:
    """Of the last two batches that were announced, the rows. Of three that never came the first is forgotten."""

    def __init__(self) -> None:
        """Nothing is read yet, nor is there a thread."""
        self._thread: ThreadPoolExecutor | None = None
        # The row of each key, and the rows.
        self._begun: deque[tuple[dict[bytes, int], Future[Tensor | None]]] = deque(maxlen=2)

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, read: Read, keys: Sequence[bytes], columns: int) -> None:
        """Read rows whose turn comes next; whether they are then asked for all at once or in parts makes no difference.

        Args:
            read: ``read(keys, columns)`` gives the rows as one tensor; None if it cannot.
            keys: The rows.
            columns: Tokens of each.
        """
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="activation-cache")
        future = self._thread.submit(read, keys, columns)
        self._begun.append(({key: row for row, key in enumerate(keys)}, future))

    def take(self, keys: Sequence[bytes], columns: int) -> Tensor | None:
        """Rows that were read, cut to ``columns``; None if they were not, or could not be."""
        for entry in self._begun:
            places, future = entry
            if all(key in places for key in keys):
                hidden = future.result()
                if hidden is None or hidden.shape[1] < columns:
                    return None
                if len(keys) == len(hidden):
                    self._begun.remove(entry)
                rows = [places[key] for key in keys]
                in_order = rows == list(range(len(hidden)))
                return (hidden if in_order else hidden[torch.tensor(rows)])[:, :columns]
        return None

    def forget(self) -> None:
        """Drop what was read, once nothing is being read any more."""
        # One thread reads them in turn: with the last of them those that were forgotten before are done too.
        wait([future for _, future in self._begun])
        self._begun.clear()

    def close(self) -> None:
        """End the thread."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

"""Where cached activations lie: bytes by offset, in a file or in the host's memory."""

from __future__ import annotations

import bisect
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Buffer = Any  # what has a memoryview


class Store(Protocol):
    """Bytes by offset; the file and the memory behave alike."""

    size: int

    def extend(self, nbytes: int) -> int:
        """Make room at the end; returns the offset."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``.

        Raises:
            OSError: The disk is full or failed.
        """

    def read(self, offset: int, into: Buffer) -> bool:
        """Fill ``into``; False if there are not that many bytes any more.

        Raises:
            OSError: The disk failed.
        """

    @property
    def kept(self) -> Sequence[Tensor]:
        """What of it lies in memory."""

    def close(self) -> None:
        """Give the space back; a file stays."""


class FileStore:
    """A file, read by offset and not mapped: under a map a file that is cut ends the process (SIGBUS).

    What was written not long ago is read from the page cache of the system, as a map would be.
    """

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        """Open a file.

        Args:
            path: The file.
            size: Its first bytes that stay as they are; None: it begins empty.

        Raises:
            OSError: It cannot be opened.
        """
        self.size = size or 0
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if size is None else 0)
        self._descriptor = os.open(path, flags, 0o600)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    @property
    def kept(self) -> Sequence[Tensor]:
        """Nothing."""
        return ()

    def extend(self, nbytes: int) -> int:
        """Make room at the end; returns the offset."""
        self.size += nbytes
        return self.size - nbytes

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``.

        Raises:
            OSError: The disk is full or failed.
        """
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            left, offset = left[written:], offset + written

    def read(self, offset: int, into: Buffer) -> bool:
        """Fill ``into``; False if the file is too short.

        Raises:
            OSError: The disk failed.
        """
        left = memoryview(into).cast("B")
        while left:
            count = os.preadv(self._descriptor, [left], offset)
            if not count:
                return False
            left, offset = left[count:], offset + count
        return True

    def sync(self) -> None:
        """Make it survive a power cut."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, which stays."""
        self._close()


class MemoryStore:
    """The host's memory, in one piece for each call of :meth:`extend`."""

    def __init__(self) -> None:
        self.size = 0
        self._starts: list[int] = []
        self._pieces: list[Tensor] = []

    @property
    def kept(self) -> Sequence[Tensor]:
        """The pieces."""
        return self._pieces

    def extend(self, nbytes: int) -> int:
        """Make room at the end; returns the offset."""
        self._starts.append(self.size)
        self._pieces.append(torch.empty(nbytes, dtype=torch.uint8))
        self.size += nbytes
        return self._starts[-1]

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``, which lies in one piece."""
        source = memoryview(data).cast("B")
        self._view(offset, len(source))[:] = source

    def read(self, offset: int, into: Buffer) -> bool:
        """Fill ``into`` from one piece."""
        target = memoryview(into).cast("B")
        target[:] = self._view(offset, len(target))
        return True

    def close(self) -> None:
        """Give the memory back."""
        self._starts.clear()
        self._pieces.clear()

    def _view(self, offset: int, nbytes: int) -> memoryview:
        piece = bisect.bisect_right(self._starts, offset) - 1
        start = offset - self._starts[piece]
        return memoryview(self._pieces[piece].numpy().data).cast("B")[start : start + nbytes]

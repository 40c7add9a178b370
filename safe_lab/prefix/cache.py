"""The activation cache: the frozen prefix's output of every example, kept once it can no longer change.

An example is known by its content (token ids and what else the model takes of it), so that no loop has to number its examples,
and equal ones are kept once. Rows are kept without padding. Each has a checksum: a cache that is cut or altered is found out
at the reading, never used.

The bits of a row must not depend on the batch in which it was computed, or a resumed run would differ from one left alone. So
rows are computed in blocks of fixed composition, and padded to a multiple of 16 tokens, at which kernels treat every row alike
(measured on CPU: docs/log.md, 2026-11-21).
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from safe_lab.importance.probe import Batch
from safe_lab.memory import is_out_of_memory
from safe_lab.prefix.ahead import ReadAhead
from safe_lab.prefix.index import Rows, read_index, unfinished, write_index
from safe_lab.prefix.rows import count_tokens, make_keys
from safe_lab.prefix.stack import Stack
from safe_lab.prefix.store import FileStore, MemoryStore
from safe_lab.processes import ALONE, Processes

log = logging.getLogger(__name__)

DATA, INDEX = "activations.bin", "activations.index"


class _Block(NamedTuple):
    """A batch in the filling: what is known of its rows, and which are to be kept."""

    batch: Batch
    keys: list[bytes]
    lengths: list[int]
    rows: list[int]


class _UnusableError(Exception):
    """The cache cannot go on; the message is a clause that says why."""


class ActivationCache:
    """Activations by example, at one depth.

    What goes wrong with it (a full disk, a file cut or altered) is told once; the cache is then dropped, and nothing is found.

    Attributes:
        depth: Layers whose output is kept; 0: nothing is.
        path: The depths through which it came there. With a ``dtype`` that rounds, another path gives other bits.
        num_examples: Examples kept.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        limit_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes = ALONE,
        sharers: Processes = ALONE,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: Where its two files lie; None: in the host's memory.
            limit_bytes: Most bytes of activations; None: half of what is free when it is first filled.
            dtype: What they are kept in; None: as computed.
            processes: Those that share the files, and have the same examples: each computes some blocks, all read all.
            sharers: Those over which the layers' weights are spread, here and on other machines: they run them together.

        Raises:
            ValueError: Several processes would share the memory of one.
        """
        if folder is None and processes.count > 1:
            raise ValueError(
                "savings.cache_store: memory is of one process; take disk (its files stay in the page cache while there is room)"
            )
        self.depth = 0
        self.path: list[int] = []
        self.limit_bytes = limit_bytes
        self._folder = None if folder is None else Path(folder)
        self._dtype = dtype
        self._computed: torch.dtype | None = None
        self._width = 0
        self._rows: Rows = {}
        self._store: FileStore | MemoryStore | None = None
        self._dropped = False
        self._processes = processes
        self._sharers = sharers
        # What one of them cannot do, none does.
        self._agreeing = sharers if sharers.count > 1 else processes
        # Those that run the layers together have it all, at the same depth.
        self._is_shared = False
        self._ahead = ReadAhead()

    @property
    def num_examples(self) -> int:
        """Examples kept."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of activations kept."""
        return self._store.size if self._store is not None else 0

    @property
    def kept(self) -> Sequence[Tensor]:
        """What of it lies in memory, but for up to two batches that are being read ahead."""
        return self._store.kept if self._store is not None else ()

    @property
    def usable(self) -> bool:
        """It has not been dropped."""
        return not self._dropped

    def is_usable_by_all(self) -> bool:
        """Whether no process has dropped it; to be asked by all."""
        return not self._agreeing.any(self._dropped)

    def one_lacks(self, found: Sequence[bool]) -> bool:
        """Whether one of those that run the layers together lacks rows of its batch; to be asked by all of them.

        If one of them has dropped the cache, it is of no use to the others either, and they do so too.

        Args:
            found: What :meth:`find` says here.
        """
        if not self._is_shared:
            return False
        flags = torch.tensor([float(not all(found)), float(self._dropped)])
        lacking, dropped = self._sharers.sum(flags).tolist()
        if dropped:
            self._is_shared = False
            if not self._dropped:
                self._drop("was dropped by another process")
        return bool(lacking)

    def smallest(self, depth: int) -> int:
        """The smallest depth that a process gives; to be asked by all."""
        return -self._agreeing.largest(-depth)

    def is_to_grow(self, depth: int) -> bool:
        """Whether it holds less than the output of layer ``depth - 1``, and can; to be asked by all processes."""
        return self._agreeing.any(self.usable and self.depth < depth)

    def grow(
        self, stack: Stack, depth: int, blocks: Iterable[Batch], *, around: Callable[[Any], Any], fingerprint: str
    ) -> None:
        """Keep the output of layer ``depth - 1``: from what is kept so far, or from the input if nothing is.

        All processes call it; where one cannot go on, none does.

        Args:
            stack: The layers.
            depth: The new depth, greater than the one so far.
            blocks: Batches of all examples, padded on the right, in an order and composition that never change.
            around: Wraps the computation of a block, ``with around(inputs): ...`` (a meter, autocast).
            fingerprint: Of all that the activations depend on beside the examples; see :meth:`resume`.
        """
        if not self.is_usable_by_all():
            if not self._dropped:
                self._drop("was dropped by another process")
            return
        assert depth > self.depth
        self._is_shared = False
        self._ahead.forget()
        try:
            self._together(self._create)
            self._together(self._open)
            self.limit_bytes = self._processes.broadcast(self.limit_bytes)
            computed: Rows = {}
            self._together(lambda: self._fill(stack, depth, blocks, around, computed))
            for rows in self._processes.gather(computed):
                self._rows.update(rows)
            self.depth, self.path = depth, [*self.path, depth]
            self._together(lambda: self._write_index(fingerprint))
            self._is_shared = self._sharers.count > 1
        except OSError as error:
            self._drop(f"cannot be written ({error})")
        except _UnusableError as error:
            self._drop(str(error))
        except (RuntimeError, MemoryError) as error:
            self.give_up()
            # The others wait in the midst of a pass for what this process has of a sharded layer.
            if not is_out_of_memory(error) or self._sharers.count > 1:
                raise
            self._drop("was being filled when memory ran out")
        except BaseException:
            # Whoever goes on after it (an interrupt) must not read rows of two depths.
            self.give_up()
            raise

    def resume(self, path: Sequence[int], fingerprint: str) -> bool:
        """Take up what an earlier process left behind, if it is this very cache; whether it was.

        Args:
            path: The depths through which it must have come.
            fingerprint: As given to :meth:`grow`, of the model as it stands now.
        """
        if self._folder is None or not path or not self.is_usable_by_all():
            return False
        taken_up = self._take_up(self._folder, path, fingerprint)
        if self._agreeing.any(not taken_up):
            if taken_up:
                self.close(keep=True)
            return False
        self._is_shared = self._sharers.count > 1
        return True

    def _take_up(self, folder: Path, path: Sequence[int], fingerprint: str) -> bool:
        try:
            header, rows = read_index(folder / INDEX)
            computed = getattr(torch, header["computed"])
            here = fingerprint, list(path), str(self._dtype)
            size = (folder / DATA).stat().st_size
            if (header["fingerprint"], header["path"], header["dtype"]) != here or size < header["bytes"]:
                return False
            self._store = FileStore(folder / DATA, size=header["bytes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        self._rows = rows
        self._width, self._computed = header["width"], computed
        self.depth, self.path = path[-1], list(path)
        return True

    def find(self, inputs: Batch) -> list[bool]:
        """Which rows of a batch are kept."""
        return [key in self._rows for key in make_keys(inputs)]

    def ahead(self, inputs: Batch) -> None:
        """Begin to read the rows of a batch that is about to come, off this thread (:class:`ReadAhead`)."""
        keys = [key for key in make_keys(inputs) if key in self._rows] if self.depth else []
        if keys:
            self._ahead.begin(self._read, keys, inputs["input_ids"].shape[1])

    def read(self, inputs: Batch, rows: Sequence[int] | None = None) -> Tensor | None:
        """Activations of rows that are kept.

        Args:
            inputs: The batch.
            rows: Which of its rows; None: all.

        Returns:
            (rows, T, D) on the host, in the dtype in which they were computed, T as in ``inputs``, zero where there is
            padding. None if the cache had to be dropped.
        """
        keys = make_keys(inputs)
        keys = keys if rows is None else [keys[i] for i in rows]
        columns = inputs["input_ids"].shape[1]
        found = self._ahead.take(keys, columns)
        if found is None:
            found = self._read(keys, columns)
        if found is None and not self._dropped:
            self._drop("was cut or altered")
        return found

    def close(self, *, keep: bool = False) -> None:
        """End: give memory back, and remove the files unless they are to be kept."""
        self._ahead.close()
        if self._store is not None:
            self._store.close()
            self._store = None
        self._rows, self.depth, self.path = {}, 0, []
        self._width, self._computed = 0, None
        if self._folder is not None and not keep and self._processes.is_main:
            # Its own files and no other: the folder may be one that holds more.
            for path in (self._folder / DATA, self._folder / INDEX, unfinished(self._folder / INDEX)):
                with suppress(OSError):
                    path.unlink()
            with suppress(OSError):
                self._folder.rmdir()

    def give_up(self) -> None:
        """Keep nothing, now or later."""
        self.close()
        self._dropped = True

    def _together(self, do: Callable[[], None]) -> None:
        """Do something that another process may fail at; then it fails here too."""
        failure = None
        try:
            do()
        except Exception as error:
            # Raised below, once the others know; unless they are in the midst of a pass that needs this process.
            if self._sharers.count > 1 and not isinstance(error, OSError | _UnusableError):
                raise
            failure = error
        if self._agreeing.any(failure is not None):
            raise failure or _UnusableError("could not be filled by another process")

    def _create(self) -> None:
        """Process 0 makes the files, before the others open them."""
        if not self._processes.is_main:
            return
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # From here on until it is written anew the data are between two depths.
            (self._folder / INDEX).unlink(missing_ok=True)
        if self._store is None:
            self._store = MemoryStore() if self._folder is None else FileStore(self._folder / DATA)
        if self.limit_bytes is None:
            self.limit_bytes = _free_bytes(self._folder) // 2

    def _open(self) -> None:
        """The others open what process 0 made."""
        if self._store is None:
            assert self._folder is not None
            self._store = FileStore(self._folder / DATA, size=0)

    def _fill(
        self, stack: Stack, depth: int, blocks: Iterable[Batch], around: Callable[[Any], Any], computed: Rows
    ) -> None:
        """Every process lays out all rows alike, and computes and writes those of its own blocks, into ``computed`` too.

        Those that run the layers together take turns together: who has nothing to compute, any longer or for this turn, runs
        them for the others.
        """

        def run(inputs: Batch, hidden: Tensor | None) -> Tensor:
            with around(inputs):
                return stack.run(inputs, start=self.depth, stop=depth, hidden=hidden)

        batches = iter(blocks)
        first = next(batches, None)
        if first is None:
            return
        spare = stack.select(first, [0])
        rank, count = self._processes.rank, self._processes.count
        if not self._width and max(count, self._sharers.count) > 1:
            # How wide a row is, and of which dtype, from one of them.
            hidden = run(spare, None)
            self._computed, self._width = hidden.dtype, hidden.shape[-1]

        def own_blocks() -> Iterator[_Block]:
            grown: set[bytes] = set()
            for number, batch in enumerate(itertools.chain([first], batches)):
                block = self._lay_out(batch, grown)
                if block.rows and number % count == rank:
                    yield block
                elif block.rows and not self.depth:
                    self._leave_room(block)

        failure: Exception | None = None
        for block in self._sharers.in_step(own_blocks()):
            inputs = spare if block is None else stack.select(block.batch, block.rows)
            stored = None
            if self.depth:
                columns = inputs["input_ids"].shape[1]
                stored = None if block is None else self._read([block.keys[row] for row in block.rows], columns)
                if block is not None and stored is None:
                    failure = failure or _UnusableError("was cut or altered")
                if stored is None:
                    stored = torch.zeros(*inputs["input_ids"].shape, self._width, dtype=self._computed)
                stored = stored.to(inputs["input_ids"].device)
            # Whatever has gone wrong: the others need this one.
            hidden = run(inputs, stored)
            if block is not None and failure is None:
                try:
                    self._keep(block, hidden, computed)
                except (OSError, _UnusableError) as error:
                    failure = error
            if failure is not None and self._sharers.count == 1:
                break
        if failure is not None:
            raise failure

    def _lay_out(self, batch: Batch, grown: set[bytes]) -> _Block:
        """Find the rows of a batch that are to be kept at the new depth, each example once.

        Args:
            batch: The batch.
            grown: Keys of the examples that are at the new depth; those of this batch are added.
        """
        keys, lengths = make_keys(batch), count_tokens(batch)
        rows = []
        for row, key in enumerate(keys):
            # From the input on what is not there yet, later on what is. An example without tokens has nothing to keep.
            if key not in grown and (key in self._rows) == (self.depth > 0) and lengths[row]:
                rows.append(row)
                grown.add(key)
        # Nothing is computed that does not fit; how large a row is shows only with the first block.
        return _Block(batch, keys, lengths, self._fitting(rows, lengths) if self._width else rows)

    def _keep(self, block: _Block, hidden: Tensor, computed: Rows) -> None:
        """Write the rows of a block, which ``hidden`` has in their order, and enter them."""
        assert self._store is not None
        keys, lengths, rows = block.keys, block.lengths, block.rows
        self._computed, self._width = hidden.dtype, hidden.shape[-1]
        kept = hidden.to(device="cpu", dtype=self._dtype or hidden.dtype)
        parts = {row: kept[i, : lengths[row]] for i, row in enumerate(rows)}
        overflowed = kept.isinf() & hidden.isfinite().to("cpu")
        if any(overflowed[i, : lengths[row]].any() for i, row in enumerate(rows)):
            raise _UnusableError(f"cannot keep values beyond the range of {str(kept.dtype).removeprefix('torch.')}")
        rows = self._fitting(rows, lengths)
        if not self.depth:
            offset = self._store.extend(sum(parts[row].nbytes for row in rows))
        for row in rows:
            part = parts[row].contiguous().view(torch.uint8).numpy()
            at = self._rows[keys[row]][0] if self.depth else offset
            self._store.write(at, part)
            self._rows[keys[row]] = computed[keys[row]] = (at, lengths[row], xxhash.xxh3_64_intdigest(part.data))
            if not self.depth:
                offset += part.nbytes

    def _leave_room(self, block: _Block) -> None:
        """Place rows that another process writes; it tells their checksums."""
        assert self._store is not None and self._computed is not None
        token_bytes = self._width * (self._dtype or self._computed).itemsize
        for row in block.rows:
            tokens = block.lengths[row]
            self._rows[block.keys[row]] = (self._store.extend(tokens * token_bytes), tokens, 0)

    def _fitting(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Those of some rows for which there is room, the first ones first; what is kept already has its room."""
        assert self._store is not None and self._computed is not None and self.limit_bytes is not None
        if self.depth:
            return list(rows)
        token_bytes = self._width * (self._dtype or self._computed).itemsize
        room, fitting = self.limit_bytes - self._store.size, []
        for row in rows:
            if lengths[row] * token_bytes <= room:
                room -= lengths[row] * token_bytes
                fitting.append(row)
        return fitting

    def _read(self, keys: Sequence[bytes], columns: int) -> Tensor | None:
        assert self._store is not None and self._computed is not None
        hidden = torch.zeros(len(keys), columns, self._width, dtype=self._dtype or self._computed)
        target = hidden.view(torch.uint8).numpy()
        try:
            for row, key in enumerate(keys):
                offset, tokens, checksum = self._rows[key]
                part = target[row, :tokens]
                if not self._store.read(offset, part) or xxhash.xxh3_64_intdigest(part.data) != checksum:
                    return None
        except OSError as error:
            log.debug("reading activations: %s", error)
            return None
        return hidden.to(self._computed)

    def _write_index(self, fingerprint: str) -> None:
        if self._folder is None or not self._processes.is_main:
            return
        assert isinstance(self._store, FileStore)
        self._store.sync()
        header = {
            "fingerprint": fingerprint,
            "path": self.path,
            "bytes": self._store.size,
            "width": self._width,
            "dtype": str(self._dtype),
            "computed": str(self._computed).removeprefix("torch."),
        }
        write_index(self._folder / INDEX, header, self._rows)

    def _drop(self, reason: str) -> None:
        log.warning("the activation cache %s; it is dropped, and the frozen layers run again from here on", reason)
        self.give_up()


def _free_bytes(folder: Path | None) -> int:
    if folder is not None:
        return shutil.disk_usage(folder).free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

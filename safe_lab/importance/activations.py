"""Activations at the sites of units: how they are read, which of their rows count, and where a reference is kept.

Shapes: B examples, T tokens, N rows, D features.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Batch, Probe, count_examples

Reader = Callable[[nn.Module, Tensor, Callable[[], Tensor]], None]
MIB = 2**20


def select_rows(output: Any, batch: Batch, *, pooling: str) -> Tensor:
    """The rows of a module's output that stand for the batch.

    Args:
        output: A tensor, or a tuple, list or mapping whose first tensor is meant: (B, T, D); or (B, D), (N, D), whose
            rows are taken as they are; or (B, C, H, W) and the like, channels second, where every position is a row
            of C features.
        batch: The input. Its ``attention_mask`` counts where its shape is the (B, T) of the output.
        pooling: ``tokens``: every token that is not padding. ``first``: the first such token of each example.

    Returns:
        (N, D).

    Raises:
        ValueError: There is no tensor in the output, or no first token (more than three dimensions).
    """
    if not isinstance(output, Tensor):
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            kind = type(output).__name__
            raise ValueError(f"a unit's site must return a tensor or a tuple with one, got {kind}: take another site")
        return select_rows(tensors[0], batch, pooling=pooling)
    if output.dim() <= 2:
        return output.reshape(len(output), -1)
    if output.dim() > 3:
        if pooling == "first":
            raise ValueError(
                f"pooling: first needs (batch, tokens, features), got {tuple(output.shape)}: set pooling: tokens"
            )
        return output.movedim(1, -1).flatten(0, -2)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != output.shape[:2]:
        return output[:, 0] if pooling == "first" else output.flatten(0, 1)
    kept_BT = mask.to(output.device) != 0
    if pooling == "first":
        # Not token 0: decoders are often padded on the left.
        return output[torch.arange(len(output), device=output.device), kept_BT.int().argmax(dim=1)]
    return output[kept_BT]


def read_sites(probe: Probe, *, pooling: str, read: Reader) -> None:
    """Run the probe once without gradients and hand over the rows at every call of a unit's site.

    Args:
        probe: The probe. Units may share a site; it is then read once.
        pooling: See :func:`select_rows`.
        read: Called as ``read(site, x_ND, again)``; ``again()`` runs the site anew on the same input and returns its
            rows.

    Raises:
        ValueError: A unit has no site.
    """
    for unit in probe.units:
        if unit.site is None:
            raise ValueError(
                f"unit {unit.name} has no site to read activations at: build it with site=, or use another metric"
            )
    batch: Batch = {}
    replaying = False

    def hook(site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A site run again calls this hook anew, and those of the sites inside it.
        if replaying:
            return

        def again() -> Tensor:
            nonlocal replaying
            replaying = True
            try:
                inputs = {name: _without_cache(value) for name, value in kwargs.items()}
                return select_rows(site(*map(_without_cache, args), **inputs), batch, pooling=pooling)
            finally:
                replaying = False

        read(site, select_rows(output, batch, pooling=pooling), again)

    with ExitStack() as hooks, torch.no_grad():
        for site in dict.fromkeys(unit.site for unit in probe.units if unit.site is not None):
            hooks.callback(site.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in filter(count_examples, probe.batches):
            probe.loss_function(probe.model, batch)


def _without_cache(value: Any) -> Any:
    """None for a key-value cache of transformers: it began empty, and a second call would append its keys again."""
    return None if hasattr(value, "get_seq_length") else value


class Reference:
    """Rows of the reference in an anonymous temporary file, one block for each call of a site.

    Written in the activations' own dtype, once, before training; read block by block at every scoring. A full disk
    raises, as the file is written and read and not mapped.

    Attributes:
        self_hsic: HSIC(Y, Y) of each site, computed while its rows went by.
    """

    def __init__(self) -> None:
        self.self_hsic: dict[nn.Module, float] = {}
        self._blocks: dict[nn.Module, list[tuple[int, torch.Size, torch.dtype]]] = {}
        self._num_bytes = 0
        self._error: OSError | None = None
        # Unbuffered, so that a full disk shows in write(); open as long as this object lives.
        self._file = tempfile.TemporaryFile(prefix="safe_lab-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def write(self, site: nn.Module, y_ND: Tensor) -> None:
        """Append the rows of one call of ``site``.

        After a failure bytes are still counted, so that :meth:`check_written` can tell how many are needed.
        """
        self._blocks.setdefault(site, []).append((self._num_bytes, y_ND.shape, y_ND.dtype))
        # Bytes, as NumPy has no bfloat16.
        rows = y_ND.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self._num_bytes += len(rows)
        try:
            while self._error is None and len(rows):
                rows = rows[self._file.write(rows) :]
        except OSError as error:
            self._error = error

    def check_written(self) -> None:
        """Make sure that every row is on disk.

        Raises:
            OSError: The disk is full or failed.
        """
        if self._error is not None:
            raise OSError(
                self._error.errno,
                f"the reference activations of cka need {self._num_bytes / MIB:.1f} MiB in {tempfile.gettempdir()}, "
                f"and writing them failed ({self._error}): take fewer probe samples, set TMPDIR to a larger disk, "
                "or set pooling: first",
            ) from self._error

    def num_blocks(self, site: nn.Module) -> int:
        """How often ``site`` ran."""
        return len(self._blocks.get(site, ()))

    def read(self, site: nn.Module, call: int, device: torch.device) -> Tensor:
        """The rows (N, D) of call number ``call`` of ``site``."""
        offset, shape, dtype = self._blocks[site][call]
        self._file.seek(offset)
        rows = np.fromfile(self._file, dtype=np.uint8, count=shape.numel() * dtype.itemsize)
        # An empty array has a stride that torch cannot view as another dtype.
        y_ND = torch.from_numpy(rows).view(dtype).reshape(shape) if rows.size else torch.empty(shape, dtype=dtype)
        return y_ND.to(device)

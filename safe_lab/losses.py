"""Training losses on their way from the device to a row, and what is wrong where one is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safe_lab.processes import ALONE, Processes


class Losses:
    """Losses of batches since the last row.

    Reading one from an accelerator, or from other processes, waits for it: there they are read together, before a row, a scoring
    or a checkpoint.
    """

    def __init__(self, find_cause: Callable[[], str], processes: Processes = ALONE) -> None:
        """There are none yet.

        Args:
            find_cause: Says which weights are not finite, once a loss is not.
            processes: Over which losses are averaged; all of them read at the same steps.
        """
        self._processes = processes
        self._find_cause = find_cause
        self._unread: list[tuple[int, Tensor]] = []
        self._read: list[float] = []

    def record(self, step: int, parts: Sequence[Tensor]) -> None:
        """Take in what the parts of a batch add to its loss.

        Args:
            step: Optimizer step that the batch belongs to.
            parts: One scalar each.

        Raises:
            FloatingPointError: As :meth:`read`.
        """
        self._unread.append((step, parts[0] if len(parts) == 1 else torch.stack([*parts]).sum()))
        if parts[0].device.type == "cpu" and self._processes.count == 1:
            self.read()

    def read(self) -> None:
        """Fetch what has not been.

        Raises:
            FloatingPointError: A loss is NaN or infinite; the message names step and weights.
        """
        if not self._unread:
            return
        steps, losses = zip(*self._unread, strict=True)
        self._unread.clear()
        means = self._processes.sum(torch.stack(losses).float()) / self._processes.count
        for step, loss in zip(steps, means.tolist(), strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; {self._find_cause()}; the last checkpoint stays"
                )
            self._read.append(loss)

    def take_mean(self) -> float:
        """Mean loss of the batches since the last call.

        Raises:
            FloatingPointError: As :meth:`read`.
        """
        self.read()
        mean = sum(self._read) / len(self._read)
        self._read.clear()
        return mean

    def state_dict(self) -> list[float]:
        """What no row tells yet; :meth:`read` comes first."""
        assert not self._unread
        return list(self._read)

    def load_state_dict(self, losses: Sequence[float]) -> None:
        """Go on from :meth:`state_dict`."""
        self._unread.clear()
        self._read = list(losses)

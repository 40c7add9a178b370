"""A training's checkpoints: its weights, and what its parts say of themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from safe_lab import checkpoint
from safe_lab.processes import Processes
from safe_lab.run_folder import RunFolder, RunFolderError
from safe_lab.weights import TrainedWeights

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part that a resumed run must find as it was."""

    def state_dict(self) -> Any:
        """Plain values and tensors."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from :meth:`state_dict`."""


class TrainingState:
    """Saves and restores all parts of a training together.

    Attributes:
        num_unaccounted: Processes that have trained this run and do not any more: what they cost is in no figure.
    """

    def __init__(
        self,
        folder: RunFolder,
        processes: Processes,
        weights: TrainedWeights,
        *,
        parts: Mapping[str, Stateful],
        own_parts: Mapping[str, Stateful],
        base_fingerprint: str,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: Where checkpoints lie, and the rows that belong to them.
            processes: Those that train together; process 0 reads and writes for all, as they may have no disk in common.
            weights: What trains.
            parts: By name, in the order in which they are to be restored, after the weights: the same on all processes.
            own_parts: Those of which each process has its own; restored last.
            base_fingerprint: Hash of the base weights, which a checkpoint must have been made on.
        """
        self._folder = folder
        self._processes = processes
        self._weights = weights
        self._parts = parts
        self._own_parts = own_parts
        self._base_fingerprint = base_fingerprint
        self.num_unaccounted = 0

    def save(self, step: int, *, keep: int) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the newest ``keep``; called by all processes."""
        # On all of them, as a part may ask the others.
        shared, by_process = _states(self._parts), self._processes.gather(_states(self._own_parts))
        if not self._processes.is_main:
            return
        state = {
            **shared,
            "processes": by_process,
            "num_unaccounted": self.num_unaccounted,
            "rows": self._folder.sizes(),
            "base_fingerprint": self._base_fingerprint,
        }
        checkpoint.save(self._folder.checkpoints / f"step-{step:08d}", self._weights.tensors(), state)
        checkpoint.keep_newest(self._folder.checkpoints, keep)

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False if there is none, and the run starts anew.

        A checkpoint that is damaged, or to which rows are lost, is named and removed, and the one before it is tried.

        Raises:
            ValueError: The checkpoint was made on other base weights.
        """
        found = self._processes.broadcast(self._find() if self._processes.is_main else None)
        if found is None:
            # Of a run that was not begun before, nobody has lost anything.
            if (self._folder.path / "config.yaml").exists():
                log.warning("there is no whole checkpoint to go on from: the run starts anew")
            return False
        tensors, state, folder = found
        if state["base_fingerprint"] != self._base_fingerprint:
            raise ValueError(
                f"{folder}: was made on other base weights than model.path gives now; --overwrite starts anew"
            )
        self._weights.load(tensors)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.num_unaccounted = state["num_unaccounted"] + max(0, len(state["processes"]) - self._processes.count)
        self._load_own(state["processes"])
        return True

    def _find(self) -> tuple[dict[str, Tensor], dict[str, Any], Path] | None:
        for folder in reversed(checkpoint.steps(self._folder.checkpoints)):
            try:
                tensors, state = checkpoint.load(folder)
                self._folder.cut(state["rows"])
            except (checkpoint.DamagedError, RunFolderError) as error:
                log.warning("checkpoint %s is passed over: %s", folder.name, error)
                checkpoint.remove(folder)
            else:
                return tensors, state, folder
        return None

    def _load_own(self, by_process: list[dict[str, Any]]) -> None:
        before, now = len(by_process), self._processes.count
        if before != now:
            log.warning(
                "the checkpoint is of %d processes, and %d go on: same batches, weights and freezing, but dropout draws other "
                "numbers, sums are rounded in another order, and what the earlier processes cost is told of %d of them",
                before,
                now,
                min(before, now),
            )
        if self._processes.rank < before:
            for name, part in self._own_parts.items():
                part.load_state_dict(by_process[self._processes.rank][name])


def _states(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}

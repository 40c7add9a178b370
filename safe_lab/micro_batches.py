"""What of a batch goes through the model at once: as much as fits the memory budget, and with little padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from safe_lab.importance.probe import Batch
from safe_lab.memory import Stage, halved, split_batch
from safe_lab.processes import ALONE, Processes

log = logging.getLogger(__name__)


class MicroBatches:
    """Cuts loaded batches, in each stage of a run as is planned for it.

    Attributes:
        has_halved: Memory ran out in this stage, and micro-batches have half as many rows since.
    """

    def __init__(
        self,
        plan_stage: Callable[[Sequence[bool]], Stage] | None,
        *,
        trim_padding: int | None,
        sharers: Processes = ALONE,
    ) -> None:
        """No stage has begun yet.

        Args:
            plan_stage: Micro-batches that fit the memory budget, from which units are frozen; None: there is no budget.
            trim_padding: Tokens of padding that a further micro-batch must spare; None: no batch is cut for that.
            sharers: Those over which the model's weights are spread: they cut their batches into as many.
        """
        self._plan_stage = plan_stage
        self._trim_padding = trim_padding
        self._sharers = sharers
        self._stage: Stage | None = None
        self.has_halved = False

    def enter_stage(self, frozen: Sequence[bool], *, halve: bool = False) -> None:
        """Plan for what is frozen now.

        Args:
            frozen: Whether a unit is, by unit.
            halve: Memory has run out in this stage before.

        Raises:
            ValueError: Not even a single row fits the budget.
        """
        self.has_halved = halve
        if self._plan_stage is not None:
            stage = self._plan_stage(frozen)
            self._stage = halved(stage) if halve else stage

    @property
    def longest_rows(self) -> int | None:
        """Most of the longest rows at a time; None: there is no budget."""
        return None if self._stage is None else min(self._stage.most_rows)

    @property
    def eval_rows(self) -> Callable[[int], int] | None:
        """Most rows of an evaluation batch by the tokens of its longest; None: there is no budget."""
        return None if self._stage is None else self._stage.eval_rows

    @property
    def can_halve(self) -> bool:
        """Whether :meth:`halve` may be called: there is a budget, and in this stage it has not been."""
        return self._stage is not None and not self.has_halved

    def halve(self) -> None:
        """The forecast was too low: half as many rows from here on, to the end of the stage."""
        assert self._stage is not None
        self._stage, self.has_halved = halved(self._stage), True
        log.warning("from here on at most %d rows of the longest texts at a time", min(self._stage.most_rows))

    def state_dict(self) -> dict[str, bool]:
        """What of the stage is not planned."""
        return {"has_halved": self.has_halved}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Go on from :meth:`state_dict`; the stage is to be entered."""
        self.has_halved = state["has_halved"]

    def split(self, batch: Batch) -> Iterable[tuple[Batch, float]]:
        """Micro-batches with their weights; with neither budget nor trimming the very batch, with weight 1.

        Where another process has more of them, the smallest is there again, with weight 0.
        """
        if self._stage is None and self._trim_padding is None:
            return [(batch, 1.0)]
        most_rows = None if self._stage is None else self._stage.rows
        parts = list(split_batch(batch, most_rows, trim_padding=self._trim_padding))
        more_elsewhere = self._sharers.largest(len(parts)) - len(parts)
        smallest, _ = min(parts, key=lambda part: part[0]["input_ids"].numel())
        return [(smallest, 0.0)] * more_elsewhere + parts

"""What a run itself asks of the plan: micro-batches within its memory budget, and what freezing will save."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from safe_lab.byte_size import parse_bytes
from safe_lab.config import Config
from safe_lab.memory import Stage, plan_stage
from safe_lab.memory.predict import Rehearsal
from safe_lab.model import num_positions
from safe_lab.plan.depths import fill_depths, find_period, group_alike
from safe_lab.plan.subject import build_subject
from safe_lab.policy import PredictedSavings
from safe_lab.prefix.rows import round_up
from safe_lab.rng import get_rng_state, set_rng_state

log = logging.getLogger(__name__)


class Planner:
    """Plans the micro-batches of a run, stage by stage.

    Attributes:
        largest_batch: Rows of any length that fit at any stage, evaluated or trained on.
    """

    def __init__(self, config: Config, *, num_labels: int, longest: int) -> None:
        """Plan the first stage, in which nothing is frozen.

        Args:
            config: The run; ``memory.budget`` is set.
            num_labels: Size of the head.
            longest: Tokens of the longest example of all splits.

        Raises:
            ValueError: Not even a single row fits the budget, or the model can be rehearsed in no way.
        """
        assert config.memory.budget is not None
        self._config = config
        self._num_labels = num_labels
        # The prefix pads its rows, so that whatever runs is planned for at the length it may be padded to.
        self._longest = round_up(longest)
        self._budget_bytes = parse_bytes(config.memory.budget)
        streams = get_rng_state()
        self._subject = build_subject(config, num_labels=num_labels)
        set_rng_state(streams)
        for note in self._subject.notes:
            log.warning("memory.budget: %s", note)
        self._recomputing: Rehearsal | None = None
        self._stages: dict[tuple[tuple[int, ...], int], Stage] = {}
        model: Any = self._subject.rehearsal.model
        positions = num_positions(model.get_base_model())
        self._longest = min(self._longest, positions or self._longest)
        first = self.plan([False] * len(self._subject.rehearsal.units), kept_bytes=0)
        self.largest_batch = min(first.rows(longest), first.eval_rows(longest))

    def plan(self, frozen: Sequence[bool], *, kept_bytes: int) -> Stage:
        """The stage in which these units are frozen.

        Args:
            frozen: Whether a unit is, by unit.
            kept_bytes: What savings keep beside the model on its device.

        Raises:
            ValueError: Not even a single row fits the budget.
        """
        config, indices = self._config, tuple(i for i, is_frozen in enumerate(frozen) if is_frozen)
        if (indices, kept_bytes) not in self._stages:
            # A model that does not run on fake tensors is rehearsed on real ones, and draws.
            streams = get_rng_state()
            allowed = config.memory.gradient_checkpointing and not config.model.gradient_checkpointing
            stage = plan_stage(
                self._subject.rehearsal,
                indices,
                budget_bytes=self._budget_bytes,
                kept_bytes=self._subject.kept_bytes + self._probe_bytes + kept_bytes,
                batch_rows=config.training.batch_size,
                eval_batch_rows=config.training.eval_batch_size,
                longest=self._longest,
                # A batch that fits whole may be cut all the same, and then the gradients of its first parts are there.
                accumulating=config.training.gradient_accumulation > 1 or config.savings.trim_padding is not None,
                with_checkpointing=self._rehearse_with_checkpointing if allowed else None,
            )
            self._stages[indices, kept_bytes] = replace(
                stage, most_rows=_padded(stage.most_rows), most_eval_rows=_padded(stage.most_eval_rows)
            )
            set_rng_state(streams)
        return self._stages[indices, kept_bytes]

    @property
    def _probe_bytes(self) -> int:
        """At most: int64 for ids, mask and token types of as many examples as are drawn if nothing is said."""
        return (self._config.freezing.probe_samples or 128) * self._longest * 3 * 8

    def _rehearse_with_checkpointing(self) -> Rehearsal:
        if self._recomputing is None:
            model = self._config.model.model_copy(update={"gradient_checkpointing": True})
            config = self._config.model_copy(update={"model": model})
            self._recomputing = build_subject(config, num_labels=self._num_labels).rehearsal
        return self._recomputing


def _padded(most_rows: Sequence[int]) -> tuple[int, ...]:
    """Most rows of each length, as of the multiple of 16 that it is padded to."""
    return tuple(most_rows[min(round_up(n), len(most_rows)) - 1] for n in range(1, len(most_rows) + 1))


@dataclass(frozen=True)
class StageRow:
    """What ``memory.budget`` makes of a batch while the first ``frozen_depth`` units from the input are frozen.

    Attributes:
        frozen_depth: Length of the frozen run from the input, in units.
        micro_batch_rows: Most of the longest rows that go through the model at once.
        gradient_checkpointing: Whether activations are recomputed.
        peak_bytes: Most bytes live in a step; without what folding keeps.
    """

    frozen_depth: int
    micro_batch_rows: int
    gradient_checkpointing: bool
    peak_bytes: int


def plan_stages(config: Config, *, num_units: int, num_labels: int) -> tuple[StageRow, ...]:
    """The stages of a run at every quarter of its depth, and where all but one unit are frozen; none without a budget.

    Args:
        config: The run.
        num_units: Number of its units.
        num_labels: Size of the head.

    Raises:
        ValueError: Not even a single row fits the budget, or the model can be rehearsed in no way.
    """
    if config.memory.budget is None:
        return ()
    planner = Planner(config, num_labels=num_labels, longest=config.data.max_length)
    rows = []
    for depth in sorted({*(num_units * quarter // 4 for quarter in range(4)), num_units - 1}):
        stage = planner.plan([unit < depth for unit in range(num_units)], kept_bytes=0)
        rows.append(StageRow(depth, min(stage.most_rows), stage.gradient_checkpointing, stage.peak_bytes))
    return tuple(rows)


def predict_savings(config: Config, num_labels: int) -> PredictedSavings:
    """What freezing saves of a full step, for policy ``budget``: FLOPs, or bytes at the peak, as ``freezing.budget_saves`` says.

    Args:
        config: The run.
        num_labels: Size of the head.

    Raises:
        ValueError: The model can be rehearsed in no way.
    """
    rehearsal = build_subject(config, num_labels=num_labels).rehearsal
    num_units, rows = len(rehearsal.units), config.training.batch_size

    def cost(frozen: Sequence[int]) -> int:
        trace = rehearsal.trace(frozen, rows=rows)
        return trace.total_flops if config.freezing.budget_saves == "flops" else trace.peak_bytes

    period = find_period(rehearsal.model, rehearsal.units)
    by_depth, _ = fill_depths(num_units, period, lambda depth: {"cost": cost(range(depth))})
    whole = by_depth[0]["cost"]
    # Units that are alike save alike; the first is looked at last, as frozen alone it is a frozen run from the input.
    elsewhere = [0] * num_units
    for alike in group_alike(rehearsal.model, rehearsal.units):
        saved = whole - cost([alike[-1]])
        for unit in alike:
            elsewhere[unit] = max(0, saved)
    return PredictedSavings(by_depth=[whole - figures["cost"] for figures in by_depth], elsewhere=elsewhere)

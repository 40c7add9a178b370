"""The Freezer: scoring -> decision -> effect, for any module and optimizer.

It knows no configuration, trainer or tracker::

    units = find_units(model, lambda: model(**batch))
    freezer = Freezer(model, units, optimizer, probe_batches, loss_function, FreezingRule(metric="cka", final=6))
    for epoch in range(10):
        train_one_epoch(model, optimizer)
        scoring = freezer.step(step)
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.decision import DEFAULT_RULE, Decider, FreezingRule
from safe_lab.importance import METRICS
from safe_lab.importance.probe import Batch, LossFunction, Probe, count_examples, share_of, undisturbed
from safe_lab.importance.update_norm import Initial
from safe_lab.policy import POLICIES, PredictedSavings
from safe_lab.processes import ALONE, Processes
from safe_lab.sharding import is_sharded
from safe_lab.units import Unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scoring:
    """What one call of :meth:`Freezer.step` came to. Lists are by unit, in the order of execution.

    Attributes:
        t: Number of the scoring, from 1.
        step: Optimizer step at which it took place.
        scores: Importance before normalisation; a frozen unit keeps the score it froze with; None if the policy needs none.
        normalized: Importance as compared with the threshold; None likewise.
        level: tau_t, or the share of the units or of their importance that the schedule gives at t; None for a policy without.
        update_norms: ``||Delta W||`` since the start.
        froze: Units that froze now.
        frozen: Whether a unit is frozen, after this scoring.
        frozen_depth: Length of the frozen run from the input, in units.
        warmup_end: t_w, once it is known.
        seconds: Wall time of scoring and freezing.
        freeze_seconds: Wall time of the freezing alone.
    """

    t: int
    step: int
    scores: list[float] | None
    normalized: list[float] | None
    level: float | None
    update_norms: list[float]
    froze: list[int]
    frozen: list[bool]
    frozen_depth: int
    warmup_end: int | None
    seconds: float
    freeze_seconds: float = 0.0

    @property
    def frozen_share(self) -> float:
        """Share of the units that are frozen, in [0, 1]."""
        return sum(self.frozen) / len(self.frozen)


class Freezer:
    """Scores adapters and freezes the unimportant ones, for good.

    What it promises: a frozen weight does not move by a bit any more, even if something else turns its ``requires_grad`` back
    on (PEFT's ``disable_adapter`` does); the optimizer state of the others is untouched; scoring leaves no trace.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Batch],
        loss_function: LossFunction,
        rule: FreezingRule = DEFAULT_RULE,
        *,
        seed: int = 0,
        savings: PredictedSavings | None = None,
        reference_is_current: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        """Take the model as it stands before training; the metric may run the probe once, to keep its reference.

        Args:
            model: The model.
            units: Its adapters, in the order of execution.
            optimizer: The optimizer that trains them (Accelerate's wrapper will do).
            batches: The probe: fixed examples of the training split, as mappings of tensors on the model's device; the same ones
                on each process.
            loss_function: ``loss_function(model, batch)`` gives the mean loss of a batch.
            rule: What freezes when.
            seed: For policies and metrics that draw.
            savings: What freezing saves, for policy ``budget``; None: 20 a unit in the frozen run from the input, 1 elsewhere.
            reference_is_current: The model as it stands is the pre-trained function, and switching adapters off is not.
            processes: Those that train copies of this model together, each with a Freezer of its own. They share the work of
                scoring, process 0 decides, and all freeze the same at the same call of :meth:`step`.

        Raises:
            ValueError: No units, savings of another number of units, or a metric that must switch single units off where
                that does not give the pre-trained function (``reference_is_current``), or a sharded model and batches that the
                processes cannot share equally.
        """
        if not units:
            raise ValueError("there are no units to freeze")
        if is_sharded(model) and any(count_examples(batch) % processes.count for batch in batches):
            raise ValueError(
                f"each probe batch needs a multiple of {processes.count} examples: the model is sharded, so that all "
                f"{processes.count} processes must run it equally often"
            )
        if savings is not None and len(savings.elsewhere) != len(units):
            raise ValueError(f"savings are of {len(savings.elsewhere)} units, and there are {len(units)}")
        switches_off = rule.metric == "contribution" or rule.metric_options.get("reference") == "without_adapter"
        if reference_is_current and switches_off and POLICIES[rule.policy].uses_scores:
            raise ValueError(
                f"metric {rule.metric} switches adapters off one by one, and with adapters that changed the base weights "
                "(PiSSA, OLoRA) a layer without its adapter is not the pre-trained one; use another metric"
            )
        self.model = model
        self.units = list(units)
        self.rule = rule
        self._policy = POLICIES[rule.policy]
        self._metric = METRICS[rule.metric]
        self._batches = batches
        self._loss_function = loss_function
        self._seed = seed
        self._decider = Decider(rule, len(units), seed=seed, savings=savings)
        # Accelerate wraps the optimizer; state and hooks live on the one inside.
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._optimizer.register_step_pre_hook(self._hold_frozen)
        self._held: list[nn.Parameter] = []
        self._memory: dict[str, Any] = {}
        self._reference_is_current = reference_is_current
        self._processes = processes
        self._shares = [share_of(batch, processes) for batch in batches]
        self._reference = None
        with undisturbed(model):
            self._start = METRICS["update_norm"].prepare(self._probe(self.units, None))
            if self._policy.uses_scores:
                self._reference = self._metric.prepare(self._probe(self.units, None), **rule.metric_options)

    @property
    def frozen(self) -> list[bool]:
        """Whether a unit is frozen, by unit."""
        return [i in self._decider.frozen for i in range(len(self.units))]

    @property
    def frozen_share(self) -> float:
        """Share of the units that are frozen, in [0, 1]."""
        return len(self._decider.frozen) / len(self.units)

    @property
    def frozen_depth(self) -> int:
        """Length of the frozen run of units from the input."""
        return self._decider.frozen_depth

    @property
    def batches(self) -> Sequence[Batch]:
        """The probe."""
        return self._batches

    @property
    def loss_function(self) -> LossFunction:
        """How the model is run on a batch."""
        return self._loss_function

    @property
    def frozen_parameters(self) -> list[nn.Parameter]:
        """The weights that do not train any more; one that several units share is among them once all of these froze."""
        return list(self._held)

    @property
    def kept(self) -> list[Tensor]:
        """Tensors it keeps beside the model: each unit as it was at the start, and what the metric remembers."""
        starts = [tensor for start in self._start.values() for tensor in start.parameters.values()]
        return [*starts, *(value for value in self._memory.values() if isinstance(value, Tensor))]

    @property
    def level(self) -> float | None:
        """tau_t at the last scoring, or the share of the units or their importance that the schedule gave; None without such."""
        return self._decider.level

    def step(self, step: int) -> Scoring:
        """Score the live units, decide, freeze. To be called once an interval.

        Args:
            step: Number of optimizer steps so far, for the record.

        Raises:
            FloatingPointError: A score is NaN or infinite; nothing is frozen.
        """
        began, decider = time.perf_counter(), self._decider
        decision = decider.decide(self._score(step) if decider.wants_scores else None)
        froze = self._processes.broadcast(decision.freezes)
        self._warn_of_odd_threshold(decision.normalized, froze)
        freeze_began = time.perf_counter()
        self._freeze(froze)
        freeze_seconds = time.perf_counter() - freeze_began
        with undisturbed(self.model):
            update_norms = METRICS["update_norm"].score(self._probe(self.units, self._start))
        return Scoring(
            t=decider.t,
            step=step,
            scores=decision.scores,
            normalized=decision.normalized,
            level=decision.level,
            update_norms=update_norms,
            froze=froze,
            frozen=self.frozen,
            frozen_depth=self.frozen_depth,
            warmup_end=decider.warmup_end,
            seconds=time.perf_counter() - began,
            freeze_seconds=freeze_seconds,
        )

    def explain_idle(self) -> str | None:
        """Why nothing has frozen, in a sentence for the person; None if something has, or nothing was to."""
        return self._decider.explain_idle()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides about later scorings: plain values and tensors."""
        return {
            "units": [unit.name for unit in self.units],
            **self._decider.state_dict(),
            "memory": copy.deepcopy(self._memory),
            "start": {name: asdict(start) for name, start in self._start.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`: what was frozen freezes again.

        Build the Freezer on the model as it stood before training, then load the weights and this state: the metric's
        reference (the pre-trained activations of CKA) is made when the Freezer is built, and is not in the state.

        Raises:
            ValueError: The state belongs to other units, or units are frozen here that are not in it.
        """
        names = [unit.name for unit in self.units]
        if list(state["units"]) != names:
            raise ValueError(
                f"the freezing state is of {len(state['units'])} other units than the model's {len(names)}"
            )
        if not self._decider.frozen <= set(state["frozen"]):
            raise ValueError(
                "units are frozen that are not frozen in the state, and freezing is for good: build it anew"
            )
        self._decider.load_state_dict(state)
        self._memory = copy.deepcopy(dict(state["memory"]))
        self._start = {name: Initial(**start) for name, start in state["start"].items()}
        self._freeze(state["frozen"])

    def _score(self, step: int) -> list[float]:
        live = [i for i in range(len(self.units)) if i not in self._decider.frozen]
        scores = list(self._decider.scores) if self._decider.scores is not None else [math.nan] * len(self.units)
        if live:
            probe = self._probe([self.units[i] for i in live], self._reference)
            with undisturbed(self.model):
                for i, score in zip(live, self._metric.score(probe, **self.rule.metric_options), strict=True):
                    scores[i] = score
        # To the bit: the warm-up and the threshold that all of them keep hang on it.
        scores = self._processes.broadcast(scores)
        for i in live:
            if not math.isfinite(scores[i]):
                raise FloatingPointError(
                    f"importance {self.rule.metric} of unit {self.units[i].name} is {scores[i]} at step {step}"
                )
        return scores

    def _probe(self, units: Sequence[Unit], reference: Any) -> Probe:
        return Probe(
            model=self.model,
            units=units,
            batches=self._shares,
            loss_function=self._loss_function,
            optimizer=self._optimizer,
            seed=self._seed,
            scoring=self._decider.t,
            reference=reference,
            memory=self._memory,
            reference_is_current=self._reference_is_current,
            processes=self._processes,
        )

    def _freeze(self, indices: Sequence[int]) -> None:
        """The effect of a freeze event, in one place; safe to repeat."""
        self._decider.freeze(indices)
        # A weight that several units share freezes with the last of them.
        live = {
            id(parameter)
            for i, unit in enumerate(self.units)
            if i not in self._decider.frozen
            for parameter in unit.parameters.values()
        }
        frozen = [parameter for i in sorted(self._decider.frozen) for parameter in self.units[i].parameters.values()]
        self._held = [parameter for parameter in frozen if id(parameter) not in live]
        changes = any(parameter.requires_grad for parameter in self._held)
        for parameter in self._held:
            parameter.requires_grad = False
            # None, not zero: under AdamW's weight decay a zero gradient still moves the weight.
            parameter.grad = None
            # Only the state goes; the parameter stays in its group, or the optimizer could not be restored on resume.
            self._optimizer.state.pop(parameter, None)
        dynamo = sys.modules.get("torch._dynamo")
        # Or torch.compile may go on with a graph in which the weights train (pytorch #139476). Not where nothing was compiled:
        # every optimizer imports dynamo, and on CUDA a first reset imports the whole inductor, for seconds (torch 2.13).
        if changes and dynamo is not None and dynamo.utils.counters.get("frames"):
            dynamo.reset()

    def _hold_frozen(self, *_: object) -> None:
        """Before each optimizer step: freeze again what something else has turned back on."""
        loose = [parameter for parameter in self._held if parameter.requires_grad or parameter.grad is not None]
        if loose:
            log.warning(
                "%d frozen weights had been made trainable again (by disable_adapter or set_adapter?); they are frozen again",
                len(loose),
            )
            self._freeze([])

    def _warn_of_odd_threshold(self, normalized: Sequence[float] | None, froze: Sequence[int]) -> None:
        if normalized is None:
            return
        if len(froze) == len(self.units) > 1:
            why = (
                "the budget of %.3g covers all importance"
                if self._policy.level == "importance"
                else "the threshold %.3g lies above every score"
            )
            log.warning("scoring %d freezes all %d units at once: " + why, self._decider.t, len(froze), self.level)

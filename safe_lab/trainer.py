"""The Accelerate loop: train, evaluate, score and freeze, checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from safe_lab import tracking
from safe_lab.config import TrainingSection
from safe_lab.console import Console
from safe_lab.data import EpochBatchSampler, Task
from safe_lab.data.tasks import metric_key
from safe_lab.evaluation import evaluate
from safe_lab.freezing import Freezer
from safe_lab.importance.probe import Batch, LossFunction
from safe_lab.losses import Losses
from safe_lab.memory import is_out_of_memory
from safe_lab.micro_batches import MicroBatches
from safe_lab.processes import Processes
from safe_lab.replicas import Replicas, Traffic
from safe_lab.resources import TRAINING, Meter, combine
from safe_lab.rng import RandomStreams, get_rng_state, set_rng_state
from safe_lab.run_folder import RunFolder
from safe_lab.savings import Savings
from safe_lab.tracking import Tracking
from safe_lab.training_state import TrainingState
from safe_lab.weights import TrainedWeights

log = logging.getLogger(__name__)

Every = Literal["epoch", "never"] | int


@dataclass
class Progress:
    """How far training has come; all of it is in every checkpoint.

    Attributes:
        epoch: Epochs completed.
        micro_step: Micro-batches done in the running epoch.
        step: Optimizer steps done.
        tokens: Tokens trained on, padding left out.
        metrics: The last evaluation.
        evaluated_at: Step of the last evaluation.
        best: The evaluation with the best main metric, and its step.
        without_gain: Evaluations since the best.
        stopped: Training was stopped early.
    """

    epoch: int = 0
    micro_step: int = 0
    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    without_gain: int = 0
    stopped: bool = False

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)


class OutOfMemoryElsewhereError(MemoryError):
    """Another process ran out of memory, and all begin the batch anew."""

    def __init__(self) -> None:
        super().__init__("on another process")


class Trainer:
    """Runs one training; everything it needs is handed in, built by ``run``."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        processes: Processes,
        model: nn.Module,
        weights: TrainedWeights,
        replicas: Replicas,
        optimizer: Any,
        scheduler: Any,
        batches: Any,
        sampler: EpochBatchSampler,
        validation: Mapping[str, Any],
        task: Task,
        loss_function: LossFunction,
        freezer: Freezer,
        interval: Literal["epoch"] | int,
        settings: TrainingSection,
        num_steps: int,
        savings: Savings,
        micro_batches: MicroBatches,
        sharpness: Callable[[], Mapping[str, float]] | None,
        sharpness_every: Literal["freeze"] | int,
        meter: Meter,
        folder: RunFolder,
        tracker: Tracking,
        console: Console,
        base_fingerprint: str,
    ) -> None:
        """Take over prepared parts.

        Args:
            accelerator: Has prepared model, optimizer and scheduler.
            processes: Those that train together; process 0 writes.
            model: The model with adapters.
            weights: What of it trains.
            replicas: The same on all processes.
            optimizer: AdamW over what trains.
            scheduler: The learning rate's schedule, stepped once an optimizer step.
            batches: Loader of the training split, which draws from ``sampler``.
            sampler: Order of the examples, by epoch.
            validation: Loader by name of the validation split; of this process's batches.
            task: What is learned, and by which metrics it is measured.
            loss_function: ``loss_function(model, batch)`` gives the mean loss.
            freezer: Scores and freezes.
            interval: When it does: each epoch, or every N steps.
            settings: The ``training`` section.
            num_steps: Optimizer steps in all.
            savings: What freezing is turned into.
            micro_batches: Cuts batches into what goes through the model at once.
            sharpness: Measures the sharpness where the weights stand, and leaves no trace; None: it is not measured.
            sharpness_every: When: after each freeze event, or every N epochs.
            meter: What the run costs.
            folder: The run folder.
            tracker: Where figures go.
            console: What the person sees.
            base_fingerprint: Hash of the base weights, which a checkpoint must have been made on.
        """
        self.progress = Progress()
        self.num_trained = weights.number
        self._accelerator = accelerator
        self._processes = processes
        self._model = model
        self._replicas = replicas
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._batches = batches
        self._sampler = sampler
        self._validation = validation
        self._task = task
        self._loss_function = loss_function
        self._freezer = freezer
        self._interval = interval
        self._settings = settings
        self.num_steps = num_steps
        self._savings = savings
        self._micro_batches = micro_batches
        self._sharpness = sharpness
        self._sharpness_every = sharpness_every
        self._is_past_return = False
        self._meter = meter
        self._clock = meter.clock
        self.folder = folder
        self._tracker = tracker
        self._console = console
        self._weights = weights
        self._losses = Losses(weights.explain_not_finite, processes)
        scaler = {} if accelerator.scaler is None else {"scaler": accelerator.scaler}
        self._state = TrainingState(
            folder,
            processes,
            weights,
            parts={
                "freezer": freezer,
                "savings": savings,
                "micro_batches": micro_batches,
                "optimizer": optimizer,
                "scheduler": scheduler,
                **scaler,
                "progress": self.progress,
                "losses": self._losses,
                "replicas": replicas,
            },
            own_parts={"meter": meter, "random streams": RandomStreams()},
            base_fingerprint=base_fingerprint,
        )
        # Of this process, since the tokens of all were last added up.
        self._tokens_here = 0
        self._learning_rate = 0.0
        self._gradient_norm: Tensor | float | None = None
        self._begins_step = True
        self._logged_at = (0.0, 0)
        meter.keep(lambda: weights.kept)

    def fit(self) -> None:
        """Train to the end, from wherever :attr:`progress` stands.

        Raises:
            FloatingPointError: A loss or a score is not finite; the last checkpoint stays.
        """
        self._micro_batches.enter_stage(self._freezer.frozen, halve=self._micro_batches.has_halved)
        self._meter.begin()
        while not self._ended:
            # On the loader, not the sampler: Accelerate's counts epochs itself, and would set the sampler back (1.15).
            self._batches.set_epoch(self.progress.epoch)
            self._sampler.start = self.progress.micro_step
            self._model.train()
            for batch in self._clock.each("data", self._batches):
                with self._accelerator.accumulate(self._replicas.model):
                    self._train_on(batch)
                if not self._advance():
                    continue
                if self._due(self._settings.log_every) or self._ended:
                    self._log()
                if self._due(self._settings.eval_every):
                    self.evaluate()
                # After the last step a unit would freeze for nothing.
                froze = self._due(self._interval) and not self._ended and self._score()
                if froze if self._sharpness_every == "freeze" else self._ends_epoch(self._sharpness_every):
                    self._measure_sharpness()
                if self._due(self._settings.save_every) or self._ended:
                    self.save()
                if self._ended:
                    break
        if self.progress.evaluated_at != self.progress.step:
            self.evaluate()
        self._count_tokens()

    def _train_on(self, batch: Batch) -> None:
        """Forward and backward of a batch, and the optimizer's step if it is the last of one.

        With a memory budget, in micro-batches that ought to fit. Should memory run out for all that on any process, once a stage,
        the batch is done anew with half as many rows.
        """
        if not self._micro_batches.can_halve:
            self._run(self._micro_batches.split(batch))
            return
        streams, begins_step = get_rng_state(), self._begins_step
        gradients = {p: p.grad.clone() for p in self._weights.live if p.grad is not None}
        try:
            self._run(self._micro_batches.split(batch))
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self._is_past_return:
                raise
            if not isinstance(error, OutOfMemoryElsewhereError):
                self._processes.any(True)
            log.warning("memory ran out at step %d, below the forecast: %s", self.progress.step + 1, error)
        # Out of the handler, in which the error still holds on to the tensors of the failed pass.
        self._micro_batches.halve()
        self._begins_step = begins_step
        for parameter in self._weights.live:
            parameter.grad = gradients.get(parameter)
        set_rng_state(streams)
        self._run(self._micro_batches.split(batch))

    def _run(self, parts: Iterable[tuple[Batch, float]]) -> None:
        """Forward and backward of the parts of a batch with their weights, and the optimizer's step if it is due."""
        parts, losses, self._is_past_return = list(parts), [], False
        share = self._sampler.weight(self.progress.micro_step)
        for number, (on_host, part_weight) in enumerate(parts, start=1):
            is_last, weight = number == len(parts), part_weight * share
            hidden = self._savings.hidden(on_host)
            part = send_to_device(on_host, self._accelerator.device, non_blocking=True)
            with self._metered(part, hidden, last=is_last), nullcontext() if is_last else self._replicas.held_back():
                with self._clock.on("forward"), self._savings.skipping(part, hidden):
                    loss = self._loss_function(self._replicas.model, part)
                # A whole batch has the operators of plain fine-tuning and no other.
                loss = loss if weight == 1 else loss * weight
                losses.append(loss.detach())
                with self._clock.on("backward"):
                    self._accelerator.backward(loss)
                if not is_last:
                    continue
                if self._micro_batches.can_halve and self._processes.any(False):
                    raise OutOfMemoryElsewhereError
                # From here on the batch cannot begin anew.
                self._is_past_return = True
                self._tokens_here += (
                    sum(int(part["attention_mask"].sum()) for part, weight in parts if weight) if share else 0
                )
                self._losses.record(self.progress.step + 1, losses)
                with self._clock.on("optimizer"):
                    if self._accelerator.sync_gradients:
                        self._replicas.average()
                    self._clip()
                    self._optimizer.step()
                    self._optimizer.zero_grad()

    def evaluate(self) -> dict[str, float]:
        """Measure the model on every validation split, and keep it if it is the best so far."""
        with self._meter.activity("evaluation"):
            self._weights.check(self.progress.step)
            metrics = evaluate(
                self._model,
                self._validation,
                self._task,
                processes=self._processes,
                skipping=partial(self._savings.skipping, once=True),
                most_rows=self._micro_batches.eval_rows,
            )
        self.progress.metrics, self.progress.evaluated_at = metrics, self.progress.step
        if not self.progress.best or metrics[self.main_metric] > self.progress.best[self.main_metric]:
            self.progress.best, self.progress.best_step, self.progress.without_gain = metrics, self.progress.step, 0
            if self._settings.select == "best":
                self._weights.keep_best()
        else:
            self.progress.without_gain += 1
        patience = self._settings.early_stopping
        self.progress.stopped = patience is not None and self.progress.without_gain >= patience
        with self._clock.on("tracking"):
            self._tracker.log({tracking.STEP: self.progress.step, tracking.EPOCH: self._epoch, **self.progress.metrics})
            self._console.evaluated(self._epoch, self.progress.metrics)
        return self.progress.metrics

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and drop the oldest."""
        if self._settings.save_every == "never":
            return
        with self._clock.on("checkpoint"):
            self._losses.read()
            self._count_tokens()
            self._weights.check(self.progress.step)
            self._state.save(self.progress.step, keep=self._settings.keep_checkpoints)
            # As a run that is resumed from here does.
            self._replicas.wrap()

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False if there is none, and the run starts anew.

        Raises:
            ValueError: The checkpoint was made on other base weights.
        """
        resumed = self._state.resume()
        self._logged_at = self._training_seconds, self.progress.tokens
        return resumed

    @property
    def traffic(self) -> Traffic:
        """What has gone between the processes."""
        return self._replicas.traffic

    @property
    def num_unaccounted(self) -> int:
        """Processes that have trained this run and do not any more: what they cost is in no figure."""
        return self._state.num_unaccounted

    def restore_best(self) -> None:
        """Take the weights of the best evaluation."""
        self._weights.restore_best()

    @property
    def main_metric(self) -> str:
        """Key of the metric by which the best evaluation is chosen: the task's main one on the first validation split."""
        return metric_key(next(iter(self._validation)), self._task.main_metric)

    @property
    def _ended(self) -> bool:
        return self.progress.stopped or self.progress.step >= self.num_steps

    @property
    def _epoch(self) -> float:
        return self.progress.epoch + self.progress.micro_step / len(self._sampler)

    def _advance(self) -> bool:
        """Count a micro-step; whether it ended an optimizer step."""
        self.progress.micro_step += 1
        if self.progress.micro_step == len(self._sampler):
            self.progress.epoch, self.progress.micro_step = self.progress.epoch + 1, 0
        if not self._accelerator.sync_gradients:
            return False
        self.progress.step += 1
        self._replicas.end_step()
        self._learning_rate = self._scheduler.get_last_lr()[0]
        self._scheduler.step()
        self._console.advance(self.progress.step, self._freezer)
        return True

    def _due(self, every: Every) -> bool:
        if every == "epoch":
            return self.progress.micro_step == 0
        return every != "never" and self.progress.step % every == 0

    def _clip(self) -> None:
        if self._accelerator.sync_gradients and self._settings.max_grad_norm is not None:
            self._gradient_norm = self._accelerator.clip_grad_norm_(
                self._model.parameters(), self._settings.max_grad_norm
            )

    def _log(self) -> None:
        loss = self._losses.take_mean()
        by_process = self._processes.gather(self._meter.recent())
        self._count_tokens()
        seconds, tokens = self._training_seconds, self.progress.tokens
        seconds_before, tokens_before = self._logged_at
        self._logged_at = seconds, tokens
        row = {
            tracking.STEP: self.progress.step,
            tracking.EPOCH: self._epoch,
            tracking.LOSS: loss,
            tracking.LEARNING_RATE: self._learning_rate,
            tracking.GRADIENT_NORM: None if self._gradient_norm is None else float(self._gradient_norm),
            tracking.LEVEL: self._freezer.level,
            tracking.FROZEN_SHARE: self._freezer.frozen_share,
            tracking.FROZEN_DEPTH: self._freezer.frozen_depth,
            tracking.TRAINABLE: sum(parameter.numel() for parameter in self._weights.live),
            **{tracking.SAVINGS.format(name=name): value for name, value in self._effect().items()},
            tracking.WALL_SECONDS: sum(self._clock.read().values()),
            tracking.TOKENS_PER_SECOND: (tokens - tokens_before) / (seconds - seconds_before),
            tracking.GRADIENT_BYTES: self._replicas.traffic.last_step_bytes,
            **{tracking.RESOURCES.format(name=name): value for name, value in combine(by_process).items()},
        }
        with self._clock.on("tracking"):
            self._tracker.log(row)
            if len(by_process) > 1:
                self._tracker.log_processes(self.progress.step, by_process)
            self._console.logged(row)

    def _ends_epoch(self, every: int) -> bool:
        return self.progress.micro_step == 0 and self.progress.epoch % every == 0

    def _measure_sharpness(self) -> None:
        if self._sharpness is None:
            return
        self._losses.read()
        with self._meter.aside("sharpness"):
            figures = self._sharpness()
        with self._clock.on("tracking"):
            self._tracker.log_sharpness(self.progress.step, self._epoch, figures)
            self._console.measured(self._epoch, figures)

    def _score(self) -> bool:
        """Score, freeze, and turn that into what it saves; whether anything froze."""
        self._losses.read()
        with self._meter.activity("scoring"):
            scoring = self._freezer.step(self.progress.step)
        self._clock.move("scoring", "freezing", scoring.freeze_seconds)
        if scoring.froze:
            with self._clock.on("freezing"):
                micro_steps_left = (self.num_steps - self.progress.step) * self._settings.gradient_accumulation
                self._savings.fold()
                # What folding keeps counts towards the budget, and is undone where it does not fit.
                self._micro_batches.enter_stage(self._freezer.frozen)
                self._savings.extend_prefix(passes_left=micro_steps_left / len(self._sampler))
                self._replicas.wrap()
        with self._clock.on("tracking"):
            effect = self._effect()
            self._tracker.log_scoring(scoring, self._epoch, effect)
            self._console.scored(scoring, self._freezer.units, self._epoch, effect)
        return bool(scoring.froze)

    def _effect(self) -> dict[str, int | None]:
        """What freezing has been turned into: figures for a row."""
        return asdict(self._savings.state) | {"micro_batch_rows": self._micro_batches.longest_rows}

    def _metered(self, part: Batch, hidden: Tensor | None, *, last: bool) -> AbstractContextManager[None]:
        ends_step = last and self._accelerator.sync_gradients
        first, self._begins_step = self._begins_step, ends_step
        return self._meter.micro_step(part, first=first, last=ends_step, hidden=hidden)

    def _count_tokens(self) -> None:
        """Add up what the processes have trained on."""
        self.progress.tokens += int(self._processes.sum(torch.tensor(self._tokens_here)))
        self._tokens_here = 0

    @property
    def _training_seconds(self) -> float:
        seconds = self._clock.read()
        return sum(seconds[activity] for activity in TRAINING)

"""The baseline: ``transformers.Trainer`` and PEFT, written as people write it today, on the model, data and order of a run."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from safe_lab.build import count_steps, load_parts
from safe_lab.config import Config
from safe_lab.data import Collator, EpochBatchSampler, Task, compute_metrics
from safe_lab.resources import Clock, EnergyMeter, Meter
from safe_lab.rng import get_rng_state, set_rng_state


def train(config: Config) -> dict[str, Any]:
    """Train as configured, with ``transformers.Trainer``; what freezes, saves and tracks in safe_lab is left out.

    Model, head and adapters start with the weights that a run of safe_lab draws from the same seed, and training goes through
    the same batches with the same dropout. Everything else is what a user of transformers gets: fused AdamW, evaluation in
    the order of the file, checkpoints with optimizer, schedule and tokenizer.

    Returns:
        ``metric`` (the main one, of the best evaluation or the last, as ``training.select`` says), ``losses`` as (step, mean loss
        since the last), ``tokens`` trained on (padding left out), and ``resources`` as in result.json.
    """
    transformers.set_seed(config.seed)
    _, attached, tokenizer, data = load_parts(config)
    drawn = get_rng_state()
    sampler = EpochBatchSampler(
        data.train["length"],
        config.training.batch_size,
        seed=config.seed,
        group_by_length=config.data.group_by_length,
    )
    trainer = MeteredTrainer(
        sampler,
        model=attached.model,
        args=build_arguments(config, num_steps=count_steps(len(sampler), config.training)),
        data_collator=Collator(tokenizer),
        train_dataset=data.train,
        eval_dataset=dict(data.validation) if len(data.validation) > 1 else next(iter(data.validation.values())),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: _measure(prediction, data.task),
    )
    # Trainer seeds the streams once more; dropout is to go on from the draws that made head and adapters, as in a run.
    set_rng_state(drawn)
    trainer.train()
    # The name Trainer gives to what a run calls its main metric.
    split = f"_{next(iter(data.validation))}" if len(data.validation) > 1 else ""
    main_metric = f"eval{split}_{data.task.main_metric}"
    evaluated_at = [row["step"] for row in trainer.state.log_history if main_metric in row]
    if trainer.state.global_step not in evaluated_at:
        trainer.evaluate()
    trainer.save_model()
    values = [row[main_metric] for row in trainer.state.log_history if main_metric in row]
    return {
        "metric": max(values) if config.training.select == "best" else values[-1],
        "losses": trainer.loss_curve(config.training.log_every),
        "tokens": int(trainer.num_tokens),
        "resources": trainer.meter.summary(),
    }


def build_arguments(config: Config, *, num_steps: int) -> TrainingArguments:
    """The ``training`` section in Trainer's words; what the section does not say stays as Trainer has it.

    Args:
        config: The run.
        num_steps: Optimizer steps in all.
    """
    settings = config.training
    return TrainingArguments(
        output_dir=str(config.run_folder / "trainer"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=num_steps if settings.max_steps else -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=math.ceil(settings.warmup_ratio * num_steps),
        max_grad_norm=settings.max_grad_norm or 0.0,
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        gradient_checkpointing=config.model.gradient_checkpointing or None,
        logging_steps=settings.log_every,
        **_strategy("eval", settings.eval_every),
        **_strategy("save", settings.save_every),
        save_total_limit=settings.keep_checkpoints,
        dataloader_num_workers=settings.num_workers,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def _strategy(activity: str, every: str | int) -> dict[str, Any]:
    if isinstance(every, int):
        return {f"{activity}_strategy": "steps", f"{activity}_steps": every}
    return {f"{activity}_strategy": {"epoch": "epoch", "never": "no"}[every]}


def _measure(prediction: EvalPrediction, task: Task) -> dict[str, float]:
    logits: Any = prediction.predictions
    predictions = np.squeeze(logits, -1) if task.kind == "regression" else logits.argmax(-1)
    return compute_metrics(task.metrics, predictions, np.asarray(prediction.label_ids))


class MeteredTrainer(transformers.Trainer):
    """``transformers.Trainer`` on the batches of a run, metered as a run is.

    Attributes:
        meter: There once training has begun.
        num_tokens: Tokens trained on, padding left out.
    """

    meter: Meter

    def __init__(self, sampler: EpochBatchSampler, **arguments: Any) -> None:
        """Take the order of the examples, and the arguments of ``transformers.Trainer``."""
        super().__init__(**arguments)
        self._sampler = sampler
        self._micro_step = ExitStack()
        self._begins_step = True
        self.num_tokens: Tensor | int = 0
        self._losses: list[tuple[int, Tensor]] = []
        self.add_callback(_MeterCallback(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's own loader, but for the order."""
        loader: DataLoader[Any] = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # An iterator draws a seed: out of dropout's stream, were there no generator.
            generator=torch.Generator(),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Trainer's own loader, which leaves dropout's stream alone."""
        loader: Any = super().get_eval_dataloader(eval_dataset)
        loader.base_dataloader.generator = torch.Generator()
        return cast("DataLoader[Any]", loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's own, from here to :meth:`end_micro_step` a micro-step of the meter."""
        self.num_tokens = self.num_tokens + inputs["attention_mask"].sum()
        ends_step = self.accelerator.sync_gradients
        self._micro_step.enter_context(self.meter.micro_step(inputs, first=self._begins_step, last=ends_step))
        self._begins_step = ends_step
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((self.state.global_step + 1, loss))
        return loss

    def end_micro_step(self) -> None:
        """The optimizer has stepped, if it was to."""
        self._micro_step.close()

    def loss_curve(self, every: int) -> list[tuple[int, float]]:
        """Mean loss of the micro-steps of each ``every`` steps and of the rest, by the last of the steps.

        Raises:
            FloatingPointError: A loss is NaN or infinite, which Trainer's own log hides (``logging_nan_inf_filter``).
        """
        spans: dict[int, list[float]] = {}
        for step, loss in self._losses:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {float(loss)} at step {step}")
            logged_at = min(math.ceil(step / every) * every, self.state.global_step)
            spans.setdefault(logged_at, []).append(float(loss))
        return [(step, sum(span) / len(span)) for step, span in spans.items()]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's own, metered."""
        # Trainer calls this for each of several splits by its name, within the evaluation of all.
        one_of_several = isinstance(eval_dataset, str)
        with nullcontext() if one_of_several else self.meter.activity("evaluation"):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics


class _MeterCallback(TrainerCallback):
    """Starts the meter with training, when the optimizer is there, and ends its micro-steps."""

    def __init__(self, trainer: MeteredTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_: Any, **parts: Any) -> None:
        clock, energy = Clock(args.device, "other"), EnergyMeter(args.device)
        self._trainer.meter = Meter(clock, energy, parts["model"], parts["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: Any, *_: Any, **__: Any) -> None:
        self._trainer.end_micro_step()
        if state.global_step % args.logging_steps == 0:
            # As a run does for its row, which keeps the meter from remembering every step.
            self._trainer.meter.recent()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._trainer.end_micro_step()

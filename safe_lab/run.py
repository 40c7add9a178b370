"""The composition root: configuration -> objects -> :class:`Result`. Strings from YAML become objects here and nowhere else."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safe_lab import checkpoint
from safe_lab import config as configuration
from safe_lab.adapters import Attached, attach, build_peft_config, find_units, save_adapter
from safe_lab.config import Config, FreezingSection, TrainingSection
from safe_lab.config import warnings as config_warnings
from safe_lab.console import Console
from safe_lab.data import Collator, Data, EpochBatchSampler, load_data
from safe_lab.environment import describe_environment
from safe_lab.freezing import Freezer, FreezingRule
from safe_lab.importance.probe import Batch
from safe_lab.model import check_length, checkpoint_gradients, load_model, load_tokenizer, loss_function
from safe_lab.optimizer import build_optimizer
from safe_lab.policy import POLICIES
from safe_lab.resources import TRAINING, Clock, EnergyMeter, Meter
from safe_lab.result import Result, summarize_freezing
from safe_lab.run_folder import RunFolder, claim, to_json
from safe_lab.section import ConfigError
from safe_lab.tracking import RESOURCES, Tracking, start_trackers
from safe_lab.trainer import Trainer

log = logging.getLogger(__name__)

ADAPTER_CARD = """# Adapter trained with safe_lab

On the base model {path}; in plain PEFT, where BASE is that model (a hub id or folder) and ADAPTER this folder:

```python
import json
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels={num_labels}, pad_token_id=tokenizer.pad_token_id)
model = PeftModel.from_pretrained(base, ADAPTER).eval()
labels = json.load(open(f"{{ADAPTER}}/labels.json"))  # names by id; empty for regression
```

That transformers reports the base's classifier as newly initialized is as it should be: the trained one is in the adapter.
"""


def run(config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Result:
    """Train as configured and write the run folder.

    Args:
        config: The run.
        resume: Go on from the newest whole checkpoint of an unfinished run of this configuration.
        overwrite: Remove what the run folder holds.
        console: What the person sees; None: nothing.

    Raises:
        ConfigError: Something the user can mend, in the configuration, the data or the run folder.
        FloatingPointError: A loss or score is not finite.
    """
    console = console or Console(quiet=True)
    for warning in config_warnings(config):
        log.warning(warning)
    with claim(config, resume=resume, overwrite=overwrite) as folder:
        with _as_bad_input():
            parts = build(config, folder, console)
        try:
            with _as_bad_input():
                resumed = resume and parts.trainer.resume()
            # Only now: a configuration that could not be built must not stand in the way of its correction.
            folder.write("config.yaml", configuration.dump(config))
            folder.write("environment.json", json.dumps(describe_environment(), indent=1))
            if resumed:
                parts.tracking.replay()
            else:
                folder.cut(dict.fromkeys(folder.sizes(), 0))
            return _train(config, folder, parts, console)
        finally:
            parts.tracking.close()


@contextmanager
def _as_bad_input() -> Iterator[None]:
    """What goes wrong while a run is put together is the user's to mend; later it is our bug."""
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(str(error)) from error


def _train(config: Config, folder: RunFolder, parts: Parts, console: Console) -> Result:
    _announce(console, config, parts)
    console.start(parts.trainer.num_steps, parts.trainer.progress.step)
    try:
        parts.trainer.fit()
    finally:
        console.stop()
    if config.training.select == "best":
        parts.trainer.restore_best()
    with parts.meter.clock.on("checkpoint"):
        export(
            parts.accelerator.unwrap_model(parts.model),
            folder,
            parts.tokenizer,
            config.model.path,
            parts.data.labels,
            parts.initial,
        )
    result = _conclude(config, parts)
    summary = asdict(result)
    folder.write("result.json", json.dumps(json.loads(to_json(summary)), indent=1, ensure_ascii=False))
    shown = ("metrics", "seconds", "parameters", "frozen_share", "frozen_depth", "steps")
    resources = {RESOURCES.format(name=name): value for name, value in result.resources.items()}
    parts.tracking.summarize({key: summary[key] for key in shown} | resources)
    idle = parts.freezer.explain_idle()
    if idle:
        log.warning(idle)
    console.summarize(summary, folder.path)
    return result


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    accelerator: Accelerator
    tokenizer: Any
    data: Data
    model: nn.Module
    initial: Mapping[str, Tensor] | None
    freezer: Freezer
    meter: Meter
    tracking: Tracking
    trainer: Trainer


def build(config: Config, folder: RunFolder, console: Console) -> Parts:
    """Everything that a run is made of, ready to train."""
    # Accelerate keeps its state for the life of the process; a second run would inherit precision and accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision.replace("none", "no"),
        gradient_accumulation_steps=config.training.gradient_accumulation,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes > 1:
        raise ValueError(
            "several processes are not supported yet: start one, without accelerate launch --multi_gpu or torchrun"
        )
    clock, energy = Clock(accelerator.device), EnergyMeter(accelerator.device)
    set_seed(config.seed)

    base, attached, tokenizer, data = load_parts(config)
    if config.model.gradient_checkpointing:
        checkpoint_gradients(base)

    collator = Collator(tokenizer)
    sampler, loader = build_train_loader(
        data, collator, config.training, seed=config.seed, group_by_length=config.data.group_by_length
    )
    num_steps = count_steps(len(sampler), config.training)
    optimizer = build_optimizer(attached.model, config.training)
    scheduler = transformers.get_scheduler(
        config.training.lr_schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.training.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    model, optimizer, scheduler, loader = accelerator.prepare(attached.model, optimizer, scheduler, loader)
    validation = {
        split: accelerator.prepare(build_eval_loader(dataset, collator, config.training.eval_batch_size))
        for split, dataset in data.validation.items()
    }

    probe = build_probe(
        data, collator, config.freezing.probe_samples, config.training.eval_batch_size, config.seed, accelerator.device
    )
    model.eval()
    units = find_units(
        model, lambda: model(**{key: value[:1] for key, value in probe[0].items()}), config.freezing.unit
    )
    meter = Meter(clock, energy, model, optimizer)
    with meter.activity("scoring"):
        freezer = Freezer(
            model,
            units,
            optimizer,
            probe,
            loss_function,
            build_rule(config.freezing),
            seed=config.seed,
            reference_is_current=attached.initial is not None,
        )
    meter.keep(lambda: freezer.kept)
    meter.keep(lambda: [*(attached.initial or {}).values(), *(tensor for batch in probe for tensor in batch.values())])
    trackers = start_trackers(
        **config.tracking.model_dump(),
        name=f"{config.name}/{config.variant}/seed-{config.seed}",
        group=config.name,
        folder=folder.path,
        config=config.model_dump(mode="json"),
    )
    tracking = Tracking(folder, units, trackers)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        batches=loader,
        sampler=sampler,
        validation=validation,
        task=data.task,
        loss_function=loss_function,
        freezer=freezer,
        interval=config.freezing.interval,
        settings=config.training,
        num_steps=num_steps,
        meter=meter,
        folder=folder,
        tracker=tracking,
        console=console,
        base_fingerprint=attached.base_fingerprint,
    )
    return Parts(accelerator, tokenizer, data, model, attached.initial, freezer, meter, tracking, trainer)


def load_parts(config: Config) -> tuple[PreTrainedModel, Attached, PreTrainedTokenizerBase, Data]:
    """Base model, the same with adapters, tokenizer and data; what is new in the model is drawn from the global seed."""
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    data = load_data(**config.data.model_dump(exclude={"group_by_length"}), tokenizer=tokenizer, seed=config.seed)
    regression = data.task.kind == "regression"
    base, heads = load_model(
        **config.model.model_dump(exclude={"gradient_checkpointing"}),
        num_labels=1 if regression else len(data.labels),
        regression=regression,
        pad_token_id=tokenizer.pad_token_id,
    )
    check_length(base, config.data.max_length)
    return base, attach(base, build_peft_config(**config.adapter.model_dump(), head_modules=heads)), tokenizer, data


def _conclude(config: Config, parts: Parts) -> Result:
    progress, freezer = parts.trainer.progress, parts.freezer
    best = config.training.select == "best"
    adapters, timeline = summarize_freezing(parts.trainer.folder.rows("importance.jsonl"))
    trainable = parts.trainer.num_trained
    resources = parts.meter.summary()
    seconds = resources["seconds"]
    training_seconds = sum(seconds[activity] for activity in TRAINING)
    return Result(
        name=config.name,
        variant=config.variant,
        seed=config.seed,
        main_metric=parts.trainer.main_metric,
        metrics=progress.best if best else progress.metrics,
        baselines=parts.data.baselines,
        labels=list(parts.data.labels),
        selected_step=progress.best_step if best else progress.step,
        steps=progress.step,
        epochs=progress.epoch,
        tokens=progress.tokens,
        seconds={
            "training": training_seconds,
            "evaluation": seconds["evaluation"],
            "scoring": seconds["scoring"] + seconds["freezing"],
            "checkpoint": seconds["checkpoint"],
        },
        resources={"tokens_per_second": progress.tokens / training_seconds, **resources},
        parameters={
            "total": sum(parameter.numel() for parameter in parts.model.parameters()),
            "adapters": sum(unit.num_parameters for unit in freezer.units),
            "trainable_at_start": trainable,
            "trainable_at_end": trainable
            - sum(unit.num_parameters for unit, frozen in zip(freezer.units, freezer.frozen, strict=True) if frozen),
        },
        truncated=parts.data.num_truncated,
        frozen_share=freezer.frozen_share,
        frozen_depth=freezer.frozen_depth,
        adapters=adapters,
        timeline=timeline,
    )


def build_rule(section: FreezingSection) -> FreezingRule:
    """The rule that the ``freezing`` section describes."""
    return FreezingRule(**section.model_dump(exclude={"unit", "probe_samples", "interval"}))


def build_train_loader(
    data: Data, collator: Collator, settings: TrainingSection, *, seed: int, group_by_length: bool
) -> tuple[EpochBatchSampler, DataLoader[Any]]:
    """Loader of the training split, and the sampler that sets its order."""
    sampler = EpochBatchSampler(data.train["length"], settings.batch_size, seed=seed, group_by_length=group_by_length)
    loader: DataLoader[Any] = DataLoader(
        data.train,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=settings.num_workers,
        pin_memory=torch.cuda.is_available(),
        # Making an iterator draws a seed: from the global stream, were there no generator, and resume would not be exact.
        generator=torch.Generator().manual_seed(seed),
    )
    return sampler, loader


def build_eval_loader(dataset: Any, collator: Collator, batch_size: int) -> DataLoader[Any]:
    """Loader of a validation split, longest first: no padding to speak of, and out of memory at once if at all."""
    lengths = dataset["length"]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return DataLoader(
        Subset(dataset, order), batch_size=batch_size, collate_fn=collator, generator=torch.Generator().manual_seed(0)
    )


def build_probe(
    data: Data, collator: Collator, num_samples: int | None, max_batch_size: int, seed: int, device: torch.device
) -> list[Batch]:
    """The fixed examples on which scores are computed: drawn from the training split, in batches of like length.

    Args:
        data: Its ``train`` is drawn from.
        collator: Pads.
        num_samples: How many; None: 128, but at most 1 in 50 (so that all scoring together costs under 2 % of the FLOPs of
            training) and at least 16.
        max_batch_size: Most examples in a batch; there are about eight batches, which leaves little padding.
        seed: Seed of the draw.
        device: Where the batches go.
    """
    available = len(data.train)
    wanted = max(16, min(128, available // 50)) if num_samples is None else num_samples
    if num_samples is not None and wanted > available:
        log.warning(
            "freezing.probe_samples is %d, and the training split has %d examples: all are taken", wanted, available
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    rows = sorted((data.train[i] for i in drawn), key=lambda row: row["length"])
    size = min(max_batch_size, max(4, wanted // 8))
    return [
        {key: value.to(device) for key, value in collator(rows[i : i + size]).items()}
        for i in range(0, len(rows), size)
    ]


def count_steps(batches_per_epoch: int, settings: TrainingSection) -> int:
    """Optimizer steps in all: an epoch's last step may accumulate fewer micro-batches."""
    steps = math.ceil(batches_per_epoch / settings.gradient_accumulation) * settings.epochs
    return min(steps, settings.max_steps or steps)


def export(
    model: Any,
    folder: RunFolder,
    tokenizer: Any,
    path: str,
    labels: Sequence[str],
    initial: Mapping[str, Tensor] | None,
) -> None:
    """Write ``adapter/`` whole or not at all: adapters and head in PEFT's format, tokenizer, names of the labels."""
    unfinished = folder.path / ".unfinished-adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_adapter(model, unfinished, initial=initial)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "labels.json").write_text(json.dumps(list(labels), ensure_ascii=False))
    (unfinished / "README.md").write_text(ADAPTER_CARD.format(path=path, num_labels=len(labels) or 1))
    checkpoint.sync(unfinished)
    shutil.rmtree(folder.adapter, ignore_errors=True)
    unfinished.rename(folder.adapter)


def _announce(console: Console, config: Config, parts: Parts) -> None:
    data, policy = parts.data, config.freezing.policy
    examples = ", ".join(
        [f"train {len(data.train)}", *(f"{split} {len(dataset)}" for split, dataset in data.validation.items())]
    )
    cut = sum(data.num_truncated.values())
    kind = f"{len(data.labels)} labels" if data.labels else "regression"
    truncation = f", {cut} cut to {config.data.max_length} tokens" if cut else ""
    console.say(f"{config.name}/{config.variant}: {data.task.name} ({examples} examples, {kind}{truncation})")
    if data.baselines:
        console.say("baselines: " + ", ".join(f"{name} {value:.4f}" for name, value in data.baselines.items()))
    total = sum(parameter.numel() for parameter in parts.model.parameters())
    by = f" by {config.freezing.metric}" if POLICIES[policy].uses_scores else ""
    console.say(
        f"{config.model.path}: {total / 1e6:.1f} M weights, {parts.trainer.num_trained / 1e6:.2f} M train; "
        f"{len(parts.freezer.units)} adapters, policy {policy}{by}; {parts.trainer.num_steps} steps"
    )
    if parts.trainer.progress.step:
        console.say(f"resumed at step {parts.trainer.progress.step}")

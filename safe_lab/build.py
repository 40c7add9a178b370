"""The composition root: configuration -> the objects of a run. Strings from YAML become objects here and nowhere else."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safe_lab import launch
from safe_lab.adapters import Attached, attach, base_weights, build_peft_config, find_units
from safe_lab.byte_size import parse_bytes
from safe_lab.config import Config, FreezingSection, TrainingSection
from safe_lab.console import Console
from safe_lab.data import Collator, Data, EpochBatchSampler, load_data
from safe_lab.data.loaders import build_eval_loader, build_probe, build_train_loader, iterate_blocks
from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.gauging import build_gauge, measure_during_training
from safe_lab.gauging import check as check_gauge
from safe_lab.importance.probe import Batch, undisturbed
from safe_lab.job import check_alike, is_to_shard
from safe_lab.memory import Stage
from safe_lab.micro_batches import MicroBatches
from safe_lab.model import (
    check_length,
    checkpoint_gradients,
    load_model,
    load_tokenizer,
    loss_function,
    set_gradient_checkpointing,
)
from safe_lab.optimizer import build_optimizer
from safe_lab.plan.stages import Planner, predict_savings
from safe_lab.prefix import ActivationCache, Prefix
from safe_lab.processes import ALONE, Processes
from safe_lab.replicas import Replicas
from safe_lab.resources import Clock, EnergyMeter, Meter
from safe_lab.run_folder import RunFolder
from safe_lab.savings import Savings
from safe_lab.sharding import shard
from safe_lab.sharpness import Gauge
from safe_lab.tracking import Tracking, start_trackers
from safe_lab.trainer import Trainer
from safe_lab.units import Unit
from safe_lab.weights import TrainedWeights

log = logging.getLogger(__name__)

# Examples whose activations are computed at once for the cache.
CACHE_BLOCK_ROWS = 32


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    processes: Processes
    tokenizer: Any
    data: Data
    model: nn.Module
    initial: Mapping[str, Tensor] | None
    base_fingerprint: str
    freezer: Freezer
    savings: Savings
    gauge: Gauge | None
    meter: Meter
    tracking: Tracking
    trainer: Trainer


def build(
    config: Config, folder: RunFolder, console: Console, accelerator: Accelerator, processes: Processes = ALONE
) -> Parts:
    """Everything that a run is made of, ready to train."""
    clock, energy = Clock(accelerator.device), EnergyMeter(accelerator.device)
    set_seed(config.seed)

    sharded = is_to_shard(config, processes)
    with launch.without_fsdp():
        base, attached, tokenizer, data = load_parts(config)
    check_alike(config, attached, data, processes)
    if config.model.gradient_checkpointing:
        checkpoint_gradients(base)
    if sharded:
        shard(
            attached.model,
            base_weights(attached.model),
            processes,
            accelerator.device,
            reshard_after_forward=launch.reshards_after_forward(),
        )

    sampler = EpochBatchSampler(
        data.train["length"],
        config.training.batch_size,
        seed=config.seed,
        group_by_length=config.data.group_by_length,
        rank=processes.rank,
        num_processes=processes.count,
    )
    num_steps = count_steps(len(sampler), config.training)
    optimizer = build_optimizer(attached.model, config.training)
    scheduler = transformers.get_scheduler(
        config.training.lr_schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.training.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    # On its device and in its precision; how gradients come together is for Replicas.
    model = accelerator.prepare_model(attached.model, device_placement=not sharded, evaluation_mode=True)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    # What of a batch falls to one process, which is what has to fit.
    of_one = config.model_copy(
        update={
            "training": config.training.model_copy(
                update={"batch_size": math.ceil(config.training.batch_size / processes.count)}
            )
        }
    )
    num_labels = 1 if data.task.kind == "regression" else len(data.labels)
    planner = None
    if config.memory.budget is not None:
        longest = max(max(dataset["length"]) for dataset in (data.train, *data.validation.values()))
        if config.savings.cache_store == "memory" and accelerator.device.type == "cpu":
            raise ValueError(
                "savings.cache_store: memory would take what memory.budget leaves on this device, which is the CPU: take disk"
            )
        planner = Planner(of_one, num_labels=num_labels, longest=longest)
    if config.savings.trim_padding is not None and tokenizer.padding_side == "left":
        log.warning(
            "savings.trim_padding has no effect: texts are padded on the left, where cutting would move their tokens"
        )
    collate = Collator(tokenizer)
    probe = [
        {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        for batch in build_probe(
            data.train,
            collate,
            num_samples=config.freezing.probe_samples,
            # Of which each process runs its share.
            max_batch_size=config.training.eval_batch_size
            if planner is None
            else planner.largest_batch * processes.count,
            seed=config.seed,
            multiple_of=processes.count if sharded else 1,
        )
    ]
    model.eval()
    units = find_units(
        model, lambda: model(**{key: value[:1] for key, value in probe[0].items()}), config.freezing.unit
    )
    overlapped = (
        config.memory.budget is None and not sharded and (processes.count == 1 or uses_all_that_trains(model, probe[0]))
    )
    replicas = Replicas(model, processes, overlapped=overlapped)
    meter = Meter(clock, energy, model, optimizer)
    in_units = {id(parameter) for unit in units for parameter in unit.parameters.values()}
    head = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in in_units]
    sharers = processes if sharded else ALONE
    prefix = build_prefix(config, model, units, probe[0], accelerator, folder, processes, sharers)
    predicted = predict_savings(config, num_labels) if config.freezing.policy == "budget" else None
    with meter.activity("scoring"):
        freezer = Freezer(
            model,
            units,
            optimizer,
            probe,
            loss_function if prefix is None else prefix.loss,
            build_rule(config.freezing),
            seed=config.seed,
            reference_is_current=attached.initial is not None,
            savings=predicted,
            processes=processes,
        )
    block_rows = CACHE_BLOCK_ROWS if planner is None else min(CACHE_BLOCK_ROWS, planner.largest_batch)
    savings = Savings(
        freezer,
        meter,
        prefix,
        fold_tolerance=config.savings.fold_tolerance if config.savings.fold and not sharded else None,
        blocks=lambda: iterate_blocks([data.train, *data.validation.values()], collate, block_rows),
    )
    meter.keep(lambda: freezer.kept)
    meter.keep(lambda: savings.kept)
    meter.keep(lambda: [*(attached.initial or {}).values(), *(tensor for batch in probe for tensor in batch.values())])

    gauge = None
    if config.sharpness.when != "never" or config.sharpness.every != "never":
        gauge = build_gauge(
            config.sharpness,
            model,
            units,
            data,
            tokenizer,
            device=accelerator.device,
            head=head,
            processes=processes,
            whole=savings.undone,
        )
        check_gauge(gauge, config.sharpness, training=True)
        if gauge.widens:
            replicas.wrap()

    def collate_ahead(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        savings.ahead(batch)
        return batch

    # Batches stay on the host until a micro-batch is cut from them, and its rows are looked up in the cache.
    # Dealt out to the processes already, and not by Accelerate, which would repeat examples to fill the last batch.
    loader, *eval_loaders = (
        prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
        for loader in (
            build_train_loader(
                data.train,
                sampler,
                # What a worker process reads ahead is lost.
                collate if config.training.num_workers else collate_ahead,
                seed=config.seed,
                num_workers=config.training.num_workers,
            ),
            *(
                build_eval_loader(
                    dataset,
                    collate_ahead,
                    config.training.eval_batch_size,
                    rank=processes.rank,
                    num_processes=processes.count,
                    equally_many=sharded,
                )
                for dataset in data.validation.values()
            ),
        )
    )
    trackers = (
        start_trackers(
            **config.tracking.model_dump(),
            name=f"{config.name}/{config.variant}/seed-{config.seed}",
            group=config.name,
            folder=folder.path,
            config=config.model_dump(mode="json"),
        )
        if processes.is_main
        else ()
    )
    tracking = Tracking(folder, units, trackers)
    if not processes.is_main:
        # From here on each draws (dropout) for itself.
        set_seed(config.seed + processes.rank)
    trainer = Trainer(
        accelerator=accelerator,
        processes=processes,
        model=model,
        weights=TrainedWeights(model, units),
        replicas=replicas,
        optimizer=optimizer,
        scheduler=scheduler,
        batches=loader,
        sampler=sampler,
        validation=dict(zip(data.validation, eval_loaders, strict=True)),
        task=data.task,
        loss_function=loss_function,
        freezer=freezer,
        interval=config.freezing.interval,
        settings=config.training,
        num_steps=num_steps,
        savings=savings,
        micro_batches=MicroBatches(
            None if planner is None else partial(enter_stage, planner, savings, model),
            trim_padding=config.savings.trim_padding,
            sharers=sharers,
        ),
        sharpness=None
        if gauge is None or config.sharpness.every == "never"
        else partial(measure_during_training, gauge, config.sharpness, replicas.wrap),
        sharpness_every=1 if config.sharpness.every == "never" else config.sharpness.every,
        meter=meter,
        folder=folder,
        tracker=tracking,
        console=console,
        base_fingerprint=attached.base_fingerprint,
    )
    return Parts(
        processes,
        tokenizer,
        data,
        model,
        attached.initial,
        attached.base_fingerprint,
        freezer,
        savings,
        gauge,
        meter,
        tracking,
        trainer,
    )


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


def uses_all_that_trains(model: nn.Module, batch: Batch) -> bool:
    """Whether the loss of a batch depends on every weight that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(model), torch.enable_grad():
        loss = loss_function(model, {name: tensor[:1] for name, tensor in batch.items()})
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def build_prefix(
    config: Config,
    model: nn.Module,
    units: Sequence[Unit],
    probe_batch: Batch,
    accelerator: Accelerator,
    folder: RunFolder,
    processes: Processes,
    sharers: Processes,
) -> Prefix | None:
    """The frozen prefix with its cache, as the ``savings`` section describes it; None: the model always runs whole."""
    settings = config.savings
    # With dropout it runs as part of the model, which needs no graph for it either.
    if not (settings.prefix and settings.prefix_eval) or config.freezing.policy == "none":
        return None
    cache = None
    if settings.cache:
        # Those on one machine share its files; no disk is asked to be common to several.
        node = processes.on_node(launch.node())
        first = node.broadcast(processes.rank)
        name = f"cache-{first}" if first else "cache"
        cache = ActivationCache(
            folder.path / name if settings.cache_store == "disk" else None,
            limit_bytes=None if settings.cache_limit is None else parse_bytes(settings.cache_limit),
            dtype=None if settings.cache_dtype is None else getattr(torch, settings.cache_dtype),
            processes=node,
            sharers=sharers,
        )
    return Prefix(model, units, probe_batch, loss_function, cache=cache, autocast=accelerator.autocast, sharers=sharers)


def enter_stage(planner: Planner, savings: Savings, model: Any, frozen: Sequence[bool]) -> Stage:
    """Plan the stage in which these units are frozen, and set gradient checkpointing as it says.

    Raises:
        ValueError: Not even a single row fits the budget.
    """

    def kept_bytes() -> int:
        return sum(tensor.nbytes for tensor in savings.kept if tensor.device == model.device)

    try:
        stage = planner.plan(frozen, kept_bytes=kept_bytes())
    except ValueError:
        if not savings.stop_folding():
            raise
        log.warning("what folding keeps does not fit the memory budget: adapters stay unfolded from here on")
        stage = planner.plan(frozen, kept_bytes=kept_bytes())
    set_gradient_checkpointing(model.get_base_model(), stage.gradient_checkpointing)
    return stage


def build_rule(section: FreezingSection) -> FreezingRule:
    """The rule that the ``freezing`` section describes."""
    return FreezingRule(**section.model_dump(exclude={"unit", "probe_samples", "interval", "budget_saves"}))


def count_steps(batches_per_epoch: int, settings: TrainingSection) -> int:
    """Optimizer steps in all: an epoch's last step may accumulate fewer micro-batches."""
    steps = math.ceil(batches_per_epoch / settings.gradient_accumulation) * settings.epochs
    return min(steps, settings.max_steps or steps)

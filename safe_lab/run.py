"""A run: from its configuration to :class:`Result` and the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from safe_lab import config as configuration
from safe_lab import launch
from safe_lab.build import Parts, build
from safe_lab.byte_size import format_bytes, parse_bytes
from safe_lab.config import Config
from safe_lab.config import warnings as config_warnings
from safe_lab.console import Console
from safe_lab.data.loaders import hash_rows
from safe_lab.environment import describe_environment
from safe_lab.export import export
from safe_lab.gauging import costs_figures_alone, summarize_all, take, write
from safe_lab.job import build_accelerator
from safe_lab.policy import POLICIES
from safe_lab.processes import Processes, is_connection_lost
from safe_lab.resources import TRAINING, combine, spread
from safe_lab.result import Result, summarize_freezing
from safe_lab.run_folder import RunFolder, claim_together, to_json
from safe_lab.section import ConfigError
from safe_lab.sharding import is_sharded
from safe_lab.tracking import RESOURCES

log = logging.getLogger(__name__)


def run(config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Result:
    """Train as configured and write the run folder.

    Under ``accelerate launch`` or ``torchrun`` all processes call it; process 0 writes, and all come to the same result.

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
    launch.check()
    with _as_bad_input():
        accelerator = build_accelerator(config.training)
    processes = Processes.of_job(accelerator.device)
    with claim_together(config, processes, resume=resume, overwrite=overwrite) as folder:
        with _as_bad_input():
            parts = build(config, folder, console, accelerator, processes)
        try:
            with _as_bad_input():
                resumed = resume and parts.trainer.resume()
            # Only now: a configuration that could not be built must not stand in the way of its correction.
            folder.write("config.yaml", configuration.dump(config))
            environment = describe_environment() | {"processes": processes.count}
            folder.write("environment.json", json.dumps(environment, indent=1))
            if resumed:
                parts.tracking.replay()
            else:
                folder.cut(dict.fromkeys(folder.sizes(), 0))
            return _train(config, folder, parts, console)
        finally:
            # After a failure too; the cache's files stay for a run that is resumed.
            parts.savings.close(keep_cache=True)
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
    savings = asdict(parts.savings.state)
    # Before the weights change: what is folded is folded with the last ones.
    parts.savings.close(keep_cache=config.savings.keep_cache)
    if config.training.select == "best":
        parts.trainer.restore_best()
    if parts.processes.is_main:
        with parts.meter.clock.on("checkpoint"):
            export(parts.model, folder, parts.tokenizer, config.model.path, parts.data.labels, parts.initial)
    by_process = parts.processes.gather((parts.meter.summary(), parts.meter.forecast()))
    if not config.savings.keep_cache:
        # By now all have closed theirs.
        folder.remove_caches()
    result = parts.processes.broadcast(
        _conclude(config, parts, savings, *zip(*by_process, strict=True)) if parts.processes.is_main else None
    )
    assert result is not None
    summary = asdict(result)
    folder.write("result.json", json.dumps(json.loads(to_json(summary)), indent=1, ensure_ascii=False))
    shown = ("metrics", "seconds", "parameters", "frozen_share", "frozen_depth", "steps")
    resources = {RESOURCES.format(name=name): value for name, value in result.resources.items()}
    parts.tracking.summarize({key: summary[key] for key in shown} | resources)
    idle = parts.freezer.explain_idle()
    if idle:
        log.warning(idle)
    if config.memory.budget is not None and result.resources["memory_peak_bytes"] > parse_bytes(config.memory.budget):
        log.warning(
            "memory.budget: %s was exceeded, with %s in %s; what scoring needs is not planned for",
            config.memory.budget,
            format_bytes(result.resources["memory_peak_bytes"]),
            result.resources["memory_peak_in"],
        )
    if parts.gauge is not None and config.sharpness.when == "end":
        # Only now: whatever comes of it, the run has ended well.
        result = _measure_sharpness(config, folder, parts, result)
    console.summarize(asdict(result), folder.path)
    return result


def _measure_sharpness(config: Config, folder: RunFolder, parts: Parts, result: Result) -> Result:
    """The result with figures of the trained model, as they stand in the folder; without, and a warning, if it could not be."""
    assert parts.gauge is not None
    try:
        findings = take(parts.gauge, config.sharpness, asdict(result))
        measured = replace(result, sharpness=parts.processes.broadcast(findings.figures))
        if parts.processes.is_main:
            pictures = write(findings, folder, f"{config.name}/{config.variant}/seed-{config.seed}")
            parts.tracking.summarize_sharpness(summarize_all(findings.figures), pictures)
    except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        if is_connection_lost(error) or not (isinstance(error, OSError) or costs_figures_alone(error, parts.processes)):
            raise
        log.warning(
            "the run has ended well, and its sharpness was not measured: %s; safe-lab sharpness %s does it later",
            error,
            folder.path,
        )
        return result
    return measured


def _conclude(
    config: Config,
    parts: Parts,
    savings: dict[str, int],
    summaries: Sequence[dict[str, Any]],
    forecasts: Sequence[dict[str, float | None] | None],
) -> Result:
    progress, freezer = parts.trainer.progress, parts.freezer
    best = config.training.select == "best"
    adapters, timeline = summarize_freezing(parts.trainer.folder.rows("importance.jsonl"))
    trainable = parts.trainer.num_trained
    resources = combine(summaries)
    known = [forecast for forecast in forecasts if forecast is not None]
    seconds = resources["seconds"]
    training_seconds = sum(seconds[activity] for activity in TRAINING)
    splits = {"training": parts.data.train, **parts.data.validation}
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
        unfrozen_forecast=combine(known) if known and not parts.trainer.num_unaccounted else None,
        processes={
            "count": parts.processes.count,
            "sharded": is_sharded(parts.model),
            "unaccounted": parts.trainer.num_unaccounted,
            **asdict(parts.trainer.traffic),
            **spread(summaries),
        },
        savings=savings,
        parameters={
            "total": sum(parameter.numel() for parameter in parts.model.parameters()),
            "adapters": sum(unit.num_parameters for unit in freezer.units),
            "trainable_at_start": trainable,
            "trainable_at_end": trainable
            - sum(unit.num_parameters for unit, frozen in zip(freezer.units, freezer.frozen, strict=True) if frozen),
        },
        examples={split: len(rows) for split, rows in splits.items()},
        truncated=parts.data.num_truncated,
        frozen_share=freezer.frozen_share,
        frozen_depth=freezer.frozen_depth,
        adapters=adapters,
        timeline=timeline,
        fingerprints={
            "base": parts.base_fingerprint,
            **{split: hash_rows(rows) for split, rows in splits.items()},
        },
    )


def _announce(console: Console, config: Config, parts: Parts) -> None:
    data, policy = parts.data, config.freezing.policy
    examples = ", ".join(
        [f"train {len(data.train)}", *(f"{split} {len(dataset)}" for split, dataset in data.validation.items())]
    )
    cut = sum(data.num_truncated.values())
    kind = f"{len(data.labels)} labels" if data.labels else "regression"
    truncation = f", {cut} cut to {config.data.max_length} tokens" if cut else ""
    longest = max(max(dataset["length"]) for dataset in (data.train, *data.validation.values()))
    size = f"{examples} examples of up to {longest} tokens, {kind}{truncation}"
    console.say(f"{config.name}/{config.variant}: {data.task.name} ({size})")
    if data.baselines:
        console.say("baselines: " + ", ".join(f"{name} {value:.4f}" for name, value in data.baselines.items()))
    total = sum(parameter.numel() for parameter in parts.model.parameters())
    by = f" by {config.freezing.metric}" if POLICIES[policy].uses_scores else ""
    console.say(
        f"{config.model.path}: {total / 1e6:.1f} M weights, {parts.trainer.num_trained / 1e6:.2f} M train; "
        f"{len(parts.freezer.units)} adapters, policy {policy}{by}; {parts.trainer.num_steps} steps"
    )
    device = parts.meter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = "the base weights spread over them (FSDP2)" if is_sharded(parts.model) else "a copy of the model on each"
    console.say(
        f"on {name}, " + (f"{parts.processes.count} processes, {where}" if parts.processes.count > 1 else "one process")
    )
    if parts.trainer.progress.step:
        console.say(f"resumed at step {parts.trainer.progress.step} of {parts.trainer.num_steps}")

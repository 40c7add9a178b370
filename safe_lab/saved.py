"""Finished runs, taken up again from their folders: their model as it was trained, and its sharpness."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from safe_lab import config as configuration
from safe_lab import launch
from safe_lab.adapters import Attached, find_units, load_adapter
from safe_lab.build import load_parts
from safe_lab.config import Config
from safe_lab.console import Console
from safe_lab.data import Collator, Data
from safe_lab.data.loaders import hash_rows
from safe_lab.gauging import Findings, build_gauge, check, draw, take, write
from safe_lab.job import build_accelerator
from safe_lab.processes import Processes
from safe_lab.run_folder import RunFolder, RunFolderError, hold, to_json
from safe_lab.section import ConfigError, override_all
from safe_lab.sharpness import Budget, Gauge, Space
from safe_lab.sharpness.gauge import HEAD
from safe_lab.sharpness.landscape import Slice1D, Slice2D, measure_line, measure_plane
from safe_lab.units import Unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """A finished run with its model in memory.

    Attributes:
        name: Experiment, variant and seed.
        folder: The run folder.
        config: Its configuration, with overrides of the ``sharpness`` section.
        model: As it was trained, on its device, unfolded, every adapter trainable.
        units: Its adapters.
        head: The weights of its task head.
        gauge: What measures it.
        base_fingerprint: Hash of the base weights.
    """

    name: str
    folder: RunFolder
    config: Config
    model: nn.Module
    units: Sequence[Unit]
    head: Sequence[nn.Parameter]
    gauge: Gauge
    base_fingerprint: str

    @property
    def space(self) -> Space:
        """All that was trained, adapters and head."""
        return Space.of_units(self.units, {HEAD: self.head} if self.head else {})


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a finished run.

    Args:
        path: The run folder.
        overrides: Of the ``sharpness`` section: ``samples=512``, as well as ``sharpness.samples=512``.

    Raises:
        ConfigError: It is no folder of a finished run, this version cannot read it, or an override is wrong.
    """
    for file, what in (("config.yaml", "it is no run folder"), ("result.json", "the run has not finished")):
        if not (path / file).is_file():
            raise ConfigError(f"{path}: there is no {file}: {what}")
    try:
        if not isinstance(RunFolder(path).result, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ConfigError(f"{path}: result.json is damaged ({error})") from None
    tree = configuration.load(path / "config.yaml").model_dump(mode="json")
    dotted = [text if text.startswith("sharpness.") else f"sharpness.{text}" for text in overrides]
    for text in dotted:
        if text.startswith(("sharpness.when=", "sharpness.every=")):
            log.warning("%s has no effect here: it is for safe-lab train", text)
    faults = override_all(tree, dotted)
    if faults:
        raise ConfigError("\n".join(faults))
    return configuration.build(tree)


def load_run(path: Path, overrides: Sequence[str], device: torch.device, processes: Processes) -> SavedRun:
    """Build a finished run's model and load what it has trained.

    Raises:
        ConfigError: It is no folder of a finished run, or its model, its data or its adapter is not there as it was.
    """
    config = read_config(path, overrides)
    folder = RunFolder(path, writes=processes.is_main)
    result = folder.result or {}
    # As at the start of the run: what attaching draws comes out the same.
    set_seed(config.seed)
    try:
        with launch.without_fsdp():
            _, attached, tokenizer, data = load_parts(config)
        load_adapter(attached.model, folder.adapter, initial=attached.initial)
        if list(data.labels) != result.get("labels"):
            raise ValueError(f"the data has the labels {list(data.labels)}, and the run had {result.get('labels')}")
        _check_unchanged(result.get("fingerprints", {}), attached, data)
        model = attached.model.to(device).eval()
        batch = Collator(tokenizer)([data.train[0]])
        units = find_units(
            model, lambda: model(**{name: tensor.to(device) for name, tensor in batch.items()}), config.freezing.unit
        )
        in_units = {id(parameter) for unit in units for parameter in unit.parameters.values()}
        head = [p for p in model.parameters() if p.requires_grad and id(p) not in in_units]
        gauge = build_gauge(
            config.sharpness, model, units, data, tokenizer, device=device, head=head, processes=processes
        )
        check(gauge, config.sharpness)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    name = f"{config.name}/{config.variant}/seed-{config.seed}"
    return SavedRun(name, folder, config, model, units, head, gauge, attached.base_fingerprint)


def measure_runs(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    between: bool = False,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the sharpness of finished runs, one after the other, and write it into their folders.

    Under ``accelerate launch`` or ``torchrun`` all processes call it, share the examples, and come to the same.

    Args:
        paths: Run folders.
        overrides: Of the ``sharpness`` section of each.
        between: Also take the losses on the line between two runs, or on the plane through three.
        output: Where pictures of several runs together go; None: the folder ``sharpness`` in that which they have in common.
        console: What the person sees; None: nothing.

    Returns:
        ``sharpness`` of each run's result.json, by the run's name (or, of a second one of that name, its folder); what was
        found between them under that word.

    Raises:
        ConfigError: A folder that cannot be used, or runs that cannot be compared.
        FloatingPointError: A loss or a product is not finite.
    """
    console = console or Console(quiet=True)
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    if between and len(paths) not in (2, 3):
        raise ConfigError(f"there is a line between two runs and a plane through three, got {len(paths)}")
    # All of them before the first is measured.
    configs = [read_config(path, overrides) for path in paths]
    launch.check()
    try:
        accelerator = build_accelerator(configs[0].training)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    processes = Processes.of_job(accelerator.device)
    together = output or _folder_of(paths) / "sharpness"
    found: dict[str, Findings] = {}
    positions: dict[str, Tensor] = {}
    # Kept, with its model, for what lies between the runs.
    first: SavedRun | None = None
    with ExitStack() as held:
        refusal = None
        if processes.is_main:
            try:
                for path in paths:
                    held.enter_context(hold(path, "a live run is writing to this folder; wait for it"))
            except RunFolderError as error:
                refusal = error
        refusal = processes.broadcast(refusal)
        if refusal is not None:
            raise refusal
        for path in paths:
            run = load_run(path, overrides, accelerator.device, processes)
            if first is not None and between:
                _check_alike(first, run)
            console.say(f"{run.name}: measuring")
            try:
                findings = take(run.gauge, run.config.sharpness)
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error
            except FloatingPointError as error:
                raise FloatingPointError(f"{path}: {error}") from error
            if processes.is_main:
                pictures = write(findings, run.folder, run.name)
                console.say(f"{run.name}: written to {path / 'result.json'}" + _list(pictures))
            name = run.name if run.name not in found else str(path)
            found[name] = findings
            positions[name] = run.space.position().cpu()
            first = first or run
        figures = {name: findings.figures for name, findings in found.items()}
        if between and first is not None:
            if len({findings.figures["fingerprint"] for findings in found.values()}) > 1:
                log.warning("the runs have trained on other rows: losses between them are over those of %s", first.name)
            figures["between"] = _measure_between(first, positions, together, processes, console)
    if len(found) > 1 and processes.is_main:
        try:
            console.say(f"together: {together}" + _list(draw(found, together)))
        except ValueError as error:
            log.warning("no pictures were drawn: %s", error)
    return figures


def _measure_between(
    run: SavedRun, positions: Mapping[str, Tensor], place: Path, processes: Processes, console: Console
) -> dict[str, Any]:
    from safe_lab.sharpness import plots

    section = run.config.sharpness
    with run.gauge.surfaces(run.space) as surfaces:
        first = next(iter(surfaces.values()))
        budget = Budget(first.cost, seconds=section.budget_seconds, processes=processes)
        runs = {name: position_D.to(first.space.device) for name, position_D in positions.items()}
        found: Slice1D | Slice2D
        try:
            if len(runs) == 2:
                found = measure_line(surfaces, runs, budget=budget)
            else:
                found = measure_plane(surfaces, runs, num_points=section.landscape_points, budget=budget)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if processes.is_main:
        place.mkdir(parents=True, exist_ok=True)
        RunFolder(place).write("between.json", to_json(asdict(found)))
        try:
            pictures = (
                plots.draw_lines([found], place / "line", title="between runs")
                if isinstance(found, Slice1D)
                else plots.draw_plane(found, place / "plane", title="between runs")
            )
            console.say(f"between the runs: {place}" + _list(pictures))
        except ValueError as error:
            log.warning("no pictures were drawn: %s", error)
    return asdict(found)


def _check_unchanged(before: Mapping[str, str], attached: Attached, data: Data) -> None:
    """Hold base weights and rows against those of the training; versions before 0.1.0 did not write down which these were."""
    # Where attaching has changed the base, it has rounded as this machine does; the adapter's own check is for that.
    if attached.initial is None and before.get("base", attached.base_fingerprint) != attached.base_fingerprint:
        raise ValueError("the weights behind model.path are not those that the run was trained on")
    for split, rows in {"training": data.train, **data.validation}.items():
        if split in before and before[split] != hash_rows(rows):
            log.warning("the %s split does not hold what it held when the run was trained", split)


def _check_alike(one: SavedRun, other: SavedRun) -> None:
    """Whether two runs can stand in one model."""
    if one.base_fingerprint != other.base_fingerprint:
        raise ConfigError(f"{one.name} and {other.name} have other base weights: there is no line between them")
    if one.config.data != other.config.data or one.config.adapter != other.config.adapter:
        raise ConfigError(f"{one.name} and {other.name} have other data or adapters: there is no line between them")


def _folder_of(paths: Sequence[Path]) -> Path:
    """The folder that all have in common; where that is no more than the root, the one this runs in."""
    common = Path(os.path.commonpath(paths))
    return common if common != Path(common.anchor) else Path.cwd()


def _list(files: Sequence[Path]) -> str:
    return "" if not files else ", pictures " + ", ".join(file.name for file in files)

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
        check(gauge, config.sharpness, training=False)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except FloatingPointError as error:
        raise FloatingPointError(f"{path}: {error}") from error
    name = f"{config.name}/{config.variant}/seed-{config.seed}"
    return SavedRun(name, folder, config, model, units, head, gauge, attached.base_fingerprint)


def measure_runs(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the sharpness of finished runs, one after the other, and write it into their folders.

    Under ``accelerate launch`` or ``torchrun`` all processes call it, share the examples, and come to the same.

    Args:
        paths: Run folders.
        overrides: Of the ``sharpness`` section of each.
        output: Where pictures of several runs together go; None: the folder ``sharpness`` in that which they have in common.
        console: What the person sees; None: nothing.

    Returns:
        ``sharpness`` of each run's result.json, by the run's name (or, of a second one of that name, its folder).

    Raises:
        ConfigError: A folder that cannot be used.
        FloatingPointError: A loss or a product is not finite.
    """
    console = console or Console(quiet=True)
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    device, processes = _begin([read_config(path, overrides) for path in paths], overrides)
    found: dict[str, Findings] = {}
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
            run = load_run(path, overrides, device, processes)
            console.say(f"{run.name}: measuring")
            try:
                findings = take(run.gauge, run.config.sharpness, run.folder.result or {})
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error
            except FloatingPointError as error:
                raise FloatingPointError(f"{path}: {error}") from error
            if processes.is_main:
                pictures = write(findings, run.folder, run.name)
                console.say(f"{run.name}: written to {path / 'result.json'}" + _list(pictures))
            found[run.name if run.name not in found else str(path)] = findings
    if len(found) > 1 and processes.is_main:
        together = output or _folder_of(paths) / "sharpness"
        try:
            console.say(f"together: {together}" + _list(draw(found, together)))
        except ValueError as error:
            log.warning("no pictures were drawn: %s", error)
    return {name: findings.figures for name, findings in found.items()}


def measure_between(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Take the losses on the line between two finished runs, or on the plane through three, and draw them.

    Adapters and head move together, and the losses are over the samples of the first run. Nothing in the run folders changes.

    Args:
        paths: Run folders.
        overrides: Of the ``sharpness`` section.
        output: Where data and pictures go; None: the folder ``sharpness`` in that which the runs have in common.
        console: What the person sees; None: nothing.

    Returns:
        What between.json holds: a :class:`~safe_lab.sharpness.landscape.Slice1D` or ``Slice2D`` as plain values.

    Raises:
        ConfigError: A folder that cannot be used, or runs that cannot be compared.
        FloatingPointError: The loss of a run is not finite.
    """
    console = console or Console(quiet=True)
    paths = [path.resolve() for path in paths]
    if len(set(paths)) < len(paths):
        raise ConfigError("a run was named twice")
    if len(paths) not in (2, 3):
        raise ConfigError(f"there is a line between two runs and a plane through three, got {len(paths)}")
    configs = [read_config(path, overrides) for path in paths]
    device, processes = _begin(configs, overrides)
    for path, config in zip(paths, configs, strict=True):
        for section in ("data", "adapter", "model"):
            if getattr(config, section) != getattr(configs[0], section):
                raise ConfigError(
                    f"{path}: has another {section} section than {paths[0]}: there is no line between them"
                )
    positions: dict[str, Tensor] = {}
    first: SavedRun | None = None
    for path in paths:
        run = load_run(path, overrides, device, processes)
        positions[run.name if run.name not in positions else str(path)] = run.space.position()
        if first is None:
            first = run
        elif run.base_fingerprint != first.base_fingerprint:
            raise ConfigError(f"{path}: has other base weights than {paths[0]}: there is no line between them")
        elif run.gauge.fingerprint != first.gauge.fingerprint:
            log.warning(
                "%s would be measured on other rows: losses between the runs are over those of %s", run.name, first.name
            )
    assert first is not None
    console.say(f"{', '.join(positions)}: measuring between them")
    found = _take_between(first, positions, processes)
    figures = asdict(found) | {"sample_of": first.name, "fingerprint": first.gauge.fingerprint}
    if processes.is_main:
        _draw_between(found, figures, output or _folder_of(paths) / "sharpness", console)
    return figures


def _begin(configs: Sequence[Config], overrides: Sequence[str]) -> tuple[torch.device, Processes]:
    """Where, and with whom, runs are measured whose configurations have all been read."""
    for text in overrides:
        if text.removeprefix("sharpness.").split("=")[0] in ("when", "every", "every_measures"):
            log.warning("%s has no effect here: it is for safe-lab train", text)
    launch.check()
    try:
        accelerator = build_accelerator(configs[0].training)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return accelerator.device, Processes.of_job(accelerator.device)


def _take_between(run: SavedRun, positions: Mapping[str, Tensor], processes: Processes) -> Slice1D | Slice2D:
    section = run.config.sharpness
    with run.gauge.surfaces(run.space) as surfaces:
        budget = Budget(next(iter(surfaces.values())).cost, seconds=section.budget_seconds, processes=processes)
        try:
            if len(positions) == 2:
                return measure_line(surfaces, positions, budget=budget)
            return measure_plane(surfaces, positions, num_points=section.landscape_points, budget=budget)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _draw_between(found: Slice1D | Slice2D, figures: Mapping[str, Any], place: Path, console: Console) -> None:
    from safe_lab.sharpness import plots

    place.mkdir(parents=True, exist_ok=True)
    RunFolder(place).write("between.json", to_json(figures))
    lines = [found] if isinstance(found, Slice1D) else found.sides
    for line in lines:
        heights = (f"{sample} {plots.format_number(height)}" for sample, height in line.barriers.items())
        console.say(f"{line.name}: barrier {', '.join(heights)}")
    if not all(line.complete for line in lines) or (isinstance(found, Slice2D) and found.stride != 1):
        log.warning("sharpness.budget_seconds ended before all losses between the runs were taken")
    try:
        pictures = (
            plots.draw_lines([found], place / "line", title="between runs")
            if isinstance(found, Slice1D)
            else plots.draw_plane(found, place / "plane", title="between runs")
        )
        console.say(f"between the runs: {place}" + _list(pictures))
    except ValueError as error:
        log.warning("no pictures were drawn: %s", error)


def _check_unchanged(before: Mapping[str, str], attached: Attached, data: Data) -> None:
    """Hold base weights and rows against those of the training; versions before 0.1.0 did not write down which these were."""
    # Where attaching has changed the base, it has rounded as this machine does; the adapter's own check is for that.
    if attached.initial is None and before.get("base", attached.base_fingerprint) != attached.base_fingerprint:
        raise ValueError("the weights behind model.path are not those that the run was trained on")
    for split, rows in {"training": data.train, **data.validation}.items():
        if split in before and before[split] != hash_rows(rows):
            log.warning("the %s split does not hold what it held when the run was trained", split)


def _folder_of(paths: Sequence[Path]) -> Path:
    """The folder that all have in common; where that is no more than the root, the one this runs in."""
    common = Path(os.path.commonpath(paths))
    return common if common != Path(common.anchor) else Path.cwd()


def _list(files: Sequence[Path]) -> str:
    return "" if not files else ", pictures " + ", ".join(file.name for file in files)

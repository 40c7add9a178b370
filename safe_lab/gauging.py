"""Sharpness of a run: from the ``sharpness`` section to what measures, and from what it finds to the run folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from safe_lab.adapters import affine_layers
from safe_lab.config import SharpnessSection
from safe_lab.data import Collator, Data
from safe_lab.data.loaders import hash_rows
from safe_lab.memory import is_out_of_memory
from safe_lab.model import loss_function
from safe_lab.processes import ALONE, Processes
from safe_lab.run_folder import RunFolder, to_json
from safe_lab.sharpness import LANDSCAPES, Budget, Gauge, Plan, Sample, landscape, summarize
from safe_lab.sharpness.gauge import TRAINING
from safe_lab.sharpness.lanczos import Eigenpairs, density
from safe_lab.sharpness.landscape import Slice1D, Slice2D
from safe_lab.sharpness.plots import Spectrum, check_installed
from safe_lab.sharpness.sample import batch_by_tokens, draw_rows
from safe_lab.units import Unit
from safe_lab.whole_file import whole_file

log = logging.getLogger(__name__)

VALIDATION = "validation"


def build_gauge(
    section: SharpnessSection,
    model: nn.Module,
    units: Sequence[Unit],
    data: Data,
    tokenizer: Any,
    *,
    device: torch.device,
    head: Sequence[nn.Parameter],
    processes: Processes = ALONE,
    whole: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Gauge:
    """What measures a model as the section says.

    Args:
        section: The ``sharpness`` section.
        model: The model with adapters.
        units: Its adapters.
        data: From which the samples are drawn.
        tokenizer: The model's.
        device: On which the model is.
        head: The weights of the task head.
        processes: Who computes it together.
        whole: See :class:`~safe_lab.sharpness.Gauge`.

    Raises:
        ValueError: There is no such unit, or what draws landscapes is not installed.
    """
    if section.landscape:
        # Before hours of training, and not after them.
        check_installed()
    collate = Collator(tokenizer)

    def draw(dataset: Any, num_samples: int) -> Sample:
        rows = draw_rows(dataset, num_samples, section.seed)
        batches = [
            {name: tensor.to(device) for name, tensor in batch.items()}
            # Each process takes its share of each batch.
            for batch in batch_by_tokens(rows, collate, section.batch_tokens * processes.count)
        ]
        return Sample(batches, len(rows), hash_rows(rows))

    samples = {TRAINING: draw(data.train, section.samples)}
    if section.validation_samples:
        samples[VALIDATION] = draw(next(iter(data.validation.values())), section.validation_samples)
    return Gauge(
        model,
        units,
        samples,
        loss_function,
        kind=data.task.kind,
        layers=affine_layers(model),
        head=head if section.head else (),
        only=section.units,
        dtype=getattr(torch, section.dtype),
        whole=whole,
        processes=processes,
    )


def plans_at_end(section: SharpnessSection) -> dict[str, Plan]:
    """What is measured of a trained model, by name of the sample."""
    plans = {TRAINING: _plan(section, section.measures)}
    if section.validation_samples:
        plans[VALIDATION] = _plan(section, section.validation_measures)
    return plans


def check(gauge: Gauge, section: SharpnessSection, *, training: bool) -> None:
    """Try what will be measured on one example.

    Args:
        gauge: Of the model.
        section: The ``sharpness`` section.
        training: Whether that is in training and, where the section says so, at its end; else now, of a trained model.

    Raises:
        ValueError: The model cannot be differentiated twice.
        FloatingPointError: A loss or a product is not finite.
    """
    measures = list(section.every_measures) if training and section.every != "never" else []
    if not training or section.when == "end":
        measures += [name for plan in plans_at_end(section).values() for name in plan.measures]
    gauge.check(measures)


def costs_figures_alone(error: Exception, processes: Processes) -> bool:
    """Whether what went wrong with a measurement is no reason to end a run.

    It is one if memory has run out in one process of several, since the others wait for it.
    """
    return isinstance(error, ValueError | FloatingPointError) or (is_out_of_memory(error) and processes.count == 1)


def measure_during_training(gauge: Gauge, section: SharpnessSection, wrap_anew: Callable[[], None]) -> dict[str, float]:
    """Measure a model in training.

    Args:
        gauge: Of the model.
        section: The ``sharpness`` section.
        wrap_anew: What makes several processes' gradients come together anew.

    Returns:
        Flat numbers; none where it could not be measured, of which it warns.
    """
    try:
        return summarize(gauge.take({TRAINING: _plan(section, section.every_measures)}).figures)
    except (ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
        if not costs_figures_alone(error, gauge.processes):
            raise
        log.warning("the sharpness was not measured: %s; training goes on", error)
        return {}
    finally:
        if gauge.widens:
            wrap_anew()


def summarize_all(figures: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of all samples, under flat names; those of the validation sample begin with its name."""
    return summarize(figures) | summarize(figures.get(VALIDATION, {}), f"{VALIDATION}_")


def _plan(section: SharpnessSection, measures: Sequence[str]) -> Plan:
    return Plan(
        measures=measures,
        estimator=section.estimator,
        tolerance=section.tolerance,
        num_eigenvalues=section.eigenvalues,
        eigenvalue_tolerance=section.eigenvalue_tolerance,
        num_starts=section.spectrum_starts,
        num_steps=section.spectrum_steps,
        radius=section.radius,
        adaptive_radius=section.adaptive_radius,
        deviation=section.deviation,
        adaptive_deviation=section.adaptive_deviation,
        num_directions=section.directions,
        budget_seconds=section.budget_seconds,
        budget_products=section.budget_products,
        seed=section.seed,
    )


@dataclass(frozen=True)
class Findings:
    """What was measured of one trained model.

    Attributes:
        figures: Plain values: ``sharpness`` of result.json.
        slices: Of its landscape, by kind.
        eigenpairs: By sample.
    """

    figures: dict[str, Any]
    slices: dict[str, list[Slice1D] | Slice2D]
    eigenpairs: dict[str, Eigenpairs]


def take(gauge: Gauge, section: SharpnessSection, result: Mapping[str, Any]) -> Findings:
    """Measure a trained model as the section says: figures, then slices.

    Args:
        gauge: Of the model.
        section: The ``sharpness`` section.
        result: Of the run, result.json.

    Raises:
        ValueError: The model cannot be differentiated twice.
        FloatingPointError: A loss or a product is not finite.
    """
    step = result.get("selected_step")
    frozen_after = [unit for unit in result.get("adapters", ()) if (unit["frozen_at_step"] or 0) >= (step or math.inf)]
    if frozen_after:
        log.warning(
            "what is measured are the weights of step %d of %d, the best by evaluation, on which %d units that froze then or "
            "later had no effect; training.select: last keeps those at the end",
            *(step, result["steps"], len(frozen_after)),
        )
    reading = gauge.take(plans_at_end(section))
    figures = {"step": step, **reading.figures, "settings": section.model_dump(mode="json")}
    slices: dict[str, list[Slice1D] | Slice2D] = {}
    if section.landscape:
        began = time.perf_counter()
        slices, losses = _take_slices(gauge, section, reading.eigenpairs.get(TRAINING))
        figures["landscape_cost"] = {"seconds": time.perf_counter() - began, "losses": losses}
    return Findings(figures, slices, reading.eigenpairs)


def write(findings: Findings, folder: RunFolder, name: str) -> list[Path]:
    """Write figures into result.json, then data and pictures into the folder ``sharpness``, each file whole or not at all.

    It warns of what of the latter could not be written or drawn, and of figures of an earlier measurement that are replaced.

    Args:
        findings: Of this run.
        folder: The run's, held by this process, with a result.json.
        name: Of the run, for titles.

    Returns:
        The pictures, PNG.

    Raises:
        OSError: result.json could not be written.
    """
    result = folder.result
    assert result is not None
    lost = sorted((result.get("sharpness") or {}).keys() - findings.figures.keys() - {"landscape_cost"})
    if lost:
        log.warning("%s: measured anew without what an earlier measurement had: %s", folder.path, ", ".join(lost))
    folder.write(
        "result.json",
        json.dumps(json.loads(to_json(result | {"sharpness": findings.figures})), indent=1, ensure_ascii=False),
    )
    place = folder.path / "sharpness"
    try:
        place.mkdir(exist_ok=True)
        # What an earlier measurement has left would not belong to these figures.
        for path in place.iterdir():
            path.unlink()
        if findings.eigenpairs:
            vectors = {sample: pairs.vectors.contiguous().cpu() for sample, pairs in findings.eigenpairs.items()}
            with whole_file(place / "eigenvectors.safetensors") as stream:
                stream.write(save(vectors))
        if findings.slices:
            slices = {kind: _plain(slices) for kind, slices in findings.slices.items()}
            RunFolder(place).write("landscape.json", to_json(slices))
        return draw({name: findings}, place)
    except (ValueError, OSError) as error:
        log.warning("the figures are in result.json, and not all of %s was written: %s", place, error)
        return []


def draw(runs: Mapping[str, Findings], place: Path) -> list[Path]:
    """Draw spectra and slices of one run, or of several with equal scales.

    Args:
        runs: What was found, by the run's name.
        place: The folder to draw into.

    Returns:
        The pictures, PNG.

    Raises:
        ValueError: A library that draws is not installed.
    """
    from safe_lab.sharpness import plots

    drawn: list[Path] = []
    spectra = read_spectra({name: found.figures for name, found in runs.items()})
    if spectra:
        drawn += plots.draw_spectra(spectra, place / "spectrum", title="spectrum of the Hessian")
    for kind, what in LANDSCAPES.items():
        slices = {name: found.slices[kind] for name, found in runs.items() if kind in found.slices}
        if not slices:
            continue
        heading = f"loss {what}"
        lines = {name: found for name, found in slices.items() if isinstance(found, list)}
        planes = {name: found for name, found in slices.items() if isinstance(found, Slice2D)}
        if lines:
            drawn += plots.draw_slices_1d(lines, place / kind, title=heading)
        if planes:
            drawn += plots.draw_slices_2d(planes, place / kind, title=heading)
    return [path for path in drawn if path.suffix == ".png"]


def read_spectra(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Spectrum]:
    """Spectral densities of runs, smoothed alike, as a peak's height depends on that.

    Args:
        figures: ``sharpness`` of result.json, by the run's name; those without a spectrum are left out.

    Raises:
        KeyError: One is damaged.
        TypeError: Likewise.
    """
    spans = {
        name: found["spectrum"]["largest"] - found["spectrum"]["smallest"]
        for name, found in figures.items()
        if "spectrum" in found
    }
    widest = max(spans.values(), default=0.0)
    spectra = {}
    for name, span in spans.items():
        found = figures[name]["spectrum"]
        nodes = list(zip(found["nodes"], found["weights"], strict=True))
        grid, values = density(nodes, width=0.01 * widest / (span or 1.0))
        spectra[name] = Spectrum(grid, values, figures[name].get("top_eigenvalues", ()))
    return spectra


def read_slices(folder: Path) -> dict[str, list[Slice1D] | Slice2D]:
    """Slices of the loss that were measured of a run, by kind; empty if none were.

    Args:
        folder: The run's.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    path = folder / "sharpness" / "landscape.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {
            kind: [Slice1D.from_json(one) for one in found] if isinstance(found, list) else Slice2D.from_json(found)
            for kind, found in tree.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _take_slices(
    gauge: Gauge, section: SharpnessSection, eigenpairs: Eigenpairs | None
) -> tuple[dict[str, list[Slice1D] | Slice2D], int]:
    """Slices by kind, and how many losses over a sample they took."""
    half = section.landscape_points // 2
    spans = {"random": section.landscape_span, "eigen": section.eigen_span}
    found: dict[str, list[Slice1D] | Slice2D] = {}
    with gauge.surfaces() as surfaces:
        space = surfaces[TRAINING].space
        budget = Budget(surfaces[TRAINING].cost, seconds=section.budget_seconds, processes=gauge.processes)
        origin_D = space.position()
        generator = torch.Generator().manual_seed(section.seed)
        directions = {"random": [landscape.random_direction(space, generator) for _ in range(2)]}
        if eigenpairs is not None and len(eigenpairs.values) > 1:
            directions["eigen"] = [landscape.eigenvector_direction(eigenpairs.vectors[:, i], space) for i in range(2)]
        for kind in section.landscape:
            along, _, shape = kind.partition("_")
            if along not in directions:
                log.warning("sharpness.landscape: %s was left out, as there are no two eigenvectors", kind)
                continue
            positions = [spans[along] * i / half for i in range(-half, half + 1)]
            if shape == "line":
                found[kind] = [
                    landscape.measure_slice_1d(
                        surfaces, origin_D, direction, name=f"{along} {i + 1}", positions=positions, budget=budget
                    )
                    for i, direction in enumerate(directions[along][: 1 if along == "random" else 2])
                ]
            else:
                # Points by the hundred: over one sample.
                found[kind] = landscape.measure_slice_2d(
                    {TRAINING: surfaces[TRAINING]},
                    origin_D,
                    (directions[along][0], directions[along][1]),
                    name=along,
                    x=positions,
                    y=positions,
                    budget=budget,
                )
        return found, sum(surface.cost.losses for surface in surfaces.values())


def _plain(slices: list[Slice1D] | Slice2D) -> Any:
    return [asdict(one) for one in slices] if isinstance(slices, list) else asdict(slices)

"""Train every variant of a bench in fresh processes, in turn, and read what they answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_lab import config as configuration
from safe_lab.bench.config import Bench
from safe_lab.child import last_lines, num_threads, started, why_ended
from safe_lab.config import Config
from safe_lab.run_folder import RunFolder, to_json
from safe_lab.section import ConfigError

FIGURES = (
    "metric",
    "wall_seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_bytes",
    "mean_bytes",
    "mean_activation_bytes",
    "peak_rss_bytes",
    "device_peak_bytes",
    "flops",
    "joules",
    "train_loss",
)
_ALWAYS_MEASURED = ("metric", "wall_seconds", "cpu_seconds", "flops", "peak_bytes")


@dataclass(frozen=True)
class Measurement:
    """One training of one variant.

    Attributes:
        variant: Its name.
        repetition: From 0.
        figures: Value by name of :data:`FIGURES`; None where there is no such meter. Empty if the training failed.
        losses: (step, mean training loss since the row before).
        resources: All that was measured, as ``resources`` of result.json.
        environment: Versions and hardware.
        failure: Why there are no figures, and the last lines of the log; empty if there are.
    """

    variant: str
    repetition: int
    figures: Mapping[str, float | None]
    losses: tuple[tuple[int, float], ...]
    resources: Mapping[str, Any]
    environment: Mapping[str, Any]
    failure: str = ""


Turn = tuple[int, str]


def find_measured(bench: Bench, folder: Path) -> dict[Turn, Measurement]:
    """What of a bench has been measured already, by repetition and variant.

    What failed, was cut off or altered is not among it, and is to be trained again.

    Raises:
        ConfigError: Something was measured that is not what the bench asks for.
    """
    measured: dict[Turn, Measurement] = {}
    faults = []
    for repetition, variant in _turns(bench):
        read = _read_measurement(folder / "processes", f"{repetition}-{variant}")
        if read is None:
            continue
        measured[repetition, variant], trainer, config = read
        wanted = bench.settings.variants[variant].trainer
        differences = [f"trainer: {trainer} there, {wanted} here"] if trainer != wanted else []
        differences += bench.differences(variant, config, bench.config_of(variant, repetition, folder))
        if differences:
            faults.append(f"{variant}, repetition {repetition}: {'; '.join(differences)}")
    if faults:
        raise ConfigError(
            f"{folder}: holds measurements of other trainings; give such a variant another name, or --output another folder\n"
            + "\n".join(faults)
        )
    return measured


def measure(
    bench: Bench, folder: Path, show: Callable[[str, bool], None], measured: Mapping[Turn, Measurement] | None = None
) -> Iterator[Measurement]:
    """Train every variant as often as the bench says: A B C A B C ...

    Each training writes ``runs/<variant>/seed-<n>/``; its configuration, log and figures go to
    ``processes/<repetition>-<variant>.yaml``, ``.log`` and ``.json``, the figures as soon as it has ended. What is left of an
    unfinished one is removed.

    Args:
        bench: What to train.
        folder: Where all of it goes; made if need be.
        show: Called with a line about the running process, again and again, and once more, with True, when it has ended.
        measured: From :func:`find_measured`; not trained again.

    Yields:
        A new measurement as soon as it is made; after a first repetition in which all failed, no more. Closing the iterator, or
        Ctrl-C, ends the running process.
    """
    files = RunFolder(folder / "processes")
    files.path.mkdir(parents=True, exist_ok=True)
    turns, measured = _turns(bench), measured or {}
    failed = 0
    for number, (repetition, variant) in enumerate(turns, start=1):
        stem = f"{repetition}-{variant}"
        title = f"{number}/{len(turns)} {variant}, repetition {repetition}"
        if (repetition, variant) in measured:
            show(f"{title}: {_outcome(measured[repetition, variant])}, measured before", True)
            continue
        config = bench.config_of(variant, repetition, folder)
        (files.path / f"{stem}.json").unlink(missing_ok=True)
        if (files.path / f"{stem}.yaml").exists():
            shutil.rmtree(config.run_folder, ignore_errors=True)
        files.write(f"{stem}.yaml", configuration.dump(config))
        began = time.perf_counter()
        with _started(bench, variant, files.path, stem) as process:
            while process.poll() is None:
                show(
                    f"{title}: {time.perf_counter() - began:.0f} s  {last_lines(files.path / f'{stem}.log', 1)}", False
                )
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        answer_path = files.path / f".answer-{stem}.json"
        if process.returncode == 0:
            measurement = _read_answer(variant, repetition, json.loads(answer_path.read_text()))
            answer_path.unlink()
            outcome = _outcome(measurement)
        else:
            failure = why_ended(process.returncode, files.path / f"{stem}.log")
            measurement = Measurement(variant, repetition, {}, (), {}, {}, failure)
            outcome = "failed, " + " ".join(failure.splitlines()[:2])
        failed += bool(measurement.failure)
        files.write(f"{stem}.json", to_json({"trainer": bench.settings.variants[variant].trainer, **vars(measurement)}))
        show(f"{title}: {outcome}", True)
        yield measurement
        if failed == number == len(bench.configs) < len(turns):
            show("every variant failed: there is no second repetition", True)
            return


def _outcome(measurement: Measurement) -> str:
    return f"metric {measurement.figures['metric']:.4f}, {measurement.figures['wall_seconds']:.1f} s"


def _turns(bench: Bench) -> list[Turn]:
    return [(repetition, variant) for repetition in range(bench.settings.repetitions) for variant in bench.configs]


def _read_measurement(folder: Path, stem: str) -> tuple[Measurement, str, Config] | None:
    """A training that has ended well: its measurement, trainer and configuration; None if it is not whole."""
    try:
        answer = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        trainer, losses = answer.pop("trainer"), tuple((int(step), float(loss)) for step, loss in answer.pop("losses"))
        measurement = Measurement(**answer, losses=losses)
        whole = not measurement.failure and _has_figures(measurement.figures)
        return (measurement, trainer, configuration.load(folder / f"{stem}.yaml")) if whole else None
    except (ConfigError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _has_figures(figures: Mapping[str, object]) -> bool:
    """Whether all are there as they were written: numbers, and null at most where there may be no such meter."""
    unmeasured = {figure for figure, value in figures.items() if value is None}
    numbers = all(isinstance(value, int | float) for value in figures.values() if value is not None)
    return tuple(figures) == FIGURES and numbers and unmeasured.isdisjoint(_ALWAYS_MEASURED)


@contextmanager
def _started(bench: Bench, variant: str, folder: Path, stem: str) -> Iterator[subprocess.Popen[bytes]]:
    settings = bench.settings
    environment = {} if settings.threads is None else num_threads(settings.threads)
    if settings.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        # One: transformers.Trainer spreads a batch over all the GPUs it sees.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    arguments = [
        *("safe_lab.bench.worker", settings.variants[variant].trainer, settings.device or "any"),
        *(str(folder / f"{stem}.yaml"), str(folder / f".answer-{stem}.json")),
    ]
    with started(arguments, folder / f"{stem}.log", environment) as process:
        yield process


def _read_answer(variant: str, repetition: int, answer: Mapping[str, Any]) -> Measurement:
    resources = answer["resources"]
    # Loading model and data is left out: what is compared is training, with its evaluations, scorings and checkpoints.
    wall_seconds = resources["wall_seconds"] - resources["seconds"]["setup"]
    figures = {
        "metric": answer["metric"],
        "wall_seconds": wall_seconds,
        "cpu_seconds": resources["cpu_seconds"],
        "tokens_per_second": answer["tokens"] / wall_seconds,
        "peak_bytes": resources["memory_peak_bytes"],
        "mean_bytes": resources["memory_mean_bytes"],
        "mean_activation_bytes": resources["memory_mean_by_kind"]["activations"],
        "peak_rss_bytes": resources["host_memory_peak_bytes"],
        "device_peak_bytes": resources["device_allocated_peak_bytes"],
        "flops": resources["flops"],
        "joules": resources["joules"],
        "train_loss": answer["losses"][-1][1],
    }
    assert tuple(figures) == FIGURES
    losses = tuple((step, loss) for step, loss in answer["losses"])
    return Measurement(variant, repetition, figures, losses, resources, answer["environment"])

"""The folder of a bench: what was asked for, every training, and what they come to, up to date at every moment.

``bench.yaml``, ``environment.json``, ``result.json`` (a :class:`~safe_lab.bench.compare.Comparison`), ``processes/``
(configuration, log and figures of each training), ``runs/`` (their run folders).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safe_lab import run_folder, yaml_core
from safe_lab.bench.compare import Comparison, compare
from safe_lab.bench.config import Bench, BenchSection
from safe_lab.bench.processes import find_measured, measure
from safe_lab.bench.show import to_json
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError, check, read_tree


@contextmanager
def claim_folder(bench: Bench, output: str | None, *, resume: bool = False) -> Iterator[Path]:
    """Hold the folder of a bench: ``output``, or ``<output_dir>/bench-<name>/<time>``.

    Args:
        bench: What to train.
        output: The folder; None: a new one.
        resume: Go on with the bench that it holds.

    Raises:
        ConfigError: It holds a bench already, and ``resume`` does not say so; it holds none to go on with, or one of other
            threads or another device; another process writes to it, or nobody can.
    """
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    name = f"bench-{bench.settings.name}"
    folder = Path(output or Path(bench.configs[bench.baseline].output_dir) / name / started).expanduser().absolute()
    held = folder / "bench.yaml"
    if resume and not held.exists():
        raise ConfigError(f"{folder}: holds no bench to go on with; without --resume it begins")
    with run_folder.hold(folder, "a live bench is writing to this folder; wait for it, or give --output another"):
        if held.exists() and not resume:
            raise ConfigError(
                f"{folder}: holds a bench already; --resume goes on with it, or give --output another folder"
            )
        if resume:
            _check_comparable(bench.settings, check(BenchSection, read_tree(held)), folder)
        yield folder


def _check_comparable(new: BenchSection, old: BenchSection, folder: Path) -> None:
    differences = [
        f"{key}: {getattr(old, key)} there, {getattr(new, key)} here"
        for key in ("threads", "device")
        if getattr(old, key) != getattr(new, key)
    ]
    if differences:
        raise ConfigError(f"{folder}: its seconds are not comparable with these ({'; '.join(differences)})")


def run(bench: Bench, folder: Path, *, command: Sequence[str], show: Callable[[str, bool], None]) -> Comparison:
    """Train all variants in turn and compare them; Ctrl-C ends the running process, and what there is is compared.

    What the folder holds of it already is not trained again.

    Args:
        bench: What to train.
        folder: From :func:`claim_folder`.
        command: The command line, for environment.json.
        show: As for :func:`safe_lab.bench.processes.measure`.

    Raises:
        ConfigError: The folder holds measurements of other trainings; nothing is changed then.
    """
    files = RunFolder(folder)
    measured = find_measured(bench, folder)
    files.write("bench.yaml", yaml_core.write(bench.settings.model_dump(mode="json")))
    measurements = list(measured.values())
    try:
        for measurement in measure(bench, folder, show, measured):
            measurements.append(measurement)
            if measurement.environment:
                environment = dict(measurement.environment) | {"command": list(command)}
                files.write("environment.json", json.dumps(environment, indent=1))
            files.write("result.json", to_json(compare(bench, measurements)))
    except KeyboardInterrupt:
        show("interrupted", True)
    return compare(bench, measurements)

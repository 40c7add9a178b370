"""The folder of a bench: what was asked for, every training, and what they come to, up to date at every moment.

``bench.yaml``, ``environment.json``, ``result.json`` (a :class:`~safe_lab.bench.compare.Comparison`), ``processes/``
(configuration, log and figures of each training), ``runs/`` (their run folders).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safe_lab import yaml_core
from safe_lab.bench.compare import Comparison, compare
from safe_lab.bench.config import Bench
from safe_lab.bench.processes import Measurement, measure
from safe_lab.bench.show import to_json
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError


def claim_folder(bench: Bench, output: str | None) -> Path:
    """Make the folder of a bench: ``output``, or ``<output_dir>/bench-<name>/<time>``.

    Raises:
        ConfigError: It holds a bench already, or cannot be written to.
    """
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    name = f"bench-{bench.settings.name}"
    folder = Path(output or Path(bench.configs[bench.baseline].output_dir) / name / started).expanduser().absolute()
    if (folder / "bench.yaml").exists():
        raise ConfigError(f"{folder}: holds a bench already; give --output another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error})") from None
    return folder


def run(bench: Bench, folder: Path, *, command: Sequence[str], show: Callable[[str, bool], None]) -> Comparison:
    """Train all variants in turn and compare them; Ctrl-C ends the running process, and what there is is compared.

    Args:
        bench: What to train.
        folder: From :func:`claim_folder`.
        command: The command line, for environment.json.
        show: As for :func:`safe_lab.bench.processes.measure`.
    """
    files = RunFolder(folder)
    files.write("bench.yaml", yaml_core.write(bench.settings.model_dump(mode="json")))
    measurements: list[Measurement] = []
    try:
        for measurement in measure(bench, folder, show):
            measurements.append(measurement)
            if measurement.environment:
                environment = dict(measurement.environment) | {"command": list(command)}
                files.write("environment.json", json.dumps(environment, indent=1))
            files.write("result.json", to_json(compare(bench, measurements)))
    except KeyboardInterrupt:
        show("interrupted", True)
    return compare(bench, measurements)

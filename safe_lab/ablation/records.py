"""Run folders as an experiment's runs: which are there, which failed, which are missing - none is silently left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_lab import config as configuration
from safe_lab.ablation.experiment_file import Experiment
from safe_lab.child import read_warnings
from safe_lab.config import Config
from safe_lab.figures import read_figure
from safe_lab.run_folder import changed_keys
from safe_lab.section import ConfigError
from safe_lab.trainings import log_of

# What makes a configuration another run's, and is none of its settings.
PLACE = ("name", "variant", "seed", "output_dir", "tracking")
# Of a result.json that this version can compare.
_NEEDED = ("metrics", "main_metric", "resources", "fingerprints", "frozen_share", "frozen_depth")


@dataclass(frozen=True)
class Record:
    """A run that is, or should be, in a comparison.

    Attributes:
        variant: Its variant.
        seed: Its seed.
        path: Its folder.
        config: Its configuration; None where that cannot be read.
        result: What result.json holds; empty without one.
        fault: Why it is not compared: it is missing, has not finished, or cannot be read; empty if it is.
        environment: What environment.json holds; empty where that cannot be read.
        warnings: What it has warned of, where its log is there.
    """

    variant: str
    seed: int
    path: Path
    config: Config | None
    result: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def machine(self) -> str:
        """What its seconds depend on: device, threads, torch."""
        known = self.environment
        devices, packages = known.get("devices"), known.get("packages")
        device = ", ".join(map(str, devices)) if isinstance(devices, list) else ""
        torch = packages.get("torch", "?") if isinstance(packages, dict) else "?"
        processor = device or known.get("processor") or "an unknown processor"
        return f"{processor}, {known.get('threads', '?')} threads, torch {torch}"

    def figure(self, name: str) -> float | None:
        """A figure of its result; None where it has none."""
        if self.fault:
            return None
        try:
            value = read_figure(self.result, name)
        except (ValueError, KeyError, TypeError, AttributeError):
            # It has none, or what it has is damaged.
            return None
        return value if math.isfinite(value) else None


def read_record(path: Path) -> Record:
    """Read a run folder, whatever state it is in.

    Raises:
        ConfigError: It is no run folder.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: there is no config.yaml: it is no run folder")
    try:
        config = configuration.load(path / "config.yaml")
    except ConfigError as error:
        variant, seed = path.parent.name, path.name.removeprefix("seed-")
        fault = f"this version cannot read its config.yaml: {str(error).splitlines()[0]}"
        return Record(variant, int(seed) if seed.isdecimal() else -1, path, None, fault=fault)
    result, fault = _read_result(path)
    return Record(config.variant, config.seed, path, config, result, fault, *_read_beside(path))


def read_experiment(
    experiment: Experiment, failures: Mapping[tuple[str, int], str], folder: Path | None = None
) -> list[Record]:
    """The runs that an experiment is to have.

    Args:
        experiment: Says which.
        failures: Why runs have failed, by variant and seed.
        folder: Where they lie, if not where the experiment says.
    """
    folder = folder or experiment.folder
    records = []
    for run in experiment.runs:
        config = experiment.config_of(*run)
        path = folder / run[0] / f"seed-{run[1]}"
        other = find_change(path, config) or _find_unreadable(path)
        result, fault = ({}, other) if other else _read_result(path)
        if fault and run in failures:
            fault = failures[run]
        records.append(Record(*run, path, config, result, fault, *_read_beside(path)))
    return records


def read_failures(folder: Path) -> dict[tuple[str, int], str]:
    """Why runs of an experiment were in no comparison when it was last run, by variant and seed."""
    try:
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
        return {(row["variant"], int(seed)): fault for row in rows for seed, fault in row["faults"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders at or below some paths: a run's own, a variant's, an experiment's.

    Raises:
        ConfigError: There is none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = (
            [path]
            if (path / "config.yaml").is_file()
            else sorted(config.parent for config in path.glob("**/seed-*/config.yaml"))
        )
        if not path.exists():
            raise ConfigError(f"{path}: there is no such folder or file")
        if not runs:
            raise ConfigError(f"{path}: there is no run folder, here or below")
        found |= dict.fromkeys(run.resolve() for run in runs)
    return list(found)


def find_change(path: Path, config: Config) -> str:
    """Where the run in a folder is not the one that is asked for; empty if it is, or nothing there can be read."""
    try:
        before = configuration.load(path / "config.yaml")
    except ConfigError:
        return ""
    changed = [
        f"{key}: {there} there, {here} here"
        for key, (there, here) in changed_keys(before, config).items()
        if key.partition(".")[0] not in PLACE
    ]
    return f"it is of another configuration: {'; '.join(changed)}" if changed else ""


def _find_unreadable(path: Path) -> str:
    """Why the configuration of a run cannot be told; empty if it can, or there is no run."""
    if not (path / "config.yaml").exists():
        return ""
    try:
        configuration.load(path / "config.yaml")
    except ConfigError as error:
        return f"this version cannot read its config.yaml: {str(error).splitlines()[0]}"
    return ""


def _read_result(path: Path) -> tuple[Mapping[str, Any], str]:
    """What result.json holds, and why that is nothing to compare; one of them is empty."""
    if not (path / "config.yaml").exists():
        return {}, "it is missing"
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "it has not finished"
    except (OSError, ValueError) as error:
        return {}, f"its result.json cannot be read ({error})"
    lacking = [key for key in _NEEDED if key not in result] if isinstance(result, dict) else list(_NEEDED)
    if lacking:
        return {}, f"its result.json is of another version: it lacks {', '.join(lacking)}"
    trees = [*(result[key] for key in ("metrics", "resources", "fingerprints")), result.get("sharpness") or {}]
    if not all(isinstance(tree, dict) for tree in trees) or not isinstance(result["main_metric"], str):
        return {}, "its result.json is damaged"
    return result, ""


def _read_beside(path: Path) -> tuple[Mapping[str, Any], Sequence[str]]:
    """What a run was trained in, and what it warned of."""
    return _read_environment(path), read_warnings(log_of(path))


def _read_environment(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

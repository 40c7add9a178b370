"""What a finished run has recorded: its scores, scoring by scoring, and what it cost, stage by stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from safe_lab import config as configuration
from safe_lab.config import Config
from safe_lab.policy import POLICIES
from safe_lab.resources import TRAINING
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError
from safe_lab.tracking import RESOURCES, SAVINGS, STEP, WALL_SECONDS

# While these move, something else than training goes on.
_ELSEWHERE = ("scoring", "freezing", "evaluation", "checkpoint", "sharpness")

# Two rows, one after the other.
_Span = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Scoring:
    """A scoring that was recorded. Lists are by unit, in the order of execution.

    Attributes:
        step: Optimizer step after which it took place.
        epoch: Passes done by then.
        scores: Importance before normalisation; None if the policy needed none.
        fresh: Whether units were scored anew, or the scores of the end of warm-up stood in (``refresh: false``).
        stale: Whether a score is one of an earlier scoring.
        frozen: Whether a unit was frozen, after this scoring.
    """

    step: int
    epoch: float
    scores: list[float] | None
    fresh: bool
    stale: list[bool]
    frozen: list[bool]

    @property
    def frozen_units(self) -> frozenset[int]:
        """Units that were frozen after it."""
        return frozenset(unit for unit, frozen in enumerate(self.frozen) if frozen)


@dataclass(frozen=True)
class Stage:
    """What a step cost while certain units were frozen, on average.

    Attributes:
        seconds: By activity of training, of a step.
        flops: By phase, of a step: ``forward``, ``backward``, and ``cache`` of a prefix that is computed.
        mean_bytes: Live bytes, averaged over time.
        peak_bytes: Most live bytes.
    """

    seconds: Mapping[str, float]
    flops: Mapping[str, float]
    mean_bytes: float
    peak_bytes: int


@dataclass(frozen=True)
class Recording:
    """A finished run.

    Attributes:
        path: Its folder.
        config: Its configuration.
        result: What result.json holds.
        units: Qualified names, in the order of execution.
        scorings: In the order of time.
        rows: Those of metrics.jsonl that were logged in training.
        evaluations: Optimizer steps after which it was evaluated.
    """

    path: Path
    config: Config
    result: Mapping[str, Any]
    units: Sequence[str]
    scorings: Sequence[Scoring]
    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[int]

    @property
    def has_scores(self) -> bool:
        """Whether its policy needed scores, so that they were recorded."""
        return POLICIES[self.config.freezing.policy].uses_scores

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a pass; its last may accumulate fewer micro-batches."""
        return math.ceil(self.micro_steps_per_epoch / self.config.training.gradient_accumulation)

    @cached_property
    def micro_steps_per_epoch(self) -> int:
        """Micro-batches of a pass."""
        first = self.rows[0]
        accumulation = self.config.training.gradient_accumulation
        if first["epoch"] < 1:
            micro_steps: int = round(first["step"] * accumulation / first["epoch"])
        else:
            micro_steps = round(first["step"] / first["epoch"]) * accumulation
        return micro_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were configured; fewer were done where training was stopped early."""
        training = self.config.training
        steps = self.steps_per_epoch * training.epochs
        return min(steps, training.max_steps or steps)

    def frozen_at(self, step: int) -> frozenset[int]:
        """Units that were frozen in the step after so many."""
        frozen: frozenset[int] = frozenset()
        for scoring in self.scorings:
            if scoring.step <= step:
                frozen = scoring.frozen_units
        return frozen

    @cached_property
    def stages(self) -> Mapping[tuple[frozenset[int], int], Stage]:
        """What was measured, by the units that were frozen and the number of layers whose output was kept.

        FLOPs are of all its steps, as those of evaluations and scorings are counted apart. Seconds and bytes are of the rows
        between which the clock shows no activity but training; a stage without such rows is not among them.
        """
        spans: dict[tuple[frozenset[int], int], list[_Span]] = {}
        for before, after in pairwise([_start(self.rows), *self.rows]):
            frozen = self.frozen_at(before[STEP])
            if not before[STEP] and any(scoring.step < after[STEP] for scoring in self.scorings):
                continue
            if self.frozen_at(after[STEP] - 1) == frozen:
                cached_depth = after[SAVINGS.format(name="cached_depth")]
                spans.setdefault((frozen, cached_depth), []).append((before, after))
        return {key: _average(found) for key, found in spans.items() if any(map(_is_training_alone, found))}


def read_recording(path: Path) -> Recording:
    """Read the folder of a finished run.

    Args:
        path: The folder, or one that holds it and no other run: a trial's, or a variant's.

    Raises:
        ConfigError: It is none, or a file in it is damaged, or it was made by a version whose columns were others.
    """
    below = sorted(path.glob("seed-*/result.json"))
    if below and not (path / "config.yaml").exists():
        if len(below) > 1:
            raise ConfigError(
                f"{path}: there are several runs: {', '.join(found.parent.name for found in below)}; name one"
            )
        path = below[0].parent
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    for file, what in (("config.yaml", "it is no run folder"), ("result.json", "the run has not finished")):
        if not (path / file).is_file():
            raise ConfigError(f"{path}: there is no {file}: {what}")
    config = configuration.load(path / "config.yaml")
    folder = RunFolder(path)
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        rows = folder.rows("metrics.jsonl")
        recording = Recording(
            path=path,
            config=config,
            result=result,
            units=[entry["unit"] for entry in sorted(result["adapters"], key=lambda entry: entry["depth"])],
            scorings=_read_scorings(folder.rows("importance.jsonl"), config),
            rows=[row for row in rows if WALL_SECONDS in row],
            evaluations=[row[STEP] for row in rows if WALL_SECONDS not in row],
        )
        if not recording.rows:
            raise ValueError("metrics.jsonl has no row of training: it ended before training.log_every")
        # What is looked up later is there.
        _ = recording.stages, recording.num_steps, result["labels"], result["savings"]["prefix_depth"]
        _ = (
            result["processes"]["count"],
            result["resources"]["tokens_computed"],
            result["resources"]["seconds"]["sharpness"],
        )
        if recording.scorings and any(len(found.frozen) != len(recording.units) for found in recording.scorings):
            raise ValueError("importance.jsonl lacks a unit")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        raise ConfigError(f"{path}: its files are damaged or of another version ({error})") from None
    return recording


def _read_scorings(rows: Sequence[Mapping[str, Any]], config: Config) -> list[Scoring]:
    by_number: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_number.setdefault(row["scoring"], []).append(row)
    scorings: list[Scoring] = []
    for number, found in sorted(by_number.items()):
        entries = sorted(found, key=lambda row: row["depth"])
        scores = [row["score"] for row in entries]
        # Without refreshing the scores of the end of warm-up are written down again and again.
        is_repeat = bool(scorings) and not config.freezing.refresh and scores == scorings[-1].scores
        frozen_before = scorings[-1].frozen if scorings else [False] * len(entries)
        scorings.append(
            Scoring(
                step=entries[0]["step"],
                epoch=entries[0]["epoch"],
                scores=None if None in scores else scores,
                fresh=not is_repeat and None not in scores,
                stale=[is_repeat or frozen for frozen in frozen_before],
                frozen=[row["frozen"] for row in entries],
            )
        )
        if number != len(scorings):
            raise ValueError(f"importance.jsonl lacks scoring {len(scorings)}")
    return scorings


def _start(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for the moment before the first step, when nothing but the setup has been, and the metric's reference."""
    start = {key: 0 if isinstance(value, int | float) else value for key, value in rows[0].items()} if rows else {}
    setup = RESOURCES.format(name="seconds/setup")
    start[setup] = start[WALL_SECONDS] = rows[0][setup] if rows else 0
    return start


def _seconds(row: Mapping[str, Any], activity: str) -> float:
    found: float = row[RESOURCES.format(name=f"seconds/{activity}")]
    return found


def _byte_seconds(row: Mapping[str, Any]) -> float:
    # The mean is over the time since training began.
    mean: float = row[RESOURCES.format(name="memory_mean_bytes")] or 0.0
    span: float = row[WALL_SECONDS] - _seconds(row, "setup")
    return mean * span


def _is_training_alone(span: _Span) -> bool:
    before, after = span
    # Before the first step there may have been the metric's reference, which counts as scoring, and no more.
    names = _ELSEWHERE if before[STEP] else [name for name in _ELSEWHERE if name != "scoring"]
    return all(_seconds(after, name) == _seconds(before, name) for name in names)


def _gain(spans: Sequence[_Span], key: str) -> float:
    """What a figure that counts up has gained, a step."""
    gained: float = sum(after[key] - before[key] for before, after in spans)
    steps: int = sum(after[STEP] - before[STEP] for before, after in spans)
    return gained / steps


def _average(spans: Sequence[_Span]) -> Stage:
    pure = [span for span in spans if _is_training_alone(span)]
    # In the first, the reference of the metric was made too, and memory was warmed up.
    pure = [span for span in pure if span[0][STEP]] or pure
    bytes_gained = sum(_byte_seconds(after) - _byte_seconds(before) for before, after in pure)
    flops = {phase: _gain(spans, RESOURCES.format(name=f"flops/{phase}")) for phase in ("forward", "backward")}
    return Stage(
        seconds={name: _gain(pure, RESOURCES.format(name=f"seconds/{name}")) for name in TRAINING},
        # Filling the cache is no step's.
        flops=flops | {"cache": _gain(pure, RESOURCES.format(name="flops/cache"))},
        mean_bytes=bytes_gained / sum(after[WALL_SECONDS] - before[WALL_SECONDS] for before, after in pure),
        peak_bytes=max(after[RESOURCES.format(name="step_memory_peak_bytes")] for _, after in spans),
    )

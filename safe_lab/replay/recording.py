"""What a finished run has recorded: its scores, scoring by scoring, and what it cost, stage by stage."""

from __future__ import annotations

import json
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
        stale: Whether a score is one of an earlier scoring.
        frozen: Whether a unit was frozen, after this scoring.
    """

    step: int
    epoch: float
    scores: list[float] | None
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
        num_evaluations: How often it was evaluated.
    """

    path: Path
    config: Config
    result: Mapping[str, Any]
    units: Sequence[str]
    scorings: Sequence[Scoring]
    rows: Sequence[Mapping[str, Any]]
    num_evaluations: int

    @property
    def has_scores(self) -> bool:
        """Whether its policy needed scores, so that they were recorded."""
        return POLICIES[self.config.freezing.policy].uses_scores

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of a pass."""
        last = self.rows[-1]
        steps: float = last["step"] / last["epoch"]
        return steps

    def frozen_at(self, step: int) -> frozenset[int]:
        """Units that were frozen in the step after so many."""
        frozen: frozenset[int] = frozenset()
        for scoring in self.scorings:
            if scoring.step <= step:
                frozen = scoring.frozen_units
        return frozen

    @cached_property
    def stages(self) -> Mapping[tuple[frozenset[int], bool], Stage]:
        """What was measured, by the units that were frozen and whether their layers' output was kept.

        FLOPs are of all its steps, as those of evaluations and scorings are counted apart. Seconds and bytes are of the rows
        between which the clock shows no activity but training; a stage without such rows is not among them.
        """
        spans: dict[tuple[frozenset[int], bool], list[_Span]] = {}
        for before, after in pairwise([_start(self.rows), *self.rows]):
            frozen = self.frozen_at(before[STEP])
            if self.frozen_at(after[STEP] - 1) == frozen:
                is_cached = bool(after[SAVINGS.format(name="cached_depth")])
                spans.setdefault((frozen, is_cached), []).append((before, after))
        return {key: _average(found) for key, found in spans.items() if any(map(_is_training_alone, found))}


def read_recording(path: Path) -> Recording:
    """Read the folder of a finished run.

    Raises:
        ConfigError: It is none, or a file in it is damaged, or it was made by a version whose columns were others.
    """
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
            num_evaluations=sum(WALL_SECONDS not in row for row in rows),
        )
        if recording.scorings and any(len(found.frozen) != len(recording.units) for found in recording.scorings):
            raise ValueError("importance.jsonl lacks a unit")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
                stale=[is_repeat or frozen for frozen in frozen_before],
                frozen=[row["frozen"] for row in entries],
            )
        )
        if number != len(scorings):
            raise ValueError(f"importance.jsonl lacks scoring {len(scorings)}")
    return scorings


def _start(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for the moment before the first step, when nothing but the setup has been."""
    start = {key: 0 if isinstance(value, int | float) else value for key, value in rows[0].items()} if rows else {}
    for name in ("setup", *_ELSEWHERE):
        key = RESOURCES.format(name=f"seconds/{name}")
        start[key] = rows[0][key] if rows and name != "evaluation" else 0
    start[WALL_SECONDS] = _seconds(start, "setup")
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
    return all(_seconds(after, name) == _seconds(before, name) for name in _ELSEWHERE)


def _gain(spans: Sequence[_Span], key: str) -> float:
    """What a figure that counts up has gained, a step."""
    gained: float = sum(after[key] - before[key] for before, after in spans)
    steps: int = sum(after[STEP] - before[STEP] for before, after in spans)
    return gained / steps


def _average(spans: Sequence[_Span]) -> Stage:
    pure = [span for span in spans if _is_training_alone(span)]
    bytes_gained = sum(_byte_seconds(after) - _byte_seconds(before) for before, after in pure)
    flops = {phase: _gain(spans, RESOURCES.format(name=f"flops/{phase}")) for phase in ("forward", "backward")}
    return Stage(
        seconds={name: _gain(pure, RESOURCES.format(name=f"seconds/{name}")) for name in TRAINING},
        # Filling the cache is no step's.
        flops=flops | {"cache": _gain(pure, RESOURCES.format(name="flops/cache"))},
        mean_bytes=bytes_gained / sum(after[WALL_SECONDS] - before[WALL_SECONDS] for before, after in pure),
        peak_bytes=max(after[RESOURCES.format(name="step_memory_peak_bytes")] for _, after in spans),
    )

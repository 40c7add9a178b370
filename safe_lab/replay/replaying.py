"""A replay, and how far it is from runs that were trained so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safe_lab import config as configuration
from safe_lab.config import Config
from safe_lab.replay.costs import CostModel, read_truth
from safe_lab.replay.history import History, check_replayable, compare_histories, replay_history
from safe_lab.replay.recording import Recording, read_recording
from safe_lab.section import ConfigError, override_all


@dataclass(frozen=True)
class Replay:
    """A run as it would have been.

    Attributes:
        recording: The run whose scores are replayed.
        config: The schedule.
        history: What would have frozen when.
        forecast: Its figures, by their names in result.json; None where they cannot be told.
        no_forecast: Why not; empty where they can.
    """

    recording: Recording
    config: Config
    history: History
    forecast: Mapping[str, float] | None
    no_forecast: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; units by name."""
        names = self.recording.units
        return {
            "run": str(self.recording.path),
            "freezing": self.config.freezing.model_dump(mode="json"),
            "scorings": [
                {
                    "scoring": t,
                    "step": moment.step,
                    "epoch": moment.epoch,
                    "threshold": moment.level,
                    "froze": [names[unit] for unit in moment.froze],
                    "frozen": [names[unit] for unit in sorted(moment.frozen)],
                    "stale": [names[unit] for unit in sorted(moment.stale)],
                }
                for t, moment in enumerate(self.history.moments, start=1)
            ],
            "stale_share": self.history.stale_share,
            "forecast": None if self.forecast is None else dict(self.forecast),
            "no_forecast": self.no_forecast or None,
        }


@dataclass(frozen=True)
class Comparison:
    """A replay beside a run that was trained with that schedule.

    Attributes:
        path: The folder of that run.
        unit_scorings: Units times scorings.
        right: At how many of them the unit is frozen in both or in neither.
        errors: Relative error of the forecast by figure: forecast / truth - 1.
    """

    path: str
    unit_scorings: int
    right: int
    errors: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def configure(recording: Recording, overrides: Sequence[str]) -> Config:
    """A run's configuration with another schedule.

    Raises:
        ConfigError: An override is wrong.
    """
    tree = recording.config.model_dump(mode="json")
    faults = override_all(tree, overrides)
    if faults:
        raise ConfigError("\n".join(faults))
    return configuration.build(tree)


class Replayer:
    """Replays one run under any number of schedules."""

    def __init__(self, recording: Recording) -> None:
        """Nothing is planned yet."""
        self.recording = recording
        self._costs: CostModel | None = None
        self._no_costs = ""

    def replay(self, config: Config) -> Replay:
        """The run under another schedule.

        Raises:
            ConfigError: The records do not tell.
        """
        check_replayable(self.recording, config)
        history = replay_history(self.recording, config)
        if self._costs is None and not self._no_costs:
            try:
                self._costs = CostModel(self.recording)
            except ValueError as error:
                self._no_costs = str(error)
        forecast = None if self._costs is None else self._costs.forecast(history, config)
        return Replay(self.recording, config, history, forecast, self._no_costs)

    def compare(self, truth: Recording) -> Comparison:
        """Hold a replay against a run that was trained with that schedule.

        Raises:
            ConfigError: The two runs differ in more than what is replayed.
        """
        replayed = self.replay(truth.config)
        agreement = compare_histories(replayed.history, truth.scorings)
        found = read_truth(truth)
        return Comparison(
            str(truth.path),
            agreement["unit_scorings"],
            agreement["right"],
            {name: value / found[name] - 1 for name, value in (replayed.forecast or {}).items() if found[name]},
        )

    def comparable_beside(self) -> list[Recording]:
        """Finished runs of the same experiment or study, and seed, whose schedule this run's records tell about."""
        found = []
        own = self.recording.path.resolve()
        for path in sorted(own.parent.parent.glob(f"*/{own.name}")):
            if path == own or not (path / "result.json").is_file():
                continue
            try:
                other = read_recording(path)
                check_replayable(self.recording, other.config)
            except ConfigError:
                continue
            found.append(other)
        return found


def replay(path: Path, overrides: Sequence[str] = ()) -> Replay:
    """Replay a finished run under another schedule.

    Args:
        path: Its folder.
        overrides: ``freezing.final_threshold=0.1`` and the like.

    Raises:
        ConfigError: It is no such folder, or its records do not tell.
    """
    recording = read_recording(path)
    return Replayer(recording).replay(configure(recording, overrides))


def compare(path: Path, truths: Sequence[Path]) -> list[Comparison]:
    """Hold replays of a run against runs that were trained with other schedules.

    Raises:
        ConfigError: One is no folder of a finished run, or differs in more than what is replayed.
    """
    replayer = Replayer(read_recording(path))
    return [replayer.compare(read_recording(truth)) for truth in truths]

"""A replay, and how far it is from runs that were trained so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safe_lab import config as configuration
from safe_lab.config import Config
from safe_lab.plan.stages import predict_savings
from safe_lab.policy import POLICIES, PredictedSavings, frozen_depth
from safe_lab.replay.costs import CostModel, read_truth
from safe_lab.replay.history import REPLAYED, History, check_replayable, compare_histories, replay_history
from safe_lab.replay.recording import Recording, read_recording
from safe_lab.run_folder import changed_keys
from safe_lab.section import ConfigError, override_all

# What the level of a policy rises to.
_LEVELS = {
    "threshold": "freezing.final_threshold",
    "share": "freezing.final_share",
    "importance": "freezing.final_importance",
}


@dataclass(frozen=True)
class Replay:
    """A run as it would have been.

    Attributes:
        recording: The run whose scores are replayed.
        config: The schedule.
        history: What would have frozen when.
        forecast: Its figures, by their names in result.json; what freezes is always among them.
        no_forecast: Why its costs are not; empty where they are.
    """

    recording: Recording
    config: Config
    history: History
    forecast: Mapping[str, float]
    no_forecast: str = ""

    @property
    def without_effect(self) -> list[str]:
        """Keys that were changed, and that the policy does not ask for."""
        policy = POLICIES[self.config.freezing.policy]
        asked = policy.level if policy.level in _LEVELS else None
        idle = {key for level, key in _LEVELS.items() if level != asked}
        if not policy.uses_scores:
            idle |= {"freezing.normalize", "freezing.metric"}
        return sorted(idle & changed_keys(self.recording.config, self.config).keys())

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
            "without_effect": self.without_effect,
            "stale_share": self.history.stale_share,
            "forecast": dict(self.forecast),
            "no_forecast": self.no_forecast or None,
        }


@dataclass(frozen=True)
class Comparison:
    """A replay beside a run that was trained with that schedule.

    Attributes:
        path: The folder of that run.
        by_scores: Whether its schedule goes by scores; one that does not is replayed right by construction.
        unit_scorings: Units times scorings.
        right: At how many of them the unit is frozen in both or in neither.
        froze: Units that froze in either.
        at_once: How many of them froze at the same scoring in both.
        errors: Relative error of the forecast by figure: forecast / truth - 1.
    """

    path: str
    by_scores: bool
    unit_scorings: int
    right: int
    froze: int
    at_once: int
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
        self._savings: dict[str, PredictedSavings] = {}

    def history(self, config: Config) -> History:
        """What would have frozen when under another schedule.

        Raises:
            ConfigError: The records do not tell.
        """
        check_replayable(self.recording, config)
        savings = None
        if config.freezing.policy == "budget":
            saves = config.freezing.budget_saves
            if saves not in self._savings:
                try:
                    self._savings[saves] = predict_savings(config, max(len(self.recording.result["labels"]), 1))
                except (ValueError, OSError, ImportError) as error:
                    raise ConfigError(f"{self.recording.path}: {error}") from error
            savings = self._savings[saves]
        return replay_history(self.recording, config, savings)

    def replay(self, config: Config) -> Replay:
        """The run under another schedule.

        Raises:
            ConfigError: The records do not tell.
        """
        history = self.history(config)
        last = history.moments[-1].frozen if history.moments else frozenset[int]()
        forecast: dict[str, float] = {
            "frozen_share": len(last) / history.num_units,
            "frozen_depth": frozen_depth(last, history.num_units),
        }
        reason = self._no_costs
        if not reason:
            try:
                self._costs = self._costs or CostModel(self.recording)
                forecast |= self._costs.forecast(history, config)
            except (ValueError, OSError, ImportError) as error:
                reason = str(error)
                if self._costs is None:
                    self._no_costs = reason
        return Replay(self.recording, config, history, forecast, reason)

    def compare(self, truth: Recording) -> Comparison:
        """Hold a replay against a run that was trained with that schedule.

        Raises:
            ConfigError: The two runs differ in more than what is replayed.
        """
        replayed = self.replay(truth.config)
        found = read_truth(truth)
        return Comparison(
            path=str(truth.path),
            by_scores=POLICIES[truth.config.freezing.policy].uses_scores,
            **compare_histories(replayed.history, truth.scorings),
            errors={name: value / found[name] - 1 for name, value in replayed.forecast.items() if found[name]},
        )

    def compare_beside(self) -> list[Comparison]:
        """The same for the finished runs of its experiment or study, and seed, whose schedules are others and can be replayed."""
        found = []
        own = self.recording.path.resolve()
        for path in sorted(own.parent.parent.glob(f"*/{own.name}")):
            if path == own or not (path / "result.json").is_file():
                continue
            try:
                other = read_recording(path)
                if not changed_keys(self.recording.config, other.config).keys().isdisjoint(REPLAYED):
                    found.append(self.compare(other))
            except ConfigError:
                # Nobody has named it: a run that is damaged, or differs in more, is none to measure by.
                continue
        return found

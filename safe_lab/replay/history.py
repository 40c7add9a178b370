"""Which units would have frozen when, had the run had another schedule: from the scores that were recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safe_lab.build import build_rule
from safe_lab.config import Config
from safe_lab.decision import Decider
from safe_lab.policy import POLICIES, PredictedSavings
from safe_lab.replay.recording import Recording, Scoring
from safe_lab.run_folder import changed_keys
from safe_lab.section import ConfigError

# What a replay may set otherwise than the run; scores of another metric, unit or training nobody has recorded.
REPLAYED = (
    *("freezing.policy", "freezing.normalize", "freezing.warmup", "freezing.stable_share", "freezing.final"),
    *("freezing.curve", "freezing.stairs", "freezing.final_threshold", "freezing.final_share", "freezing.refresh"),
    *("freezing.final_importance", "freezing.budget_saves", "freezing.interval"),
    *("savings.fold", "savings.prefix", "savings.prefix_eval", "savings.cache"),
)
# What changes nothing about a run, or only where its files go.
_INDIFFERENT = ("name", "variant", "output_dir", "tracking.", "sharpness.", "savings.keep_cache")
_OF_SCORES = ("freezing.metric", "freezing.metric_options", "freezing.probe_samples")


@dataclass(frozen=True)
class Moment:
    """A scoring as it would have been.

    Attributes:
        step: Optimizer step after which it takes place.
        epoch: Passes done by then.
        level: tau_t, or the share that the schedule gives; None for a policy without.
        froze: Units that freeze now.
        frozen: Units that are frozen from now on.
        stale: Live units whose score is one of an earlier scoring, as they were frozen in the recorded run.
    """

    step: int
    epoch: float
    level: float | None
    froze: tuple[int, ...]
    frozen: frozenset[int]
    stale: frozenset[int]


@dataclass(frozen=True)
class History:
    """A run's freezing as it would have been.

    Attributes:
        num_units: Number of units.
        moments: Its scorings, in the order of time.
        scored: Steps of those that score units anew.
    """

    num_units: int
    moments: Sequence[Moment]
    scored: Sequence[int]

    @property
    def stale_share(self) -> float:
        """Share of the scores of live units that are of an earlier scoring, in [0, 1]."""
        frozen = [frozenset(), *(moment.frozen for moment in self.moments)]
        live = sum(self.num_units - len(before) for before in frozen[:-1])
        return sum(len(moment.stale) for moment in self.moments) / live if live else 0.0


def check_replayable(recording: Recording, config: Config) -> None:
    """Whether a run's records tell about a configuration.

    Raises:
        ConfigError: They do not; a line for each reason.
    """
    faults = [
        _explain(recording, config, key)
        for key in changed_keys(recording.config, config)
        if key not in REPLAYED and not key.startswith(_INDIFFERENT) and not _is_unused(config, key)
    ]
    uses_scores = POLICIES[config.freezing.policy].uses_scores
    if not recording.scorings:
        faults.append("the run ended before its first scoring (freezing.interval), and recorded no score")
    elif config.freezing.interval != recording.config.freezing.interval and uses_scores and _has_memory(config):
        faults.append(
            f"freezing.interval: scores by {config.freezing.metric} hang on the scorings before, and would be others"
        )
    elif uses_scores and not recording.has_scores:
        faults.append(
            f"freezing.policy: {config.freezing.policy} needs scores, and the run of policy "
            f"{recording.config.freezing.policy} recorded none; one with policy safe and final_threshold 0 freezes nothing, and "
            "records them all"
        )
    if faults:
        raise ConfigError("\n".join(f"{recording.path}: {fault}" for fault in faults))


def _has_memory(config: Config) -> bool:
    return config.freezing.metric == "random" or bool(config.freezing.metric_options.get("smoothing"))


def _is_unused(config: Config, key: str) -> bool:
    return key.startswith(_OF_SCORES) and not POLICIES[config.freezing.policy].uses_scores


def _explain(recording: Recording, config: Config, key: str) -> str:
    if key.startswith(_OF_SCORES):
        return (
            f"{key}: the scores that were recorded are by {recording.config.freezing.metric} as it was set there; others take a "
            f"run that is trained with them. What can be replayed is {', '.join(REPLAYED)}"
        )
    return f"{key}: cannot be replayed, only trained; what can is {', '.join(REPLAYED)}"


def replay_history(recording: Recording, config: Config, savings: PredictedSavings | None = None) -> History:
    """Take the decisions of another schedule on the scores that were recorded.

    A unit that was frozen in the recorded run and would not be here keeps the score it froze with; that is told as stale. That
    the others' scores would have come out a little differently, had other units been frozen, is left out.

    Args:
        recording: The run.
        config: The schedule; :func:`check_replayable` has nothing against it.
        savings: What freezing saves, for policy ``budget``, as the run itself predicts it.

    Raises:
        ConfigError: It scores at steps at which the run did not.
    """
    rule = build_rule(config.freezing)
    num_units = len(recording.units)
    decider = Decider(rule, num_units, seed=config.seed, savings=savings)
    kept: dict[int, float] = {}
    moments = []
    scored: list[int] = []
    for scoring in _choose(recording, config):
        wants_scores = decider.wants_scores
        scores, stale = None, frozenset[int]()
        if wants_scores:
            assert scoring.scores is not None
            scored.append(scoring.step)
            live = [unit for unit in range(num_units) if unit not in decider.frozen]
            scores = [kept.get(unit, score) for unit, score in enumerate(scoring.scores)]
            stale = frozenset(unit for unit in live if scoring.stale[unit])
        decision = decider.decide(scores)
        decider.freeze(decision.freezes)
        if decision.scores is not None:
            kept |= {unit: decision.scores[unit] for unit in decision.freezes}
        moments.append(
            Moment(
                scoring.step,
                scoring.epoch,
                decision.level,
                tuple(decision.freezes),
                frozenset(decider.frozen),
                stale,
            )
        )
    return History(num_units, moments, scored)


def _choose(recording: Recording, config: Config) -> Sequence[Scoring]:
    """The recorded scorings that the configuration's interval asks for.

    Raises:
        ConfigError: There was none at one of its steps.
    """
    interval, recorded = config.freezing.interval, recording.config.freezing.interval
    if interval == recorded:
        return recording.scorings
    there = {scoring.step: scoring for scoring in recording.scorings}
    steps = recording.result["steps"]
    if interval == "epoch":
        wanted = [recording.steps_per_epoch * epoch for epoch in range(1, recording.config.training.epochs + 1)]
    else:
        wanted = list(range(interval, steps + 1, interval))
    wanted = [step for step in wanted if step < steps]
    missing = [step for step in wanted if step not in there]
    if missing:
        raise ConfigError(
            f"{recording.path}: freezing.interval: {interval} scores after step {missing[0]}, and the run, with {recorded}, did "
            "not"
        )
    return [there[step] for step in wanted]


def compare_histories(replayed: History, truth: Sequence[Scoring]) -> Mapping[str, Any]:
    """How far a replay is from a run that was trained so.

    Returns:
        ``unit_scorings`` in all, and ``right``: at how many of them a unit is frozen in both or in neither; ``froze``: units that
        froze in either, and ``at_once``: how many of them at the same scoring in both.
    """
    # A run may have stopped early.
    pairs = list(zip(replayed.moments, truth, strict=False))
    ours = _when([(moment.step, moment.frozen) for moment, _ in pairs])
    theirs = _when([(scoring.step, scoring.frozen_units) for _, scoring in pairs])
    return {
        "unit_scorings": replayed.num_units * len(pairs),
        "right": sum(replayed.num_units - len(moment.frozen ^ scoring.frozen_units) for moment, scoring in pairs),
        "froze": len(ours.keys() | theirs.keys()),
        "at_once": sum(theirs.get(unit) == step for unit, step in ours.items()),
    }


def _when(frozen: Sequence[tuple[int, frozenset[int]]]) -> dict[int, int]:
    """The step at which each unit froze."""
    steps: dict[int, int] = {}
    for step, units in frozen:
        steps |= {unit: step for unit in units if unit not in steps}
    return steps

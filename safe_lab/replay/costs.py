r"""What a run would have cost under another schedule: what it did cost, times what the planner says the change makes of it.

For a stage in which the units S are frozen, a figure x of a step is taken as it was measured where the run went through that
stage; else, with x_0 measured while nothing was frozen and p planned,

.. math:: \hat x(S) = x_0 \, \frac{p(S)}{p(\emptyset)}

for FLOPs and seconds by phase. Bytes come in two parts: what is always there is planned outright, and what a step makes on its
way (activations, temporary tensors) is scaled so. Evaluations and scorings go with the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safe_lab.config import Config
from safe_lab.figures import FORECAST, read_figure
from safe_lab.policy import POLICIES
from safe_lab.replay.history import History
from safe_lab.replay.recording import Recording, Stage
from safe_lab.replay.stage_costs import StageCost, StagePlanner
from safe_lab.section import ConfigError


@dataclass(frozen=True)
class _Step:
    """A step at a stage as forecast: FLOPs, seconds, bytes averaged over them, and most bytes."""

    flops: float
    seconds: float
    mean_bytes: float
    peak_bytes: float


@dataclass(frozen=True)
class _Span:
    """Steps of one stage.

    Attributes:
        steps: How many.
        frozen: Units that are frozen in them.
        cached: Whether the prefix's output is read, not computed.
    """

    steps: int
    frozen: frozenset[int]
    cached: bool


class CostModel:
    """Forecasts the costs of one run under other schedules."""

    def __init__(self, recording: Recording) -> None:
        """Take what the run measured while nothing was frozen.

        Raises:
            ConfigError: Too few rows were logged, or the run's memory was planned by a budget, or several processes trained it.
            ValueError: The planner can run the model in no way.
        """
        config = recording.config
        if config.memory.budget is not None:
            raise ConfigError(f"{recording.path}: memory.budget: what its stages would have cost cannot be told")
        if recording.result["processes"]["count"] > 1:
            raise ConfigError(
                f"{recording.path}: several processes trained it, and replay knows the costs of one alone"
            )
        live = recording.stages.get((frozenset(), False))
        if live is None:
            raise ConfigError(
                f"{recording.path}: training.log_every: {config.training.log_every} leaves no row between two scorings or "
                "evaluations, and without one its steps cannot be told from these"
            )
        self._recording = recording
        self._live: Stage = live
        rows, tokens = _measure_shape(recording)
        self._planner = _build_planner(recording, config, rows=rows, tokens=tokens)
        self._base = self._planner.cost((), folds=False, skips=False)
        # A model whose adapters cannot be merged, or whose layers cannot be run in part, showed it where something froze.
        froze = any(scoring.frozen_units for scoring in recording.scorings)
        self._can_fold = not (froze and config.savings.fold and not recording.result["savings"]["folded_layers"])
        self._elsewhere_bytes = self._measure_elsewhere()

    def forecast(self, history: History, config: Config) -> dict[str, float]:
        """The figures of :data:`~safe_lab.figures.FORECAST` that the run would have come to.

        Args:
            history: What would have frozen when.
            config: The configuration.
        """
        spans = self._spans(history, config)
        recording, resources = self._recording, self._recording.result["resources"]
        steps = [(span, self._step(span, config)) for span in spans]
        flops = sum(span.steps * step.flops for span, step in steps)
        training_seconds = sum(span.steps * step.seconds for span, step in steps)
        byte_seconds = sum(span.steps * step.seconds * step.mean_bytes for span, step in steps)

        fill_flops, fill_seconds = self._fill(spans, config)
        by_phase, seconds = resources["flops_by_phase"], resources["seconds"]
        # What an evaluation or a scoring takes, of what it takes while nothing is frozen.
        share = self._share_of_passes(spans, config)
        share /= self._share_of_passes(self._recorded_spans(), recording.config)
        scorings = history.scored / max(len(recording.scorings), 1) if recording.has_scores else 1.0
        if not POLICIES[config.freezing.policy].uses_scores:
            scorings = 0.0
        flops += share * (by_phase["evaluation"] + scorings * by_phase["scoring"]) + fill_flops
        elsewhere = (
            share * (seconds["evaluation"] + scorings * seconds["scoring"])
            + fill_seconds
            + sum(seconds[name] for name in ("freezing", "checkpoint", "tracking"))
        )
        last = history.moments[-1].frozen if history.moments else frozenset()
        depth = next((unit for unit in range(history.num_units) if unit not in last), history.num_units)
        return {
            "resources/memory_mean_bytes": (byte_seconds + elsewhere * self._elsewhere_bytes)
            / (training_seconds + elsewhere),
            "resources/memory_peak_bytes": max(
                self._peak_elsewhere(spans, config), *(step.peak_bytes for _, step in steps)
            ),
            "resources/flops": flops,
            "resources/wall_seconds": seconds["setup"] + training_seconds + elsewhere,
            "frozen_share": len(last) / history.num_units,
            "frozen_depth": depth,
        }

    def _spans(self, history: History, config: Config) -> list[_Span]:
        marks = [(0, frozenset[int]()), *((moment.step, moment.frozen) for moment in history.moments)]
        return self._cut(marks, config)

    def _recorded_spans(self) -> list[_Span]:
        marks = [
            (0, frozenset[int]()),
            *((scoring.step, scoring.frozen_units) for scoring in self._recording.scorings),
        ]
        return self._cut(marks, self._recording.config)

    def _cut(self, marks: list[tuple[int, frozenset[int]]], config: Config) -> list[_Span]:
        """Spans between what froze at which step; a prefix is cached while each example is still to come more than once."""
        total, spans, cached_frozen = self._recording.result["steps"], list[_Span](), frozenset[int]()
        ends = [step for step, _ in marks[1:]] + [total]
        for (begin, frozen), end in zip(marks, ends, strict=True):
            passes_left = (total - begin) / self._recording.steps_per_epoch
            if config.savings.cache and passes_left > 1:
                cached_frozen = frozen
            depth = self._stage(frozen, config).prefix_depth
            # What froze later, and is too late to be kept, is computed from where the cache ends.
            cached = depth > 0 and depth == self._stage(cached_frozen, config).prefix_depth
            if spans and spans[-1].frozen == frozen:
                spans[-1] = _Span(spans[-1].steps + end - begin, frozen, spans[-1].cached)
            elif end > begin:
                spans.append(_Span(end - begin, frozen, cached))
        return spans

    def _stage(self, frozen: frozenset[int], config: Config) -> StageCost:
        savings = config.savings
        return self._planner.cost(
            frozen,
            folds=savings.fold and self._can_fold and config.training.mixed_precision == "none",
            skips=savings.prefix and savings.prefix_eval and config.freezing.policy != "none",
        )

    def _step(self, span: _Span, config: Config) -> _Step:
        measured = None
        if config.savings == self._recording.config.savings:
            measured = self._recording.stages.get((span.frozen, span.cached))
        if measured is not None:
            return _Step(
                sum(measured.flops.values()), sum(measured.seconds.values()), measured.mean_bytes, measured.peak_bytes
            )
        stage, base, live = self._stage(span.frozen, config), self._base, self._live
        flops = {phase: live.flops[phase] * stage.flops[phase] / base.flops[phase] for phase in ("forward", "backward")}
        seconds = dict(live.seconds)
        for phase in ("forward", "backward", "optimizer"):
            seconds[phase] *= stage.times[phase] / base.times[phase]
        if not span.cached:
            flops["prefix"] = live.flops["forward"] * stage.flops["prefix"] / base.flops["forward"]
            seconds["prefix"] = live.seconds["forward"] * stage.times["prefix"] / base.times["forward"]
        transient = stage.transient_bytes / base.transient_bytes
        peak_transient = stage.peak_transient_bytes / base.peak_transient_bytes
        return _Step(
            sum(flops.values()),
            sum(seconds.values()),
            stage.resident_bytes + (live.mean_bytes - base.resident_bytes) * transient,
            stage.peak_resident_bytes + (live.peak_bytes - base.peak_resident_bytes) * peak_transient,
        )

    def _fill(self, spans: list[_Span], config: Config) -> tuple[float, float]:
        """FLOPs and seconds of filling the cache: each layer once for every example, those of the validation split too."""
        recording, live, base = self._recording, self._live, self._base
        resources = recording.result["resources"]
        deepest = max(
            (self._stage(span.frozen, config) for span in spans if span.cached),
            key=lambda stage: stage.prefix_depth,
            default=None,
        )
        if deepest is None:
            return 0.0, 0.0
        epoch = recording.steps_per_epoch
        evaluations = max(recording.num_evaluations, 1)
        share = self._share_of_passes(self._recorded_spans(), recording.config)
        passes_flops = live.flops["forward"] * epoch + resources["flops_by_phase"]["evaluation"] / evaluations / share
        passes_seconds = live.seconds["forward"] * epoch + resources["seconds"]["evaluation"] / evaluations / share
        return (
            passes_flops * deepest.flops["prefix"] / base.flops["forward"],
            passes_seconds * deepest.times["prefix"] / base.times["forward"],
        )

    def _share_of_passes(self, spans: Sequence[_Span], config: Config) -> float:
        """What a forward pass costs on average over the run, of one while nothing is frozen."""
        total = sum(span.steps for span in spans)

        def cost(span: _Span) -> float:
            stage = self._stage(span.frozen, config)
            return stage.flops["forward"] + (0.0 if span.cached else stage.flops["prefix"])

        return sum(span.steps * cost(span) for span in spans) / total / self._base.flops["forward"]

    def _measure_elsewhere(self) -> float:
        """Bytes live in evaluations, scorings and the rest, on average: what of the run's mean the steps do not explain."""
        recording, resources = self._recording, self._recording.result["resources"]
        seconds = resources["seconds"]
        span = resources["wall_seconds"] - seconds["setup"]
        steps = [(found, self._step(found, recording.config)) for found in self._recorded_spans()]
        training_seconds = sum(found.steps * step.seconds for found, step in steps)
        rest = float(span - training_seconds)
        if rest <= 0:
            return self._base.resident_bytes
        explained = sum(found.steps * step.seconds * step.mean_bytes for found, step in steps)
        unexplained = float(resources["memory_mean_bytes"] * span - explained)
        return max(unexplained / rest, self._base.resident_bytes)

    def _peak_elsewhere(self, spans: Sequence[_Span], config: Config) -> float:
        """Most bytes live in an evaluation or scoring: what the run's made on its way, on top of what is always there."""
        resources = self._recording.result["resources"]
        if resources["memory_peak_in"] == "training":
            return 0.0
        by_kind = resources["memory_peak_by_kind"]
        resident = max(self._stage(span.frozen, config).resident_bytes for span in spans)
        return resident + float(by_kind["activations"] + by_kind["temporary"])


def read_truth(recording: Recording) -> Mapping[str, float]:
    """The figures of :data:`~safe_lab.figures.FORECAST` that a run did come to."""
    return {name: read_figure(recording.result, name) for name in FORECAST}


def forecast_peak(recording: Recording, config: Config) -> float:
    """Most bytes live in a run of another configuration on the same data, as long as nothing is frozen.

    Args:
        recording: A run on the same rows.
        config: The configuration; batch, adapter, unit, precision and all else that the planner knows may differ.

    Raises:
        ConfigError: The data differ, or a run's memory is planned by a budget, or too few rows were logged.
        ValueError: The planner can run the model in no way.
    """
    if config.data != recording.config.data or config.model.path != recording.config.model.path:
        raise ConfigError(f"{recording.path}: its data or its model are not those of this configuration")
    if config.memory.budget is not None or recording.config.memory.budget is not None:
        raise ConfigError(f"{recording.path}: memory.budget: the peak is what it says")
    live = recording.stages.get((frozenset(), False))
    if live is None:
        raise ConfigError(f"{recording.path}: no row tells what a step takes while nothing is frozen")
    rows, tokens = _measure_shape(recording)
    factor = config.training.batch_size / recording.config.training.batch_size
    was = _build_planner(recording, recording.config, rows=rows, tokens=tokens).cost((), folds=False, skips=False)
    new_rows = max(round(rows * factor), 1)
    stage = _build_planner(recording, config, rows=new_rows, tokens=tokens).cost((), folds=False, skips=False)
    on_the_way = live.peak_bytes - was.peak_resident_bytes
    return stage.peak_resident_bytes + on_the_way * stage.peak_transient_bytes / was.peak_transient_bytes


def _measure_shape(recording: Recording) -> tuple[int, int]:
    """Examples in a micro-step and tokens of an example, padding included, on average."""
    training, resources = recording.config.training, recording.result["resources"]
    micro_steps = resources["traced_micro_steps"] + resources["scaled_micro_steps"]
    examples = recording.result["steps"] * training.batch_size * training.gradient_accumulation
    return max(round(examples / micro_steps), 1), max(round(resources["tokens_computed"] / examples), 2)


def _build_planner(recording: Recording, config: Config, *, rows: int, tokens: int) -> StagePlanner:
    on_cuda = recording.result["resources"]["device_allocated_peak_bytes"] is not None
    num_labels = max(len(recording.result["labels"]), 1)
    return StagePlanner(config, num_labels=num_labels, rows=rows, tokens=tokens, device="cuda" if on_cuda else "cpu")

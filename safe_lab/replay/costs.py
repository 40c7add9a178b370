r"""What a run would have cost under another schedule: what it did cost, times what the planner says the change makes of it.

For a stage in which the units S are frozen, a figure x of a step is taken as it was measured where the run went through that
stage; else, with x_0 measured while nothing was frozen and p planned,

.. math:: \hat x(S) = x_0 \, \frac{p(S)}{p(\emptyset)}

for FLOPs and seconds by phase. Bytes come in two parts: what is always there is planned outright, and what a step makes on its
way (activations, temporary tensors) is scaled so. Evaluations and scorings go with the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from safe_lab.config import Config
from safe_lab.figures import FORECAST, read_figure
from safe_lab.policy import POLICIES
from safe_lab.prefix.rows import MULTIPLE, round_up
from safe_lab.replay.history import History
from safe_lab.replay.recording import Recording, Stage
from safe_lab.replay.stage_costs import StageCost, StagePlanner
from safe_lab.section import ConfigError
from safe_lab.tracking import SAVINGS


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
        cached: Units that were frozen when the cache last grew; what froze later is computed from there.
    """

    steps: int
    frozen: frozenset[int]
    cached: frozenset[int]


class CostModel:
    """Forecasts the costs of one run under other schedules."""

    def __init__(self, recording: Recording) -> None:
        """Take what the run measured while nothing was frozen.

        Raises:
            ConfigError: What the run would have cost cannot be told; the message says why.
            ValueError: The planner can run the model in no way.
        """
        config, result = recording.config, recording.result
        if config.memory.budget is not None:
            raise ConfigError(f"{recording.path}: memory.budget: what its stages would have cost cannot be told")
        if result["processes"]["count"] > 1:
            raise ConfigError(
                f"{recording.path}: several processes trained it, and replay knows the costs of one alone"
            )
        if result["steps"] < recording.num_steps:
            raise ConfigError(
                f"{recording.path}: training.early_stopping ended it, and where another schedule would have ended nobody knows"
            )
        live = recording.stages.get((frozenset(), 0))
        if live is None:
            marks = sorted({0, *recording.evaluations, *(scoring.step for scoring in recording.scorings)})
            gap = max((end - begin for begin, end in pairwise(marks)), default=2)
            raise ConfigError(
                f"{recording.path}: training.log_every: {config.training.log_every} leaves no row between two scorings or "
                f"evaluations, and without one its steps cannot be told from these; with {max(gap // 2, 1)} or less there is one"
            )
        self._recording = recording
        self._live: Stage = live
        rows, tokens = _measure_shape(recording)
        self._planner = _build_planner(recording, config, rows=rows, tokens=tokens)
        self._base = self._planner.cost((), folds=False, skips=False)
        # What a model or a tokenizer stands in the way of showed where something froze.
        self._can_fold = self._can_skip = self._can_cache = True
        spans = self._recorded_spans()
        last, there = self._stage(spans[-1].frozen, config), result["savings"]
        self._can_fold = not (last.folded_layers and not there["folded_layers"])
        self._can_skip = not (last.prefix_depth and not there["prefix_depth"])
        cached = any(row[SAVINGS.format(name="cached_depth")] for row in recording.rows)
        self._can_cache = cached or not any(self._cached_depth(span, config) for span in spans)
        self._elsewhere_bytes = self._measure_elsewhere()

    def forecast(self, history: History, config: Config) -> dict[str, float]:
        """``resources/memory_mean_bytes``, ``memory_peak_bytes``, ``flops`` and ``wall_seconds`` that the run would have come to.

        Args:
            history: What would have frozen when.
            config: The configuration.

        Raises:
            ConfigError: The cache would lie in the memory whose bytes are to be told.
        """
        spans = self._cut([(moment.step, moment.frozen) for moment in history.moments], config)
        recording, resources = self._recording, self._recording.result["resources"]
        on_cpu = resources["device_allocated_peak_bytes"] is None
        if (
            config.savings.cache_store == "memory"
            and on_cpu
            and any(self._cached_depth(span, config) for span in spans)
        ):
            raise ConfigError(
                f"{recording.path}: savings.cache_store: memory: what cached activations take there is not forecast"
            )
        steps = [(span, self._step(span, config)) for span in spans]
        training_seconds = sum(span.steps * step.seconds for span, step in steps)
        byte_seconds = sum(span.steps * step.seconds * step.mean_bytes for span, step in steps)

        fill_flops, fill_seconds = self._fill(spans, config)
        by_phase, seconds = resources["flops_by_phase"], resources["seconds"]
        # What evaluations and scorings take, of what they took in the run.
        recorded = self._recorded_spans()
        evaluations = self._passes(recording.evaluations, spans, config)
        evaluations /= self._passes(recording.evaluations, recorded, recording.config) or 1.0
        fresh = [scoring.step for scoring in recording.scorings if scoring.fresh]
        scorings = self._passes(history.scored, spans, config)
        # Without scores, a scoring costs next to nothing, and is all of what was recorded where that had none either.
        scorings = scorings / self._passes(fresh, recorded, recording.config) if fresh else 1.0
        elsewhere = (
            evaluations * seconds["evaluation"]
            + scorings * seconds["scoring"]
            + fill_seconds
            + sum(seconds[name] for name in ("freezing", "checkpoint", "tracking"))
        )
        return {
            "resources/memory_mean_bytes": (byte_seconds + elsewhere * self._elsewhere_bytes)
            / (training_seconds + elsewhere),
            "resources/memory_peak_bytes": max(
                self._peak_elsewhere(spans, config), *(step.peak_bytes for _, step in steps)
            ),
            "resources/flops": sum(span.steps * step.flops for span, step in steps)
            + evaluations * by_phase["evaluation"]
            + scorings * by_phase["scoring"]
            + fill_flops,
            "resources/wall_seconds": seconds["setup"] + training_seconds + elsewhere + seconds["sharpness"],
        }

    def _recorded_spans(self) -> list[_Span]:
        marks = [(scoring.step, scoring.frozen_units) for scoring in self._recording.scorings]
        return self._cut(marks, self._recording.config)

    def _cut(self, marks: Sequence[tuple[int, frozenset[int]]], config: Config) -> list[_Span]:
        """The stages between what froze after which step; the cache grows while each example is still to come more than once."""
        recording = self._recording
        total, cached = recording.result["steps"], frozenset[int]()
        spans: list[_Span] = []
        begins = [(0, frozenset[int]()), *marks]
        ends = [*(step for step, _ in marks), total]
        for (begin, frozen), end in zip(begins, ends, strict=True):
            passes_left = (total - begin) * config.training.gradient_accumulation / recording.micro_steps_per_epoch
            has_frozen = not spans or spans[-1].frozen != frozen
            if has_frozen and config.savings.cache and self._can_cache and passes_left > 1:
                cached = frozen
            if not has_frozen:
                spans[-1] = replace(spans[-1], steps=spans[-1].steps + end - begin)
            elif end > begin:
                spans.append(_Span(end - begin, frozen, cached))
        return spans

    def _stage(self, frozen: frozenset[int], config: Config) -> StageCost:
        savings = config.savings
        return self._planner.cost(
            frozen,
            folds=savings.fold and self._can_fold and config.training.mixed_precision == "none",
            skips=savings.prefix and savings.prefix_eval and self._can_skip and config.freezing.policy != "none",
        )

    def _cached_depth(self, span: _Span, config: Config) -> int:
        return self._stage(span.cached, config).prefix_depth

    def _computed_prefix(self, span: _Span, config: Config) -> tuple[float, float]:
        """FLOPs and time of the layers of the prefix whose output is not kept, for a micro-step."""
        stage, cached = self._stage(span.frozen, config), self._stage(span.cached, config)
        return (
            stage.flops["prefix"] - cached.flops["prefix"],
            stage.times["prefix"] - cached.times["prefix"],
        )

    def _step(self, span: _Span, config: Config) -> _Step:
        measured = None
        if config.savings == self._recording.config.savings:
            measured = self._recording.stages.get((span.frozen, self._cached_depth(span, config)))
        if measured is not None:
            return _Step(
                sum(measured.flops.values()), sum(measured.seconds.values()), measured.mean_bytes, measured.peak_bytes
            )
        stage, base, live = self._stage(span.frozen, config), self._base, self._live
        prefix_flops, prefix_time = self._computed_prefix(span, config)
        flops = live.flops["backward"] * stage.flops["backward"] / base.flops["backward"]
        flops += live.flops["forward"] * (stage.flops["forward"] + prefix_flops) / base.flops["forward"]
        seconds = dict(live.seconds)
        for phase in ("forward", "backward", "optimizer"):
            seconds[phase] *= stage.times[phase] / base.times[phase]
        seconds["cache"] += live.seconds["forward"] * prefix_time / base.times["forward"]
        transient = stage.transient_bytes / base.transient_bytes
        peak_transient = stage.peak_transient_bytes / base.peak_transient_bytes
        return _Step(
            flops,
            sum(seconds.values()),
            stage.resident_bytes + (live.mean_bytes - base.resident_bytes) * transient,
            stage.peak_resident_bytes + (live.peak_bytes - base.peak_resident_bytes) * peak_transient,
        )

    def _fill(self, spans: Sequence[_Span], config: Config) -> tuple[float, float]:
        """FLOPs and seconds of filling the cache: each layer once for every example, those of the validation split too."""
        recording, live, base = self._recording, self._live, self._base
        resources = recording.result["resources"]
        deepest = max((self._stage(span.cached, config) for span in spans), key=lambda stage: stage.prefix_depth)
        epoch = recording.steps_per_epoch
        # What an evaluation of the whole model takes; without any in the run, the validation split counts for nothing here.
        evaluations = self._passes(recording.evaluations, self._recorded_spans(), recording.config) or 1.0
        flops = live.flops["forward"] * epoch + resources["flops_by_phase"]["evaluation"] / evaluations
        seconds = live.seconds["forward"] * epoch + resources["seconds"]["evaluation"] / evaluations
        rows = self._share_of_padded_rows()
        return (
            rows * flops * deepest.flops["prefix"] / base.flops["forward"],
            rows * seconds * deepest.times["prefix"] / base.times["forward"],
        )

    def _share_of_padded_rows(self) -> float:
        """Tokens of a row in the filling, which goes by length, for each of a row in a step.

        It pads to a multiple of some tokens, and so by half of that on average, unless all rows are of one length.
        """
        result = self._recording.result
        computed = result["resources"]["tokens_computed"]
        _, padded = _measure_shape(self._recording)
        tokens = padded * result["tokens"] / computed
        in_filling = tokens + (MULTIPLE - 1) / 2 if result["tokens"] < computed else round_up(tokens)
        return float(in_filling / round_up(padded))

    def _passes(self, steps: Sequence[int], spans: Sequence[_Span], config: Config) -> float:
        """What forward passes after these steps cost together, of one while nothing is frozen; before what freezes there."""
        total, end = 0.0, 0
        for span in spans:
            begin, end = end, end + span.steps
            cost = self._stage(span.frozen, config).flops["forward"] + self._computed_prefix(span, config)[0]
            total += cost * sum(begin < step <= end for step in steps)
        return total / self._base.flops["forward"]

    def _measure_elsewhere(self) -> float:
        """Bytes live in evaluations, scorings and the rest, on average: what of the run's mean the steps do not explain."""
        recording, resources = self._recording, self._recording.result["resources"]
        seconds = resources["seconds"]
        # Sharpness is measured aside, and has no part in the mean.
        span = resources["wall_seconds"] - seconds["setup"] - seconds["sharpness"]
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
        where = resources["memory_peak_in"]
        happens = {
            "evaluation": True,
            "scoring": POLICIES[config.freezing.policy].uses_scores,
            "cache": any(self._cached_depth(span, config) for span in spans),
        }
        if not happens.get(where, False):
            return 0.0
        resident = max(self._stage(span.frozen, config).resident_bytes for span in spans)
        return resident + _transient_peak(self._recording)


def read_truth(recording: Recording) -> dict[str, float]:
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
    if config.savings.trim_padding != recording.config.savings.trim_padding:
        raise ConfigError(f"{recording.path}: savings.trim_padding: its micro-batches are others")
    if config.memory.budget is not None or recording.config.memory.budget is not None:
        raise ConfigError(f"{recording.path}: memory.budget: the peak is what it says")
    live = recording.stages.get((frozenset(), 0))
    if live is None:
        raise ConfigError(f"{recording.path}: no row tells what a step takes while nothing is frozen")
    rows, tokens = _measure_shape(recording)
    factor = config.training.batch_size / recording.config.training.batch_size
    was = _build_planner(recording, recording.config, rows=rows, tokens=tokens).cost((), folds=False, skips=False)
    new_rows = max(round(rows * factor), 1)
    stage = _build_planner(recording, config, rows=new_rows, tokens=tokens).cost((), folds=False, skips=False)
    on_the_way = live.peak_bytes - was.peak_resident_bytes
    in_training = stage.peak_resident_bytes + on_the_way * stage.peak_transient_bytes / was.peak_transient_bytes
    if recording.result["resources"]["memory_peak_in"] != "evaluation":
        return in_training
    factor = config.training.eval_batch_size / recording.config.training.eval_batch_size
    return max(in_training, stage.resident_bytes + factor * _transient_peak(recording))


def _transient_peak(recording: Recording) -> float:
    """What a run had made on its way when most of its bytes were live."""
    by_kind = recording.result["resources"]["memory_peak_by_kind"]
    return float(by_kind["activations"] + by_kind["temporary"])


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

"""Bytes and FLOPs of a run, sampled."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Batch
from safe_lab.memory import KINDS, Ledger, Trace
from safe_lab.resources.clock import TRAINING, Clock, EnergyMeter
from safe_lab.resources.flops import Shape, fit_flops

FLOP_PHASES = ("forward", "backward", "scoring", "evaluation", "cache")
# What of a step's bytes grows with the tokens in it.
_BY_TOKEN = ("activations", "temporary")

# Kind of pass, and what else tells the passes of a kind apart.
Situation = tuple[Any, ...]


@dataclass
class _Peak:
    """The most bytes live at any moment of the run, by kind, and in which activity."""

    bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    activity: str | None = None


@dataclass
class _Sample:
    """A pass: whether it is traced, and afterwards its figures."""

    traced: bool
    trace: Trace = field(init=False)


class Meter:
    r"""Bytes and FLOPs of a run, from passes that are traced and others that are scaled from them.

    A pass is a micro-step, or a run of the frozen prefix on its own. It is traced if, since the last change (:meth:`changed`),
    none of its situation (first and last of its optimizer step, optimizer state there or not; first layer of the prefix) and
    class of tokens (from one power of two to the next) was; if it is longer than any traced of its class of examples; and until
    three lengths are traced. The others carry the figures of the traced one of their situation that is nearest in size, with
    activations and temporaries scaled by the tokens, padding included. FLOPs of a shape that was not traced follow exactly from
    those that were, as :func:`~safe_lab.resources.flops.fit_flops` tells, or are scaled too.

    Attributes:
        clock: Seconds by activity.
        energy: Joules.
        device: On which the model is.
    """

    def __init__(self, clock: Clock, energy: EnergyMeter, model: nn.Module, optimizer: Any) -> None:
        """Watch a model in training.

        Args:
            clock: The run's clock.
            energy: The run's energy meter.
            model: The model.
            optimizer: Its optimizer (Accelerate's wrapper will do).
        """
        self.clock = clock
        self.energy = energy
        self._model = model
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._kept: list[Callable[[], Iterable[Tensor]]] = []
        # Since the last change: traces by situation and shape, and how often each shape came by. The first part of a situation
        # says what kind of pass it is; passes of a kind do the same FLOPs.
        self._traces: dict[tuple[Situation, Shape], Trace] = {}
        self._visits: Counter[tuple[str, Shape]] = Counter()
        self._estimates: dict[str, Callable[[Shape], dict[str, int]]] = {}
        # Inside an activity, whose ledger sees all there is.
        self._in_activity = False
        self._evaluation: Trace | None = None
        # Over the run.
        self._flops = dict.fromkeys(FLOP_PHASES, 0)
        self._peak = _Peak()
        self._byte_seconds = dict.fromkeys(KINDS, 0.0)
        self._span_seconds = 0.0
        self._step_peak_byte_seconds = 0.0
        self._step_seconds = 0.0
        self._num_micro_steps = {"traced": 0, "scaled": 0}
        self._num_evaluations = 0
        # What was spent before the first freeze event, and how often each shape came by up to the last.
        self._unfrozen: dict[str, Any] | None = None
        self._passed: Counter[Shape] = Counter()
        # Since the last row: the figures of each micro-step, and whether it was traced.
        self._recent: list[tuple[Trace, bool]] = []
        # Spans of time with the bytes live in them, and the peak of the step; they are read together with the clock.
        self._spans: list[tuple[Mapping[str, float], int, Any, Any]] = []
        self._held: dict[str, int] = {}
        self._idle_since = clock.mark()
        self.device = next(model.parameters()).device
        self._earlier_peaks: dict[str, int | None] = {}
        if self.device.type == "cuda":
            # Of this run alone, were there others in the process before.
            torch.cuda.reset_peak_memory_stats(self.device)
        # CPU seconds of earlier parts of the run, and where this process's began.
        self._cpu_seconds, self._cpu_began = 0.0, time.process_time()

    def begin(self) -> None:
        """Training begins: the rest of the setup has no part in the mean over time."""
        self.clock.switch("other")
        self._idle_since = self.clock.mark()
        self._cpu_began = time.process_time()

    def keep(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Count what ``tensors`` gives, at the moment, as ``cache``: what is kept beside the model and its optimizer."""
        self._kept.append(tensors)

    @contextmanager
    def micro_step(self, batch: Batch, *, first: bool, last: bool, hidden: Tensor | None = None) -> Iterator[None]:
        """Account for a micro-step: forward and backward, and the optimizer's step if it is the last of one.

        Args:
            batch: Its tensors, the first of shape (examples, tokens).
            first: It begins an optimizer step: no gradients are there yet.
            last: It ends one.
            hidden: Output of the frozen prefix, from which it starts.
        """
        situation = ("training", first, last, bool(self._optimizer.state))
        with self._sampled(situation, _shape_of(batch), batch, hidden) as sample:
            yield
        self._num_micro_steps["traced" if sample.traced else "scaled"] += 1
        self._recent.append((sample.trace, sample.traced))

    @contextmanager
    def prefix_pass(self, batch: Batch, first_layer: int) -> Iterator[None]:
        """Account for a run of the frozen prefix: seconds and FLOPs of ``cache``.

        Args:
            batch: Its tensors, the first of shape (examples, tokens).
            first_layer: Where it begins.
        """
        if self._in_activity:
            yield
            return
        with self.clock.on("cache"), self._sampled((f"cache/{first_layer}",), _shape_of(batch), batch):
            yield

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Account for a block of ``scoring``, ``evaluation`` or ``cache``: seconds, bytes and FLOPs.

        Evaluation is traced once, as it runs the same batches each time; the others each time.
        """
        began = self._end_idle()
        with self.clock.on(name), self._inside():
            if name == "evaluation" and self._evaluation is not None:
                yield
                trace = self._evaluation
                # Parameters too: those of a sharded model are gathered and given up again.
                now = {**self._held, **{kind: trace.peak[kind] for kind in (*_BY_TOKEN, "parameters")}}
                mean = {**self._held, **{kind: trace.mean[kind] for kind in (*_BY_TOKEN, "parameters")}}
                trace = replace(trace, peak=now, peak_bytes=sum(now.values()), mean=mean, left=self._held)
            else:
                with Ledger(self._model, self._optimizer, cache=self._cache()) as ledger:
                    yield
                trace = ledger.trace
                if name == "evaluation":
                    self._evaluation = trace
        self._num_evaluations += name == "evaluation"
        self._flops[name] += trace.total_flops
        self._account(trace, name, began)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Book a block's seconds on ``name`` and keep its bytes and FLOPs out of all figures: it is no part of the training."""
        before = self._process_peaks()
        self._end_idle()
        with self.clock.on(name):
            yield
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._earlier_peaks = before
        self._idle_since = self.clock.mark()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._in_activity = True
        try:
            yield
        finally:
            self._in_activity = False

    def changed(self) -> None:
        """Something froze, or else changed what a step or an evaluation costs: trace anew."""
        if self._unfrozen is None and self._visits:
            self._unfrozen = self._look_back()
        self._passed = self._trained_shapes()
        self._flops = self._flops_so_far()
        self._visits.clear()
        self._traces.clear()
        self._estimates.clear()
        self._evaluation = None

    def forecast(self) -> dict[str, float | None] | None:
        """What the run would have cost had nothing frozen, as its part before the first freeze event tells; None without one.

        Returns:
            ``flops`` of training and evaluation, exact where those of the lengths are; ``seconds`` of the same, at that part's
            seconds a FLOP and an evaluation; ``memory_mean_bytes``, ``activations_mean_bytes`` and ``memory_peak_bytes``, that
            part's own. Where it had no evaluation, those of the run count as they were.
        """
        before = self._unfrozen
        if before is None:
            return None
        estimate = fit_flops({tuple(shape): flops for shape, flops in before["traced"]})
        training = sum(count * sum(estimate(shape).values()) for shape, count in self._trained_shapes().items())
        if before["evaluations"]:
            evaluations = self._num_evaluations / before["evaluations"]
            flops, seconds = evaluations * before["evaluation_flops"], evaluations * before["evaluation_seconds"]
        else:
            flops, seconds = self._flops["evaluation"], self._read()["evaluation"]
        return {
            "flops": training + round(flops),
            "seconds": before["training_seconds"] * training / before["training_flops"] + seconds,
            "memory_mean_bytes": before["memory_mean_bytes"],
            "activations_mean_bytes": before["activations_mean_bytes"],
            "memory_peak_bytes": before["memory_peak_bytes"],
        }

    def _trained_shapes(self) -> Counter[Shape]:
        """How often micro-steps of each shape came by, over the run."""
        passed = Counter(self._passed)
        passed.update({shape: count for (kind, shape), count in self._visits.items() if kind == "training"})
        return passed

    def _look_back(self) -> dict[str, Any]:
        """What the part of the run before the first freeze event has cost: plain values."""
        seconds, flops = self._read(), self._flops_so_far()
        return {
            "traced": [
                (shape, trace.flops) for (where, shape), trace in self._traces.items() if where[0] == "training"
            ],
            "training_flops": flops["forward"] + flops["backward"],
            "training_seconds": sum(seconds[activity] for activity in TRAINING),
            "evaluations": self._num_evaluations,
            "evaluation_flops": flops["evaluation"],
            "evaluation_seconds": seconds["evaluation"],
            "memory_mean_bytes": self._mean(sum(self._byte_seconds.values()), self._span_seconds),
            "activations_mean_bytes": self._mean(self._byte_seconds["activations"], self._span_seconds),
            "memory_peak_bytes": self._peak.bytes,
        }

    def recent(self) -> dict[str, Any]:
        """Figures of the micro-steps since the last call, and of the run up to now, for a row of metrics.jsonl.

        Keys lack the group ``resources/``; see docs/run_folder.md.
        """
        seconds = self._read()
        if not self._recent:
            raise RuntimeError("there has been no micro-step since the last row")
        highest, traced = max(self._recent, key=lambda entry: entry[0].peak_bytes)
        peaks = self._process_peaks()
        row: dict[str, Any] = {
            "step_memory_peak_bytes": highest.peak_bytes,
            "step_memory_mean_bytes": sum(trace.mean_bytes for trace, _ in self._recent) / len(self._recent),
            **{f"step_memory/{kind}_bytes": highest.peak[kind] for kind in KINDS},
            "step_traced": traced,
            "memory_peak_bytes": self._peak.bytes,
            "memory_mean_bytes": self._mean(sum(self._byte_seconds.values()), self._span_seconds),
            **{f"flops/{phase}": flops for phase, flops in self._flops_so_far().items()},
            **{f"seconds/{activity}": value for activity, value in seconds.items()},
            "joules": self.energy.joules,
            "host_memory_peak_bytes": peaks["host_memory_peak_bytes"],
            "device_memory_peak_bytes": peaks["device_allocated_peak_bytes"],
        }
        self._recent.clear()
        return row

    def summary(self) -> dict[str, Any]:
        """What the run came to: the ``resources`` of result.json, whose keys docs/run_folder.md explains."""
        seconds = self._read()
        flops = self._flops_so_far()
        return {
            "wall_seconds": sum(seconds.values()),
            "seconds": seconds,
            "cpu_seconds": self._cpu_so_far,
            "joules": self.energy.joules,
            "flops": sum(flops.values()),
            "flops_by_phase": flops,
            "memory_peak_bytes": self._peak.bytes,
            "memory_peak_in": self._peak.activity,
            "memory_peak_by_kind": self._peak.by_kind,
            "memory_mean_bytes": self._mean(sum(self._byte_seconds.values()), self._span_seconds),
            "memory_mean_by_kind": {
                kind: self._mean(value, self._span_seconds) for kind, value in self._byte_seconds.items()
            },
            "memory_mean_step_peak_bytes": self._mean(self._step_peak_byte_seconds, self._step_seconds),
            "tokens_computed": sum(rows * length * count for (rows, length), count in self._trained_shapes().items()),
            "traced_micro_steps": self._num_micro_steps["traced"],
            "scaled_micro_steps": self._num_micro_steps["scaled"],
            **self._process_peaks(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that later figures stand on: plain values."""
        return {
            "seconds": self._read(),
            "cpu_seconds": self._cpu_so_far,
            "joules": self.energy.joules,
            "traces": [(situation, shape, asdict(trace)) for (situation, shape), trace in self._traces.items()],
            "visits": [(kind, shape, count) for (kind, shape), count in self._visits.items()],
            "evaluation": self._evaluation and asdict(self._evaluation),
            "held": self._held,
            "flops": self._flops,
            "peak": asdict(self._peak),
            "byte_seconds": dict(self._byte_seconds),
            "spans": (self._step_peak_byte_seconds, self._step_seconds, self._span_seconds),
            "num_micro_steps": self._num_micro_steps,
            "process_peaks": self._process_peaks(),
            "unfrozen": self._unfrozen,
            "passed": list(self._passed.items()),
            "num_evaluations": self._num_evaluations,
            "recent": [(asdict(trace), traced) for trace, traced in self._recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; what this process has spent so far is counted on top."""
        self.clock.add(state["seconds"])
        self.energy.add(state["joules"])
        self._cpu_seconds = state["cpu_seconds"]
        self._earlier_peaks = state["process_peaks"]
        self._traces = {(tuple(situation), tuple(shape)): Trace(**trace) for situation, shape, trace in state["traces"]}
        self._estimates.clear()
        self._visits = Counter({(kind, tuple(shape)): count for kind, shape, count in state["visits"]})
        self._evaluation = state["evaluation"] and Trace(**state["evaluation"])
        self._held = dict(state["held"])
        self._flops = dict(state["flops"])
        self._peak = _Peak(**state["peak"])
        self._byte_seconds = dict(state["byte_seconds"])
        self._step_peak_byte_seconds, self._step_seconds, self._span_seconds = state["spans"]
        self._num_micro_steps = dict(state["num_micro_steps"])
        self._unfrozen = state["unfrozen"]
        self._passed = Counter({tuple(shape): count for shape, count in state["passed"]})
        self._num_evaluations = state["num_evaluations"]
        self._recent = [(Trace(**trace), traced) for trace, traced in state["recent"]]
        self._spans.clear()
        self._idle_since = self.clock.mark()

    def _process_peaks(self) -> dict[str, int | None]:
        """What system and allocator saw, over all parts of the run; None where there is no such device."""
        cuda = self.device.type == "cuda"
        peaks = {
            "host_memory_peak_bytes": host_memory_peak_bytes(),
            "device_allocated_peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "device_reserved_peak_bytes": torch.cuda.max_memory_reserved(self.device) if cuda else None,
        }
        return {
            name: None if peak is None else max(peak, self._earlier_peaks.get(name) or 0)
            for name, peak in peaks.items()
        }

    @property
    def _cpu_so_far(self) -> float:
        return self._cpu_seconds + time.process_time() - self._cpu_began

    @contextmanager
    def _sampled(
        self, situation: Situation, shape: Shape, batch: Batch, hidden: Tensor | None = None
    ) -> Iterator[_Sample]:
        """Trace a pass, or take the figures of those that were."""
        began = self._end_idle()
        sample = _Sample(self._wants_trace(situation, shape))
        if sample.traced:
            with Ledger(
                self._model,
                self._optimizer,
                cache=self._cache(),
                batch=batch.values(),
                activations=() if hidden is None else (hidden,),
            ) as ledger:
                yield sample
            sample.trace = self._traces[situation, shape] = ledger.trace
            self._estimates.pop(situation[0], None)
        else:
            yield sample
            sample.trace = self._scaled(situation, shape)
        self._visits[situation[0], shape] += 1
        self._account(sample.trace, situation[0].partition("/")[0], began)

    def _wants_trace(self, situation: Situation, shape: Shape) -> bool:
        examples, length = shape
        tokens = examples * length
        alike = [known for where, known in self._traces if where == situation]
        new_class = all((known[0] * known[1]).bit_length() != tokens.bit_length() for known in alike)
        # Attention grows with the square of the length, so that few long examples are compared with about as many.
        longest = max((known[1] for known in alike if known[0].bit_length() == examples.bit_length()), default=0)
        lengths = {known[1] for where, known in self._traces if where[0] == situation[0]}
        return new_class or length > longest or (len(lengths) < 3 and length not in lengths)

    def _scaled(self, situation: Situation, shape: Shape) -> Trace:
        """The nearest traced step's figures at another number of tokens, and with what is kept by now."""
        tokens = shape[0] * shape[1]
        near_shape, near = min(
            ((known, trace) for (where, known), trace in self._traces.items() if where == situation),
            key=lambda entry: abs(entry[0][0] * entry[0][1] - tokens),
        )
        factor = tokens / (near_shape[0] * near_shape[1])
        kept = {"cache": self._count_kept()}
        peak = {kind: round(n * factor) if kind in _BY_TOKEN else n for kind, n in near.peak.items()} | kept
        mean = {kind: n * factor if kind in _BY_TOKEN else n for kind, n in near.mean.items()} | kept
        return replace(near, peak_bytes=sum(peak.values()), peak=peak, mean=mean, left=near.left | kept)

    def _account(self, trace: Trace, activity: str, began: Any) -> None:
        if trace.peak_bytes > self._peak.bytes:
            self._peak = _Peak(trace.peak_bytes, dict(trace.peak), activity)
        # What is temporary and still there, the loss and the batch, is about to go.
        self._held = {**trace.left, "temporary": 0}
        self._idle_since = self.clock.mark()
        self._spans.append((trace.mean, trace.peak_bytes if activity == "training" else 0, began, self._idle_since))

    def _end_idle(self) -> Any:
        """Between micro-steps and activities only what is always there is live."""
        now = self.clock.mark()
        if self._held:
            self._spans.append((self._held, 0, self._idle_since, now))
        return now

    def _cache(self) -> list[Tensor]:
        return [tensor for tensors in self._kept for tensor in tensors()]

    def _count_kept(self) -> int:
        return sum(tensor.nbytes for tensor in self._cache() if tensor.device.type == self.device.type)

    def _read(self) -> dict[str, float]:
        seconds = self.clock.read()
        for live, step_peak, began, ended in self._spans:
            spent = self.clock.between(began, ended)
            for kind, nbytes in live.items():
                self._byte_seconds[kind] += nbytes * spent
            self._span_seconds += spent
            if step_peak:
                self._step_peak_byte_seconds += step_peak * spent
                self._step_seconds += spent
        self._spans.clear()
        return seconds

    def _flops_so_far(self) -> dict[str, int]:
        flops = dict(self._flops)
        for (kind, shape), count in self._visits.items():
            for phase, value in self._estimate(kind)(shape).items():
                flops[phase if kind == "training" else "cache"] += count * value
        return flops

    def _estimate(self, kind: str) -> Callable[[Shape], dict[str, int]]:
        if kind not in self._estimates:
            known = {shape: trace.flops for (where, shape), trace in self._traces.items() if where[0] == kind}
            self._estimates[kind] = fit_flops(known)
        return self._estimates[kind]

    @staticmethod
    def _mean(byte_seconds: float, seconds: float) -> float | None:
        return byte_seconds / seconds if seconds else None


def _shape_of(batch: Batch) -> Shape:
    examples, length, *_ = (*next(iter(batch.values())).shape, 1)
    return examples, length


def host_memory_peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What a step costs while any given units are frozen, folded, skipped and cached, by the planner: a model without weights."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from safe_lab.adapters import switched_off, tuner_layers
from safe_lab.config import Config
from safe_lab.memory.ledger import Ledger, Pace, Trace
from safe_lab.memory.predict import count_bytes
from safe_lab.model import num_positions
from safe_lab.plan.subject import build_subject
from safe_lab.prefix.rows import round_up
from safe_lab.prefix.stack import Stack, UnsupportedError

# Some ten on a core with vector units, some hundred on a GPU; only the weight of small operators beside products hangs on it.
_FLOPS_PER_BYTE = {"cpu": 10.0, "cuda": 100.0}
_TRANSIENT = ("activations", "temporary")


@dataclass(frozen=True)
class StageCost:
    """A micro-step at a stage; times are in no unit, and only their ratios mean anything.

    Attributes:
        flops: By phase: ``forward`` and ``backward`` of what is live, ``prefix`` of the layers below, once.
        times: The same in time.
        resident_bytes: Parameters, buffers, gradients, optimizer state and what is kept, averaged over time.
        transient_bytes: Activations and temporary tensors, averaged over time.
        peak_resident_bytes: The former at the moment of the peak.
        peak_transient_bytes: The latter at the moment of the peak.
        prefix_depth: Layers whose output no longer changes.
        folded_layers: Adapter layers that are merged.
    """

    flops: dict[str, float]
    times: dict[str, float]
    resident_bytes: float
    transient_bytes: float
    peak_resident_bytes: float
    peak_transient_bytes: float
    prefix_depth: int
    folded_layers: int


class StagePlanner:
    """Plans stages of one configuration, each once.

    Attributes:
        num_units: Units of the model.
    """

    def __init__(self, config: Config, *, num_labels: int, rows: int, tokens: int, device: str = "cpu") -> None:
        """Build the model on fake tensors.

        Args:
            config: The run.
            num_labels: Size of the head.
            rows: Examples in a micro-step.
            tokens: Length of each.
            device: On which the run is, ``cpu`` or ``cuda``.

        Raises:
            ValueError: The model can be run in no way.
        """
        self._config = config
        self._subject = build_subject(config, num_labels=num_labels)
        self._rehearsal = self._subject.rehearsal
        self._rows, self._tokens, self._device = rows, tokens, device
        self._pace = Pace(_FLOPS_PER_BYTE.get(device, _FLOPS_PER_BYTE["cuda"]))
        self._known: dict[tuple[frozenset[int], bool, bool], StageCost] = {}
        self.num_units = len(self._rehearsal.units)

    def cost(self, frozen: Collection[int], *, folds: bool, skips: bool) -> StageCost:
        """A micro-step while these units are frozen.

        Args:
            frozen: Indices of units.
            folds: Their adapters are merged into the base weights.
            skips: The layers below the frozen depth run apart.
        """
        key = (frozenset(frozen), folds, skips)
        if key not in self._known:
            self._known[key] = self._plan(*key)
        return self._known[key]

    def _plan(self, frozen: frozenset[int], folds: bool, skips: bool) -> StageCost:
        rehearsal = self._rehearsal
        rehearsal.freeze(frozen)
        held = {id(p) for p in rehearsal.trained if not p.requires_grad}
        layers = self._frozen_layers(held) if folds else []
        with switched_off(layers):
            depth, width = self._look() if skips and frozen else (0, 0)
            prefix: Trace | None = None
            hidden: Tensor | None = None
            with ExitStack() as around:
                if depth and self._stack is not None:
                    prefix = self._trace_prefix(depth)
                    given = hidden = self._make_hidden(width)
                    around.enter_context(self._stack.giving(range(depth), lambda: given))
                step = rehearsal.trace(
                    frozen,
                    rows=self._rows,
                    tokens=self._tokens,
                    accumulating=self._config.training.gradient_accumulation > 1,
                    hidden=hidden,
                    pace=self._pace,
                )
        kept = self._subject.kept_bytes
        if self._device == "cpu":
            # The originals of folded weights are kept on the host.
            kept += sum(count_bytes(layer.get_base_layer().parameters()) for layer in layers)
        peak_transient = sum(step.peak[kind] for kind in _TRANSIENT)
        transient = sum(step.mean[kind] for kind in _TRANSIENT)
        return StageCost(
            flops={
                "forward": step.flops["forward"],
                "backward": step.flops["backward"],
                "prefix": 0 if prefix is None else prefix.flops["forward"],
            },
            times={**step.seconds_by_phase, "prefix": 0.0 if prefix is None else prefix.seconds},
            resident_bytes=step.mean_bytes - transient + kept,
            transient_bytes=transient,
            peak_resident_bytes=step.peak_bytes - peak_transient + kept,
            peak_transient_bytes=peak_transient,
            prefix_depth=depth,
            folded_layers=len(layers),
        )

    def _frozen_layers(self, held: Collection[int]) -> list[Any]:
        """Adapter layers none of whose weights train any more, and that can be merged."""
        trained = {id(parameter) for parameter in self._rehearsal.trained}
        layers = []
        for layer in tuner_layers(self._rehearsal.model).values():
            own = [id(p) for p in layer.parameters() if id(p) in trained]
            if own and all(identity in held for identity in own) and hasattr(layer, "merge"):
                layers.append(layer)
        return layers

    @cached_property
    def _stack(self) -> Stack | None:
        """The layers; None where they cannot be run in part."""
        try:
            return Stack(self._rehearsal.model, self._rehearsal.units)
        except UnsupportedError:
            return None

    def _look(self) -> tuple[int, int]:
        """Layers whose output needs no gradient, as things stand, and its width."""
        rehearsal = self._rehearsal
        if self._stack is None:
            return 0, 0
        rehearsal.model.eval()
        try:
            with rehearsal.mode:
                batch = rehearsal.make_batch(1, self._tokens)
                output, _ = self._stack.look(lambda: rehearsal.compute_loss(batch))
        except UnsupportedError:
            return 0, 0
        return self._stack.depth, output.shape[-1]

    def _make_hidden(self, width: int) -> Tensor:
        dtype = next(self._rehearsal.model.parameters()).dtype
        with self._rehearsal.mode:
            return torch.zeros(self._rows, self._tokens, width, dtype=dtype)

    def _trace_prefix(self, depth: int) -> Trace:
        rehearsal = self._rehearsal
        assert self._stack is not None
        model: Any = rehearsal.model
        positions = num_positions(model.get_base_model())
        # It pads its rows.
        tokens = round_up(self._tokens)
        with rehearsal.mode:
            batch = rehearsal.make_batch(self._rows, min(tokens, positions or tokens))
            with Ledger(rehearsal.model, batch=batch.values(), pace=self._pace) as ledger:
                self._stack.run(self._stack.inputs_of(batch), start=0, stop=depth)
        return ledger.trace

"""What a freeze event is turned into: folded layers, a prefix that is skipped, a cache that replaces it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safe_lab.folding import fold, folded_layers, folding_state, kept_tensors, restore_folding, unfold
from safe_lab.freezing import Freezer
from safe_lab.importance.probe import Batch
from safe_lab.prefix import Prefix
from safe_lab.resources import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavingsState:
    """Where the savings stand.

    Attributes:
        folded_layers: Adapter layers that are folded.
        prefix_depth: Layers that are skipped.
        cached_depth: Layers whose output is kept.
        cached_examples: Examples for which it is.
        cache_bytes: Bytes that these take.
    """

    folded_layers: int = 0
    prefix_depth: int = 0
    cached_depth: int = 0
    cached_examples: int = 0
    cache_bytes: int = 0


class Savings:
    """Fold, prefix and cache of one run, in the order in which a freeze event wants them."""

    def __init__(
        self,
        freezer: Freezer,
        meter: Meter,
        prefix: Prefix | None,
        *,
        fold_tolerance: float | None,
        blocks: Callable[[], Iterable[Batch]],
    ) -> None:
        """Nothing happens yet.

        Args:
            freezer: Its frozen adapters are folded.
            meter: Is told what is done.
            prefix: The frozen prefix; None: there is none.
            fold_tolerance: See :func:`safe_lab.folding.fold`; None: nothing is folded.
            blocks: All examples to be cached, in batches that are the same each time.
        """
        self._freezer = freezer
        self._meter = meter
        self._prefix = prefix
        self._fold_tolerance = fold_tolerance
        self._blocks = blocks
        self._has_stopped_folding = False
        self._cache_was_usable = True
        self._kept_by_folds: list[Tensor] = []

    @property
    def state(self) -> SavingsState:
        """Where the savings stand."""
        folded = len(folded_layers(self._freezer.model))
        if self._prefix is None:
            return SavingsState(folded)
        cache = self._prefix.cache
        if cache is None:
            return SavingsState(folded, self._prefix.depth)
        return SavingsState(folded, self._prefix.depth, cache.depth, cache.num_examples, cache.num_bytes)

    @property
    def kept(self) -> list[Tensor]:
        """Tensors kept beside the model: original weights of what is folded, and a cache in memory."""
        cache = None if self._prefix is None else self._prefix.cache
        return [*self._kept_by_folds, *(() if cache is None else cache.kept)]

    def ahead(self, batch: Batch) -> None:
        """Begin to read what a batch that is about to come needs."""
        if self._prefix is not None:
            self._prefix.ahead(batch)

    def stop_folding(self) -> bool:
        """Undo every fold, and fold nothing from here on; whether anything was folded."""
        if not self._kept_by_folds:
            return False
        unfold(self._freezer.model)
        self._kept_by_folds, self._has_stopped_folding = [], True
        return True

    def fold(self) -> None:
        """Fold what froze; the prefix is extended only afterwards, so that its cache holds what folded layers put out."""
        if self._fold_tolerance is None or self._has_stopped_folding:
            return
        with self._meter.activity("scoring"):
            folding = fold(self._freezer, tolerance=self._fold_tolerance)
        self._kept_by_folds = kept_tensors(self._freezer.model)
        reasons: dict[str, list[str]] = {}
        for layer, reason in folding.refused.items():
            reasons.setdefault(reason, []).append(layer)
        for reason, layers in reasons.items():
            log.warning("%d frozen adapter layers stay unfolded: %s (%s)", len(layers), reason, layers[0])

    def extend_prefix(self, *, passes_left: float) -> None:
        """Skip the layers that froze, and keep their output.

        Args:
            passes_left: How often each example will still be trained on, on average. Unless it is more than once, computing what
                is needed costs no more than filling a cache with it.
        """
        if self._prefix is not None:
            self._prefix.update(self._blocks() if passes_left > 1 else None, around=self._meter.prefix_pass)
        self._meter.changed()

    def hidden(self, batch: Batch) -> Tensor | None:
        """The prefix's output for a batch that is about to be trained on; None where there is no prefix."""
        if self._prefix is None or not self._prefix.depth:
            return None
        with self._meter.clock.on("cache"):
            hidden = self._prefix.hidden(batch, around=self._meter.prefix_pass)
        self._notice_drop()
        return hidden

    @contextmanager
    def skipping(self, batch: Batch, hidden: Tensor | None = None, *, once: bool = False) -> Iterator[None]:
        """Inside, the model's forward pass on ``batch`` begins with the first live layer; see :meth:`Prefix.skipping`."""
        if self._prefix is None:
            yield
            return
        with self._prefix.skipping(batch, hidden=hidden, once=once):
            yield

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, every adapter runs beside its base weight; on leaving, what was folded is folded again, to the same bits."""
        state = folding_state(self._freezer.model)
        unfold(self._freezer.model)
        self._kept_by_folds = []
        try:
            yield
        finally:
            restore_folding(self._freezer.model, state)
            self._kept_by_folds = kept_tensors(self._freezer.model)

    def close(self, *, keep_cache: bool = False) -> None:
        """Everything back: base weights have their original bits, all layers run, the cache is gone."""
        unfold(self._freezer.model)
        self._kept_by_folds = []
        if self._prefix is not None:
            self._prefix.close(keep_cache=keep_cache)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to come to the same bits."""
        cache = None if self._prefix is None else self._prefix.cache
        folding = {"folding": folding_state(self._freezer.model), "has_stopped_folding": self._has_stopped_folding}
        if cache is None:
            return {**folding, "path": [], "limit_bytes": None, "usable": True}
        return {
            **folding,
            "path": list(cache.path),
            "limit_bytes": cache.limit_bytes,
            "usable": cache.is_usable_by_all(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the freezer where it was then."""
        self._has_stopped_folding = state["has_stopped_folding"]
        # A run that goes on where weights are spread over processes cannot fold what one on its own has folded.
        if self._fold_tolerance is not None:
            restore_folding(self._freezer.model, state["folding"])
            self._kept_by_folds = kept_tensors(self._freezer.model)
        if self._prefix is not None:
            cache = self._prefix.cache
            if cache is not None and not state["usable"]:
                cache.give_up()
            elif cache is not None and state["limit_bytes"] is not None:
                cache.limit_bytes = state["limit_bytes"]
            self._prefix.restore(state["path"], self._blocks)

    def _notice_drop(self) -> None:
        cache = None if self._prefix is None else self._prefix.cache
        if cache is not None and self._cache_was_usable and not cache.usable:
            self._cache_was_usable = False
            self._meter.changed()

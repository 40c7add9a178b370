"""The frozen prefix: the layers below the frozen depth, run apart from the rest of the model, or read from the cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from safe_lab.importance.probe import Batch, LossFunction, undisturbed
from safe_lab.memory import is_out_of_memory
from safe_lab.prefix.cache import ActivationCache
from safe_lab.prefix.rows import is_padded_on_the_right
from safe_lab.prefix.stack import Stack, UnsupportedError, first_tensor
from safe_lab.processes import ALONE, Processes, is_connection_lost
from safe_lab.sharding import abandon_pass, is_sharded, whole
from safe_lab.units import Unit

log = logging.getLogger(__name__)

_CHECK_ROWS = 4
Around = Callable[[Batch, int], AbstractContextManager[Any]]


def nothing_around(inputs: Batch, first_layer: int) -> AbstractContextManager[Any]:
    """No meter."""
    return nullcontext()


class Prefix:
    """Runs the layers whose output can no longer change once a batch, in evaluation mode and without a graph.

    The model itself stays as it is; inside :meth:`skipping` its forward pass takes the prefix's output and begins with the first
    live layer::

        prefix = Prefix(model, units, probe_batch, loss_function, cache=ActivationCache(folder))
        freezer = Freezer(model, units, optimizer, probe_batches, prefix.loss, rule)
        for batch in batches:
            prefix.loss(model, batch).backward()
            ...
        if freezer.step(step).froze:
            prefix.update(batches_of_all_examples)

    Whether it works on a model is not looked up but tried, on a few examples of the probe: where the model's output is not
    the same with and without it, the model is left alone, and a warning says why.

    Attributes:
        depth: Layers in the prefix.
        cache: Where outputs are kept; None: nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        batch: Batch,
        loss_function: LossFunction,
        *,
        cache: ActivationCache | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sharers: Processes = ALONE,
    ) -> None:
        """Find the layers.

        Args:
            model: The model.
            units: Its adapters, in the order of execution.
            batch: Some examples, on which it is tried whether skipping works; a few of them are taken.
            loss_function: ``loss_function(model, batch)`` runs the model.
            cache: Empty, or to be taken up by :meth:`restore`.
            autocast: The precision in which the whole model runs (``accelerator.autocast``).
            sharers: Those over which the model's weights are spread: they run the same layers.
        """
        self.depth = 0
        self.cache = cache
        self._model = model
        self._examples: Batch = {name: tensor[:_CHECK_ROWS] for name, tensor in batch.items()}
        self._adapters: list[Any] = []
        self._has_warned = False
        self._loss_function = loss_function
        self._autocast = autocast
        self._sharers = sharers
        self._stack: Stack | None = None
        try:
            self._stack = Stack(model, units)
            self._examples = self._stack.make_ragged(self._examples)
        except UnsupportedError as error:
            self._leave_alone(str(error))

    @property
    def num_layers(self) -> int:
        """Layers in all; 0: the model is left alone."""
        return 0 if self._stack is None else len(self._stack.layers)

    def update(self, blocks: Iterable[Batch] | None = None, *, around: Around = nothing_around) -> int:
        """Find the depth anew after something froze, and let the cache grow to it.

        Args:
            blocks: Batches of all examples to be kept, padded on the right, always in the same order and composition; None: the
                cache stays at its depth, and what is above is computed.
            around: ``with around(inputs, first_layer): ...`` around each block that is computed, for a meter.

        Returns:
            The depth, in layers.
        """
        self._look_together()
        if blocks is not None and self.cache is not None and self.cache.is_to_grow(self.depth):
            self._grow(self.depth, blocks, around)
        return self.depth

    def restore(self, path: Sequence[int], blocks: Callable[[], Iterable[Batch]]) -> None:
        """Bring the cache to where it was: from the files of an earlier process, or else in the same steps anew.

        Args:
            path: :attr:`ActivationCache.path` at that time.
            blocks: Gives what :meth:`update` was given.
        """
        self._look_together()
        if self.cache is None or self._stack is None or not path:
            return
        if not self.cache.resume(path, self._fingerprint(path[-1])):
            for depth in path:
                self._grow(depth, blocks(), nothing_around)

    def ahead(self, batch: Batch) -> None:
        """Begin to read what a batch that is about to come needs; to be called on the host's copy of it."""
        if self._stack is not None and self.cache is not None and self._cached_depth and is_padded_on_the_right(batch):
            self.cache.ahead(self._stack.inputs_of(batch))

    def hidden(self, batch: Batch, *, around: Around = nothing_around) -> Tensor | None:
        """The prefix's output for a batch: rows that are kept are read, the others computed.

        Args:
            batch: What the model takes, on any device.
            around: As in :meth:`update`.

        Returns:
            (B, T, D) on the model's device, zero where there is padding on the right; None where there is no prefix.
        """
        if not self._is_on or self._stack is None:
            return None
        inputs, start = self._stack.inputs_of(batch), self._cached_depth
        found, hidden = self._read(inputs)
        kept = [i for i in range(len(found)) if found[i]]
        # Where one process has to run the layers from the input, those that must run them together do.
        one_lacks = self.cache is not None and self.cache.one_lacks(found)
        if hidden is None or one_lacks:
            return self._compute(inputs, around)
        hidden = hidden.to(self._device, non_blocking=True)
        if start < self.depth:
            hidden = self._run(inputs, kept, around, start=start, hidden=hidden)
        missing = [i for i in range(len(found)) if not found[i]]
        if not missing:
            return hidden
        whole = hidden.new_empty(len(found), *hidden.shape[1:])
        whole[torch.tensor(kept, device=self._device)] = hidden
        whole[torch.tensor(missing, device=self._device)] = self._run(inputs, missing, around)
        return whole

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss function, with the prefix skipped."""
        with self.skipping(batch):
            return self._loss_function(model, batch)

    @contextmanager
    def skipping(
        self, batch: Batch | None = None, *, hidden: Tensor | None = None, once: bool = False
    ) -> Iterator[None]:
        """Inside, the model's forward pass on ``batch`` begins with the first live layer.

        Args:
            batch: What the model is about to take.
            hidden: What :meth:`hidden` gave for it, if it was asked already.
            once: The model runs once inside. Without a graph the prefix's output is then freed as soon as the first live layer
                has used it, as in a model that runs whole.
        """
        if not self._is_on or self._stack is None:
            yield
            return
        if hidden is None:
            assert batch is not None
            hidden = self.hidden(batch)
        assert hidden is not None
        held, left = [hidden], self.depth
        del hidden

        def give() -> Tensor:
            nonlocal left
            left -= 1
            return held.pop() if once and not left else held[0]

        with self._stack.giving(range(self.depth), give):
            yield

    def close(self, *, keep_cache: bool = False) -> None:
        """The model runs whole again; the cache goes, unless it is to be kept."""
        self.depth = 0
        if self.cache is not None:
            self.cache.close(keep=keep_cache)

    @property
    def _is_on(self) -> bool:
        """There is a prefix, and its adapters are not switched off for the moment (PEFT's ``disable_adapter()``)."""
        return self.depth > 0 and not any(adapter._disable_adapters for adapter in self._adapters)

    @property
    def _cached_depth(self) -> int:
        """Layers whose output is read; 0 also where the cache is deeper, as something made a layer trainable again."""
        return 0 if self.cache is None or self.cache.depth > self.depth else self.cache.depth

    @property
    def _device(self) -> torch.device:
        assert self._stack is not None
        return next(self._stack.backbone.parameters()).device

    def _read(self, inputs: Batch) -> tuple[list[bool], Tensor | None]:
        """Which rows are kept, and what is kept of these; None if there are none."""
        nothing = [False] * len(inputs["input_ids"])
        if self.cache is None or not self._cached_depth or not is_padded_on_the_right(inputs):
            return nothing, None
        found = self.cache.find(inputs)
        hidden = self.cache.read(inputs, [i for i, is_kept in enumerate(found) if is_kept]) if any(found) else None
        return nothing if hidden is None else found, hidden

    def _compute(self, inputs: Batch, around: Around) -> Tensor:
        """Every row from the input."""
        assert self._stack is not None
        if is_padded_on_the_right(inputs):
            return self._run(inputs, range(len(inputs["input_ids"])), around)
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        with around(inputs, 0), self._autocast():
            return self._stack.run(inputs, start=0, stop=self.depth)

    def _run(
        self, inputs: Batch, rows: Sequence[int], around: Around, *, start: int = 0, hidden: Tensor | None = None
    ) -> Tensor:
        """Some rows, through the layers from ``start`` on, padded to where their bits do not depend on their neighbours."""
        assert self._stack is not None
        selected = {name: tensor.to(self._device) for name, tensor in self._stack.select(inputs, rows).items()}
        columns, wide = inputs["input_ids"].shape[1], selected["input_ids"].shape[1]
        if hidden is not None:
            hidden = _fit_columns(hidden, wide)
        with around(selected, start), self._autocast():
            output = self._stack.run(selected, start=start, stop=self.depth, hidden=hidden)
        # As it is read from the cache.
        output = output.masked_fill(selected["attention_mask"][..., None] == 0, 0)
        return _fit_columns(output, columns)

    def _grow(self, depth: int, blocks: Iterable[Batch], around: Around) -> None:
        assert self._stack is not None and self.cache is not None
        start, stack, device = self.cache.depth, self._stack, self._device

        def right_padded() -> Iterator[dict[str, Tensor]]:
            for block in blocks:
                inputs = stack.inputs_of({name: tensor.to(device) for name, tensor in block.items()})
                if not is_padded_on_the_right(inputs):
                    log.warning(
                        "texts are padded on the left, where padding changes a text's positions: they are not cached"
                    )
                    return
                yield inputs

        @contextmanager
        def around_block(block: Batch) -> Iterator[None]:
            with around(block, start), self._autocast():
                yield

        self.cache.grow(
            stack,
            depth,
            right_padded(),
            around=around_block,
            fingerprint=self._fingerprint(depth),
        )

    def _look_together(self) -> None:
        """Find the depth, the same for all processes that share a cache or the model's weights."""
        self._look()
        depth = self.depth if self._stack is not None else -1
        depth = -self._sharers.largest(-depth) if self.cache is None else self.cache.smallest(depth)
        if depth < 0 and self._stack is not None:
            self._leave_alone("another process cannot")
        self.depth = max(depth, 0)

    def _look(self) -> None:
        """Find the depth, and make sure that the model's output is the same when the prefix is skipped."""
        self.depth = 0
        if self._stack is None:
            return
        batch = self._examples
        try:
            with undisturbed(self._model):
                plain, plain_loss = self._stack.look(lambda: self._loss_function(self._model, batch))
                self._warn_of_gradients_below()
                if not self._stack.depth:
                    return
                self.depth = self._stack.depth
                skipped_modules = (part for layer in self._stack.layers[: self.depth] for part in layer.modules())
                self._adapters = [part for part in skipped_modules if hasattr(part, "_disable_adapters")]
                skipped, skipped_loss = self._run_skipping(batch)
        except UnsupportedError as error:
            self._leave_alone(str(error))
            return
        except Exception as error:
            # Run in part, a model's own code raises whatever it does; what it raises when run whole is for others to tell.
            # Nor is another process gone by its doing; and those that share its weights wait for one that is out of memory.
            is_its_own = not is_connection_lost(error) and not (is_sharded(self._model) and is_out_of_memory(error))
            if not self.depth or not is_its_own:
                raise
            abandon_pass(self._model)
            self._leave_alone(f"run in part it raises {type(error).__name__}: {error}")
            return
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == plain.shape[:2]:
            plain, skipped = plain[mask != 0], skipped[mask != 0]
        change = float((skipped.float() - plain.float()).norm() / plain.float().norm())
        # The loss too: a head may look at padding.
        loss_change = abs(float(skipped_loss) - float(plain_loss)) / max(1.0, abs(float(plain_loss)))
        tolerance = self._rounding(plain.dtype) ** 0.5
        if not (change <= tolerance and loss_change <= tolerance):
            self._leave_alone(
                f"without them its output changes by {change:.1g} of itself, and its loss by {loss_change:.1g}"
            )

    def _warn_of_gradients_below(self) -> None:
        assert self._stack is not None
        if self._stack.depth < self._stack.num_frozen and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the first %d layers are frozen and only %d can be skipped, as what goes into them needs a gradient: something "
                "below them trains, or the model's enable_input_require_grads() is on (disable_input_require_grads() undoes it)",
                self._stack.num_frozen,
                self._stack.depth,
            )

    def _run_skipping(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The backbone's output and the loss, with the prefix skipped."""
        assert self._stack is not None
        outputs: list[Tensor] = []
        hook = self._stack.backbone.register_forward_hook(
            lambda module, args, output: outputs.append(first_tensor(output))
        )
        try:
            # Without the cache, which is at another depth as yet.
            hidden = self._compute(self._stack.inputs_of(batch), nothing_around)
            outputs.clear()
            with torch.no_grad(), self.skipping(hidden=hidden):
                loss = self._loss_function(self._model, batch)
        finally:
            hook.remove()
        return outputs[-1], loss

    def _rounding(self, dtype: torch.dtype) -> float:
        """Relative rounding error of a layer whose output is of a dtype: of the coarsest one that it computes in."""
        device = self._device.type
        with self._autocast():
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
        is_tf32_allowed = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return max(torch.finfo(dtype).eps, 2**-10 if is_tf32_allowed else 0.0)

    def _leave_alone(self, reason: str) -> None:
        self._stack, self.depth = None, 0
        log.warning("the frozen layers of this model cannot be skipped (%s): they run as before", reason)

    def _fingerprint(self, depth: int) -> str:
        """Of all that the prefix's output depends on beside the example: weights, adapters, code, precision."""
        assert self._stack is not None
        backbone = self._stack.backbone
        above = {id(p) for layer in self._stack.layers[depth:] for p in layer.parameters()}
        digest = hashlib.sha256(repr((torch.__version__, transformers.__version__, depth)).encode())
        digest.update(repr(getattr(getattr(backbone, "config", None), "_attn_implementation", None)).encode())
        for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
            if id(tensor) not in above and not tensor.requires_grad:
                value = int(torch.hash_tensor(whole(tensor.detach())).item())
                digest.update(repr((name, str(tensor.dtype), tensor.device.type, value)).encode())
        with self._autocast():
            enabled = torch.is_autocast_enabled(next(backbone.parameters()).device.type)
        digest.update(repr(enabled).encode())
        return digest.hexdigest()


def _fit_columns(hidden: Tensor, columns: int) -> Tensor:
    """Cut padding off at the end, or add some."""
    if hidden.shape[1] >= columns:
        return hidden[:, :columns]
    return torch.nn.functional.pad(hidden, (0, 0, 0, columns - hidden.shape[1]))

"""The layers of a model, run in part: some are passed through, and what would have gone in or come out is given instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safe_lab.importance.probe import Batch
from safe_lab.model import num_positions
from safe_lab.prefix.rows import make_ragged, select_rows
from safe_lab.sharding import abandon_pass, call_of
from safe_lab.units import Unit

Give = Callable[[], Tensor]


class UnsupportedError(ValueError):
    """A model whose layers cannot be run in part; the message is a clause that says why."""


class Stack:
    """The stack of Transformer layers that a model's first unit lies in.

    Nothing is known of any family: what a layer returns, and which layers take part in the graph, is read off one forward pass.

    Attributes:
        backbone: The module that takes ``input_ids`` and runs the layers.
        layers: The layers, from the input.
        depth: Length of the run of layers from the input whose output needs no gradient; set by :meth:`look`.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Find the stack.

        Raises:
            UnsupportedError: The first unit lies in no list of layers, or nothing around that list takes ``input_ids``.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
        sites = (names[id(p)] for unit in units for p in unit.parameters.values() if id(p) in names)
        place = next(filter(None, map(partial(_enclosing_list, model), sites)), None)
        if place is None:
            raise UnsupportedError("no adapter lies in a list of layers")
        self.layers = list(model.get_submodule(place).children())
        parents = place.split(".")
        around = [model.get_submodule(".".join(parents[:i])) for i in range(len(parents) - 1, -1, -1)]
        backbone = next(
            (module for module in around if "input_ids" in inspect.signature(module.forward).parameters), None
        )
        if backbone is None:
            raise UnsupportedError("no module around its layers takes input_ids")
        self.backbone = backbone
        self._model = model
        self._inputs = set(inspect.signature(backbone.forward).parameters)
        self._pad_token_id: int = getattr(getattr(backbone, "config", None), "pad_token_id", None) or 0
        self._most_tokens = num_positions(backbone) if isinstance(backbone, PreTrainedModel) else None
        self.depth = 0
        # What a layer returns beside the hidden states: None for a bare tensor, else the rest of the tuple.
        self._rest: list[tuple[Any, ...] | None] = [None] * len(self.layers)

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the backbone takes: tensors (B, T)."""
        shape = batch["input_ids"].shape
        return {name: tensor for name, tensor in batch.items() if name in self._inputs and tensor.shape == shape}

    def select(self, inputs: Batch, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some rows of a batch, padded to where a row's bits do not depend on its neighbours."""
        return select_rows(inputs, rows, pad_token_id=self._pad_token_id, most_tokens=self._most_tokens)

    def make_ragged(self, batch: Batch) -> dict[str, Tensor]:
        """A batch of rows of unequal length, on which to try what works on any."""
        return make_ragged(batch, pad_token_id=self._pad_token_id, most_tokens=self._most_tokens)

    @property
    def num_frozen(self) -> int:
        """Length of the run of layers from the input that hold nothing trainable."""
        live = (i for i, layer in enumerate(self.layers) if any(p.requires_grad for p in layer.parameters()))
        return next(live, len(self.layers))

    def look(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Watch one forward pass with gradients enabled: which layers take part in the graph, and what they return.

        Args:
            forward: Runs the whole model, in evaluation mode, and returns the loss.

        Returns:
            The backbone's first output and the loss, without a graph.

        Raises:
            UnsupportedError: A layer runs more than once or not at all, or returns something that would have to be made up.
        """
        outputs: dict[int, list[Any]] = {}

        def record(index: int) -> Callable[..., None]:
            return lambda module, args, output: outputs.setdefault(index, []).append(output)

        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_hook(record(i)).remove)
            hooks.callback(self.backbone.register_forward_hook(record(-1)).remove)
            with torch.enable_grad():
                loss = forward()
        if any(len(outputs.get(i, ())) != 1 for i in range(len(self.layers))):
            raise UnsupportedError("its layers do not each run once in a forward pass")
        for i in range(len(self.layers)):
            output = outputs[i][0]
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            if not isinstance(hidden, Tensor) or any(part is not None for part in rest):
                raise UnsupportedError("its layers hand on more than hidden states")
            self._rest[i] = tuple(rest) if isinstance(output, tuple) else None
        needs_gradient = [first_tensor(outputs[i][0]).requires_grad for i in range(len(self.layers))]
        self.depth = needs_gradient.index(True) if True in needs_gradient else len(self.layers)
        return first_tensor(outputs[-1][0]).detach(), loss.detach()

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], *, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        """The output of layer ``stop - 1``, in evaluation mode and without a graph.

        Args:
            inputs: What the backbone takes, each (B, T).
            start: First layer to run.
            stop: Layer after the last to run.
            hidden: Output of layer ``start - 1``, (B, T, D); None if ``start`` is 0.

        Returns:
            (B, T, D).
        """

        def reach(module: nn.Module, args: Any, output: Any) -> None:
            raise _ReachedError(first_tensor(output))

        # What is above must not be called, even to do nothing: who reads activations there would take it for a pass of the model.
        hook = self.layers[stop - 1].register_forward_hook(reach)
        try:
            with _evaluating(self.backbone), self.giving(range(start), lambda: hidden):  # type: ignore[arg-type, return-value]
                self.backbone(**inputs)
        except _ReachedError as reached:
            abandon_pass(self._model)
            return reached.hidden
        finally:
            hook.remove()
        raise RuntimeError(f"layer {stop - 1} was not reached")

    @contextmanager
    def giving(self, indices: range, give: Give) -> Iterator[None]:
        """Inside, the layers of ``indices`` do not run, and return what ``give`` does."""
        entries = [(self.layers[i], call_of(self.layers[i])) for i in indices]
        before = [layer.__dict__.get(entry) for layer, entry in entries]
        try:
            for i, (layer, entry) in zip(indices, entries, strict=True):
                # On the instance, past nn.Module's own __setattr__, which takes as long as a small operator.
                layer.__dict__[entry] = partial(self._give, i, give)
            yield
        finally:
            for (layer, entry), method in zip(entries, before, strict=True):
                if method is None:
                    layer.__dict__.pop(entry, None)
                else:
                    layer.__dict__[entry] = method

    def _give(self, index: int, give: Give, *_: Any, **__: Any) -> Any:
        rest = self._rest[index]
        return give() if rest is None else (give(), *rest)


class _ReachedError(Exception):
    """Ends a pass of the backbone where nothing more is wanted of it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("reached")
        self.hidden = hidden


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a layer or a backbone returns."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    return next(part for part in parts if isinstance(part, Tensor))


def _enclosing_list(model: nn.Module, name: str) -> str | None:
    """The outermost list of layers around a parameter, by its qualified name."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[:i])
    return None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # The flag is set and not eval() called: some adapter layers (loralib's) merge their weights in train() and eval().
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True

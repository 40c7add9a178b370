"""Fold: a frozen adapter goes into its base weight, so that forward runs the plain layer. Undone to the bit.

It knows no configuration, trainer or tracker::

    if freezer.step(step).froze:
        folding = fold(freezer)
    ...
    unfold(model)  # before weights are loaded into the adapters, and at the end

A folded layer is one that PEFT has merged, but for three things. It keeps the original base weight: :func:`unfold` puts the
same bits back, where PEFT subtracts the update again and rounds. Switched off (PEFT's ``disable_adapter()``, a unit's
``switch_off``), it runs on that original and stays folded. And whatever changes the adapter or asks for the base model
(``merge_and_unload``, ``unload``, ``add_adapter``, ``set_adapter``, ``load_state_dict``, ...) unfolds it first.

The adapter's own weights stay where they are, as trained: scores, checkpoints and ``save_pretrained`` see no fold, and nor does
``state_dict``. What writes to the adapter's weights in place, or reads ``base_layer.weight`` directly, must unfold first.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import Any, cast

import torch
from torch import Tensor, nn

from safe_lab.adapters import tuner_layers
from safe_lab.freezing import Freezer
from safe_lab.importance.probe import Batch, undisturbed, widened

MAX_ROWS = 4


@dataclass(frozen=True)
class Folding:
    """What one call of :func:`fold` came to, by the names of adapter layers in ``model.named_modules()``.

    Attributes:
        folded: Layers that folded now.
        refused: Layers that stay unfolded, and why, in a clause for a person. A layer is told once, not again at later calls.
    """

    folded: tuple[str, ...]
    refused: Mapping[str, str]


def fold(freezer: Freezer, batch: Batch | None = None, *, tolerance: float = 1e-4) -> Folding:
    r"""Fold every adapter layer of the freezer's model all of whose weights are frozen; safe to repeat.

    The merged weight W' is what PEFT's own ``merge(safe_merge=True)`` makes of the base weight W, whatever the method. A layer
    folds if on one real forward pass, on its own inputs and in the precision of that pass, its output Y stays what it was:

    .. math:: \|Y_{W'} - Y\|_F \le \epsilon\,\|Y\|_F

    In float32 it does; in bfloat16 W' rounds, and the ratio is some 1e-3 to 1e-2. A frozen adapter's dropout is gone once it is
    folded.

    Costs the one forward pass, and from then on the memory of one original a folded weight: on the host if the model is on an
    accelerator.

    Args:
        freezer: Says what is frozen, and how the model runs.
        batch: What to compare on; None: the first rows of the probe.
        tolerance: :math:`\epsilon`, positive.

    Raises:
        ValueError: ``tolerance`` is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"fold tolerance: must be positive, got {tolerance}")
    if batch is None:
        batch = {name: tensor[:MAX_ROWS] for name, tensor in freezer.batches[0].items()}
    owners = _count_owners(freezer.model)
    refused: dict[str, str] = {}
    merged: dict[str, _Merged] = {}
    candidates = _candidates(freezer, tolerance)
    for name, layer in candidates.items():
        obstacle = _obstacle(layer, owners)
        if obstacle is None:
            try:
                merged[name] = _merge(layer)
            except Exception as error:  # noqa: BLE001 - each method refuses in its own way
                obstacle = f"PEFT cannot merge it into the base weight: {_first_line(error)}"
        if obstacle is not None:
            refused[name], layer.fold_change = obstacle, math.inf
    changes = _measure_changes(freezer, {candidates[name]: weights for name, weights in merged.items()}, batch)
    folded: list[str] = []
    rounded: list[str] = []
    for name, weights in merged.items():
        layer = candidates[name]
        layer.fold_change = change = changes.get(layer, math.inf)
        # A NaN is within no tolerance.
        if change <= tolerance:
            _fold_layer(layer, weights)
            folded.append(name)
        elif layer not in changes:
            refused[name] = "it does not run in the model's forward pass"
        elif math.isfinite(change):
            rounded.append(name)
        else:
            refused[name] = "its output is not finite"
    if rounded:
        most = max(candidates[name].fold_change for name in rounded)
        dtype = str(next(candidates[rounded[0]].base_layer.parameters()).dtype).removeprefix("torch.")
        # One clause for all of them, and the figure that a tolerance must reach.
        refused |= dict.fromkeys(
            rounded,
            f"merged in {dtype}, outputs would change by up to {most:.1e} of their norm in the precision of the model's forward "
            f"pass, and the tolerance is {tolerance:.1e}",
        )
    return Folding(tuple(folded), refused)


def unfold(model: nn.Module) -> None:
    """Undo every fold: base weights have their original bits again, adapters run beside them. Safe to repeat.

    Layers that :func:`fold` refused are forgotten too, as what is loaded next may fold.
    """
    for layer in tuner_layers(model).values():
        if isinstance(layer, FoldedLayer):
            _unfold_layer(layer)
        vars(layer).pop("fold_change", None)


def folded_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are folded."""
    return [name for name, module in model.named_modules() if isinstance(module, FoldedLayer)]


def kept_tensors(model: nn.Module) -> list[Tensor]:
    """The original base weights that folded layers keep beside the model, in the host's memory."""
    return [kept for module in model.modules() if isinstance(module, FoldedLayer) for kept in module.fold_kept.values()]


def folding_state(model: nn.Module) -> dict[str, Any]:
    """Which layers are folded and which were refused, in plain values: what a resumed run needs to be the same."""
    judged = {name: layer for name, layer in tuner_layers(model).items() if "fold_change" in vars(layer)}
    return {
        "folded": folded_layers(model),
        "changes": {name: layer.fold_change for name, layer in judged.items()},
    }


def restore_folding(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Fold what was folded at :func:`folding_state`, and nothing else, without another check.

    The check depends on what trains: where a layer lies close to the tolerance, it might come to something else today. The
    merged weights have the same bits, if the adapters' weights do.

    Raises:
        ValueError: The state is of layers that the model does not have.
    """
    layers = tuner_layers(model)
    unknown = sorted(state["changes"].keys() - layers.keys())
    if unknown:
        raise ValueError(f"the folding state is of other adapter layers than the model's, {unknown[0]} among them")
    unfold(model)
    for name, change in state["changes"].items():
        layers[name].fold_change = change
    for name in state["folded"]:
        _fold_layer(layers[name], _merge(layers[name]))


def _after_unfolding(name: str) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _unfold_layer(self)
        return getattr(self, name)(*args, **kwargs)

    return method


class FoldedLayer(nn.Module):
    """Mixed into the class of an adapter layer while it is folded, in front of PEFT's own.

    The class is exchanged and not a method of the instance, so that a copy of the model is folded by itself.

    Attributes:
        fold_kept: Original weights of the base layer by name; those that merging left as they were are not among them.
        merged_adapters: PEFT's: the adapters that are in the base weight. PEFT's forward, its refusal to delete a merged
            adapter or to mix adapters in a batch, and its status go by it.
    """

    fold_kept: dict[str, Tensor]
    merged_adapters: list[str]

    # PEFT's own names (0.21) for what changes the adapters, or their share in the base weight.
    merge = _after_unfolding("merge")
    update_layer = _after_unfolding("update_layer")
    delete_adapter = _after_unfolding("delete_adapter")
    set_scale = _after_unfolding("set_scale")
    scale_layer = _after_unfolding("scale_layer")
    unscale_layer = _after_unfolding("unscale_layer")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward of a merged layer; switched off, that of a layer that never was merged."""
        if self._disable_adapters:
            with _standing_in(self, self.fold_kept, []):
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def unmerge(self, *_: Any) -> None:
        """Unfold; PEFT calls this before it sets other adapters."""
        _unfold_layer(self)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> Any:
        """The base layer that replaces this one in ``merge_and_unload()`` and ``unload()``."""
        _unfold_layer(self)
        layer: Any = self
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(
                merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
            )
        if merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return layer.get_base_layer()

    def get_delta_weight(self, *args: Any) -> Any:
        """PEFT's, on the original weight, which the update of some methods (PEANuT, DEFT) depends on."""
        with _standing_in(self, self.fold_kept, []):
            return cast(Any, super()).get_delta_weight(*args)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As it is unfolded; on an accelerator the original weights among it are on the host."""
        state = super().state_dict(*args, **kwargs)
        state.update({f"{kwargs.get('prefix', '')}base_layer.{name}": kept for name, kept in self.fold_kept.items()})
        return state

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # Called before the layers inside load: what comes may be weights of the adapter, or of the base.
        if any(key.startswith(prefix) for key in state_dict):
            _unfold_layer(self)
            self._load_from_state_dict(state_dict, prefix, *rest)
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)


@cache
def _folded_class(layer_class: type) -> type:
    return new_class(f"Folded{layer_class.__name__}", (FoldedLayer, layer_class))


@dataclass(frozen=True)
class _Merged:
    """What merging would make of a layer.

    Attributes:
        weights: New weights of the base layer by name; those that stay are not among them.
        adapters: The adapters that would be in them.
    """

    weights: Mapping[str, Tensor]
    adapters: list[str]


def _candidates(freezer: Freezer, tolerance: float) -> dict[str, Any]:
    """Adapter layers with frozen weights and none that train, unless folded or refused before at this tolerance."""
    frozen = {id(parameter) for parameter in freezer.frozen_parameters}
    # By unit too: something may have switched gradients off for a while.
    live = {id(p) for unit in freezer.units for p in unit.parameters.values()} - frozen
    candidates = {}
    for name, layer in tuner_layers(freezer.model).items():
        weights = list(layer.parameters())
        trains = any(id(p) in live or (p.requires_grad and id(p) not in frozen) for p in weights)
        if trains or not any(id(p) in frozen for p in weights):
            continue
        if isinstance(layer, FoldedLayer) or layer._disable_adapters or not _may_fold(layer, tolerance):
            continue
        candidates[name] = layer
    return candidates


def _may_fold(layer: nn.Module, tolerance: float) -> bool:
    # Infinite for a layer that cannot fold at all.
    change: float = vars(layer).get("fold_change", 0.0)
    return change <= tolerance


def _count_owners(model: nn.Module) -> Counter[int]:
    """In how many places of a model each module and each parameter is used, by identity."""
    return Counter(
        id(part) for module in model.modules() for part in (*module.children(), *module.parameters(recurse=False))
    )


def _obstacle(layer: Any, owners: Mapping[int, int]) -> str | None:
    """Why a layer cannot fold, as far as its looks tell."""
    base = getattr(layer, "base_layer", None)
    if base is None or tuner_layers(base) or hasattr(layer, "parameter_name"):
        return "what it adapts is not a plain layer (but a parameter, say, or a layer with adapters inside)"
    weights = list(base.parameters(recurse=False))
    if not weights or any(
        type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta for weight in weights
    ):
        return "its base weight is not a plain floating-point tensor (quantised, sharded or offloaded)"
    if any(owners[id(part)] > 1 for part in (base, *weights)):
        return "its base layer or weight is used elsewhere in the model too"
    if "forward" in vars(layer):
        return "something else has replaced its forward"
    if layer.merged:
        return "it is merged already"
    return None


def _merge(layer: Any) -> _Merged:
    """Merge a copy of the layer, as some methods merge in place, exchange modules or keep copies of their own.

    Raises:
        TypeError: The method has no share in the base weight (LN tuning puts its own layer in the place of the base layer).
        Exception: Whatever PEFT raises where it cannot merge, or would merge something that is not finite.
    """
    # Hooks stay behind: a bound method would draw in the object it belongs to.
    hooks = {
        id(value): type(value)()
        for module in layer.modules()
        for name, value in vars(module).items()
        if "_hooks" in name
    }
    trial = copy.deepcopy(layer, hooks)
    base = trial.base_layer
    trial.merge(safe_merge=True)
    if trial.base_layer is not base:
        raise TypeError("merged, it would run a layer of its own in the place of the base layer, as it does now")
    weights = {}
    for name, weight in layer.base_layer.named_parameters(recurse=False):
        merged = trial.base_layer.get_parameter(name).detach().to(weight)
        if not torch.equal(merged, weight):
            weights[name] = merged
    return _Merged(weights, trial.merged_adapters)


def _measure_changes(freezer: Freezer, merged: Mapping[Any, _Merged], batch: Batch) -> dict[Any, float]:
    """Relative change of each layer's output over one forward pass; a layer that does not run is not among them."""
    if not merged:
        return {}
    squares: dict[Any, Tensor] = {}

    def compare(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        with _standing_in(layer, merged[layer].weights, merged[layer].adapters):
            # Past the layer's hooks, this one among them.
            change = widened(layer.forward(*args, **kwargs)) - widened(output)
        # A layer may run several times in a pass.
        squares[layer] = squares.get(layer, 0) + torch.stack([change.square().sum(), widened(output).square().sum()])

    with ExitStack() as stack:
        for layer in merged:
            stack.callback(layer.register_forward_hook(compare, with_kwargs=True).remove)
        stack.enter_context(undisturbed(freezer.model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        freezer.loss_function(freezer.model, batch)
    changes = {}
    for layer, (change, output) in ((layer, pair.tolist()) for layer, pair in squares.items()):
        changes[layer] = math.sqrt(change / output) if output else math.inf if change else 0.0
    return changes


def _fold_layer(layer: Any, merged: _Merged) -> None:
    base = layer.base_layer
    kept = {name: base.get_parameter(name).detach() for name in merged.weights}
    layer.fold_kept = {name: weight.to("cpu") for name, weight in kept.items()}
    layer.merged_adapters = list(merged.adapters)
    layer.__class__ = _folded_class(layer.__class__)
    for name, weight in merged.weights.items():
        # The parameter stays the object it is, for whoever knows it by that.
        base.get_parameter(name).data = weight


def _unfold_layer(layer: Any) -> None:
    for name, kept in layer.fold_kept.items():
        parameter = layer.base_layer.get_parameter(name)
        parameter.data = kept.to(parameter)
    layer.__class__ = type(layer).__bases__[1]
    layer.merged_adapters = []
    del layer.fold_kept


@contextmanager
def _standing_in(layer: Any, weights: Mapping[str, Tensor], merged_adapters: list[str]) -> Iterator[None]:
    """Run a layer on other base weights, with these adapters in them.

    Not the parameter's data is exchanged but the parameter, so that a graph built inside keeps what it was built on.
    """
    base, adapters = layer.base_layer, layer.merged_adapters
    own = {name: base.get_parameter(name) for name in weights}
    try:
        layer.merged_adapters = merged_adapters
        for name, weight in weights.items():
            setattr(base, name, nn.Parameter(weight.to(own[name]), requires_grad=False))
        yield
    finally:
        for name, parameter in own.items():
            setattr(base, name, parameter)
        layer.merged_adapters = adapters


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

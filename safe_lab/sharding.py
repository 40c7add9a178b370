"""Weights that do not train, spread over the processes: each keeps a part of them, and a layer is whole only while it runs.

PyTorch's FSDP2 does it. Deviation from the way it is used elsewhere: what trains is left out of it. Adapters and head are a
hundredth of the weights or so, and stay plain tensors, whole on every process; their gradients are averaged by
:class:`~safe_lab.replicas.Replicas`. So a freeze event changes nothing here, and scores, checkpoints and ``adapter/`` are made as
on one process. What that leaves out of the sharding are their gradients and optimizer states.

Whenever the model runs, in whole or in part, all processes must run it, as each gives its part: see :meth:`Processes.in_step
<safe_lab.processes.Processes.in_step>`.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.processes import Processes

log = logging.getLogger(__name__)


def shard(
    model: nn.Module,
    names: Collection[str],
    processes: Processes,
    device: torch.device,
    *,
    reshard_after_forward: bool = True,
) -> None:
    """Spread weights over the processes, in place, and move the rest of the model to the device.

    Gathered as one are each layer's, those of the input embeddings, and those that are left over of each module around the
    layers: what lists hold that lie in no other list are layers. A weight that stands in several places of the model stays whole.

    Args:
        model: The same on all processes, and on the host: the device never holds more than one group of it whole, provided that
            nothing else refers to the weights.
        names: Those to spread, as in ``model.named_parameters()``; none of them trains, now or later.
        processes: All processes of the job.
        device: This process's.
        reshard_after_forward: Give a layer up after its forward pass, and gather it anew for the backward pass.

    Raises:
        ValueError: A weight is quantised, layers are skipped at random, or this PyTorch cannot do it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"sharded weights (FSDP) need PyTorch 2.13 or later, and this is {torch.__version__}")
    _check(model)
    places = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    spread = {
        name: id(weight)
        for name, weight in model.named_parameters()
        if name in names and places[id(weight)] == 1 and weight.dim()
    }
    for name in spread:
        # Methods that decompose a weight may leave it transposed, which FSDP refuses.
        model.get_parameter(name).data = model.get_parameter(name).data.contiguous()
    whole = {weight for name, weight in model.named_parameters() if name not in spread}
    mesh = init_device_mesh(device.type, (processes.count,))
    for module in _group(model, set(spread.values())):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=whole)
    for weight in whole:
        # The parameter stays the object that optimizer and units know.
        weight.data = weight.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of a model are spread over processes."""
    return bool(_sharded_modules(model))


def own_part(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor: all of one that is not spread."""
    distributed: Any = tensor
    return distributed.to_local() if hasattr(distributed, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor in whole; to be called on all processes."""
    distributed: Any = tensor
    return distributed.full_tensor() if hasattr(distributed, "full_tensor") else tensor


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module's own, not those of modules in it, are there in whole; on all processes."""
    parts = {name: weight for name, weight in module.named_parameters(recurse=False) if own_part(weight) is not weight}
    try:
        for name, weight in parts.items():
            setattr(module, name, nn.Parameter(whole(weight), requires_grad=False))
        yield
    finally:
        for name, weight in parts.items():
            setattr(module, name, weight)


def abandon_pass(model: nn.Module) -> None:
    """To be called after an exception has ended a forward or backward pass half-way, before there is another."""
    if is_sharded(model):
        sharded: Any = model
        sharded.reset_iter_state()


def call_of(layer: nn.Module) -> str:
    """The attribute by which a layer is stood in for: of a sharded one the call as a whole, whose hooks gather its weights."""
    # What nn.Module calls, where it is there, in the place of forward and hooks (torch 2.13: compiled modules have it).
    return "_compiled_call_impl" if _is_sharded_module(layer) else "forward"


class Groups:
    """The groups in which a sharded model's weights are gathered, for a ledger: no operator makes or frees them.

    FSDP's own books (torch 2.13, private); tests/test_sharding.py says when they have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for them; there are none if the model is not sharded."""
        states = [module._get_fsdp_state() for module in _sharded_modules(model)]
        self._groups = [group for state in states for group in state._fsdp_param_groups]

    def __len__(self) -> int:
        return len(self._groups)

    def parts(self) -> list[Tensor]:
        """What this process keeps of the weights, as long as it has them."""
        return [weight._sharded_param_data for group in self._groups for weight in group.fsdp_params]

    def is_whole(self, group: int) -> bool:
        """Whether a group is gathered at the moment."""
        return bool(self._groups[group].is_unsharded)

    def storages(self, group: int) -> list[torch.UntypedStorage]:
        """Where its whole weights lie; none before it is first gathered."""
        return [
            part.untyped_storage() for weight in self._groups[group].fsdp_params for part in weight.all_gather_outputs
        ]


def _check(model: nn.Module) -> None:
    quantised = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if quantised or getattr(model, "is_quantized", False) or hasattr(model, "hf_quantizer"):
        raise ValueError(
            f"the base weights are quantised ({quantised[0] if quantised else 'as their checkpoint says'}), and FSDP cannot "
            "shard them; train with a copy on each device (accelerate launch --multi_gpu), or load a checkpoint in bfloat16"
        )
    config = getattr(model, "config", None)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, None):
            raise ValueError(
                f"the model skips layers at random ({name} in its config.json), each process others, and with FSDP all must run "
                f"the same: set {name} to 0 there, or train with a copy on each device (accelerate launch --multi_gpu)"
            )


def _group(model: nn.Module, spread: Collection[int]) -> list[nn.Module]:
    """The modules that are gathered as one, each after those inside it; the model itself is the last.

    Args:
        model: The model.
        spread: Identities of the weights. The weights themselves are not held on to.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    if not lists:
        log.warning(
            "the model has no list of layers: all its weights are gathered at once, and FSDP saves nothing at the peak"
        )
    around = {name.rpartition(".")[0] for name in lists}
    around |= {name[:i] for name in around for i, letter in enumerate(name) if letter == "."}
    outwards = sorted(around - {""}, key=lambda name: (-name.count("."), name))
    base: Any = model
    embeddings = [base.get_input_embeddings()] if hasattr(base, "get_input_embeddings") else []
    layers = [layer for name in lists for layer in _callable_in(model.get_submodule(name))]
    left, groups = set(spread), []
    for module in [*layers, *embeddings, *map(model.get_submodule, outwards)]:
        inside = left & set(map(id, module.parameters()))
        if inside:
            left -= inside
            groups.append(module)
    return [*groups, model]


def _callable_in(container: nn.Module) -> Iterator[nn.Module]:
    """What a container holds that is called, also by way of containers in it."""
    for child in container.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable_in(child)
        else:
            yield child


def _is_sharded_module(module: nn.Module) -> bool:
    # Not imported where nothing is sharded; nor by an attribute, which PEFT's modules look for inside themselves.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_sharded_module(module)]

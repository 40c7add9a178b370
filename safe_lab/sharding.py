"""Weights that do not train, spread over the processes: each keeps a part of them, and a layer is whole only while it runs.

PyTorch's FSDP2 does it. Deviation from the way it is used elsewhere: what trains is left out of it. Adapters and head are a
hundredth of the weights or so, and stay plain tensors, whole on every process; their gradients are averaged by
:class:`~safe_lab.replicas.Replicas`. So a freeze event changes nothing here, and scores, checkpoints and ``adapter/`` are made as
on one process. What that leaves out of the sharding are their gradients and optimizer states.

Whenever the model runs, in whole or in part, all processes must run it, as each gives its part: see :meth:`Processes.in_step
<safe_lab.processes.Processes.in_step>`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.processes import Processes


def shard(
    model: nn.Module,
    weights: Collection[nn.Parameter],
    processes: Processes,
    device: torch.device,
    *,
    reshard_after_forward: bool = True,
) -> None:
    """Spread weights over the processes, in place, and move the rest of the model to the device.

    Gathered as one are each layer's, those of the input embeddings, and those that are left over of each module around the
    layers: what lists hold that lie in no other list are layers. A weight that stands in several places of the model stays whole.

    Args:
        model: The same on all processes; best on the host, as no device ever holds more than one group of it whole.
        weights: Those to spread; none of them trains, now or later.
        processes: All processes of the job.
        device: This process's.
        reshard_after_forward: Give a layer up after its forward pass, and gather it anew for the backward pass.

    Raises:
        ValueError: A weight is quantised, or this PyTorch cannot do it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"sharded weights (FSDP) need PyTorch 2.13 or later, and this is {torch.__version__}")
    quantised = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if quantised or getattr(model, "is_quantized", False) or hasattr(model, "hf_quantizer"):
        raise ValueError(
            f"the base weights are quantised ({quantised[0] if quantised else 'as their checkpoint says'}), and FSDP cannot "
            "shard them; train with a copy on each device (accelerate launch --multi_gpu), or load a checkpoint in bfloat16"
        )
    places = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    spread = {weight for weight in weights if places[id(weight)] == 1 and weight.dim()}
    whole = {weight for weight in model.parameters() if weight not in spread}
    mesh = init_device_mesh(device.type, (processes.count,))
    for module in _groups(model, spread):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=whole)
    for weight in whole:
        # The parameter stays the object that optimizer and units know.
        weight.data = weight.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of a model are spread over processes."""
    return any(hasattr(weight, "to_local") for weight in model.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor: all of one that is not spread."""
    spread: Any = tensor
    return spread.to_local() if hasattr(spread, "to_local") else tensor


def gather(tensor: Tensor) -> Tensor:
    """A tensor in whole; to be called on all processes."""
    spread: Any = tensor
    return spread.full_tensor() if hasattr(spread, "full_tensor") else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module's own, not those of modules in it, are there in whole; on all processes."""
    spread = {name: weight for name, weight in module.named_parameters(recurse=False) if own_part(weight) is not weight}
    try:
        for name, weight in spread.items():
            setattr(module, name, nn.Parameter(gather(weight), requires_grad=False))
        yield
    finally:
        for name, weight in spread.items():
            setattr(module, name, weight)


def abandon_pass(model: nn.Module) -> None:
    """To be called after an exception has ended a forward or backward pass half-way, before there is another."""
    sharded: Any = model
    if hasattr(sharded, "reset_iter_state"):
        sharded.reset_iter_state()


class Gathering:
    """Which groups of a sharded model's weights are whole at the moment, for a ledger: no operator makes or frees them.

    FSDP's own books (torch 2.13, private); tests/test_sharding.py says when they have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for the groups; there are none before the model first runs, nor if it is not sharded."""
        sharded: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
        self._groups = [group for module in sharded for group in module._get_fsdp_state()._fsdp_param_groups]

    def __len__(self) -> int:
        return len(self._groups)

    def parts(self) -> list[Tensor]:
        """What this process keeps of the weights, as long as it has them."""
        return [weight._sharded_param_data for group in self._groups for weight in group.fsdp_params]

    def is_whole(self, group: int) -> bool:
        """Whether a group is."""
        return bool(self._groups[group].is_unsharded)

    def storages(self, group: int) -> list[torch.UntypedStorage]:
        """Where its whole weights lie; empty while it is not."""
        return [
            part.untyped_storage() for weight in self._groups[group].fsdp_params for part in weight.all_gather_outputs
        ]


def _groups(model: nn.Module, spread: Collection[nn.Parameter]) -> Iterator[nn.Module]:
    """The modules that are gathered as one, each after those inside it; the model itself is the last."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    left = set(spread)
    layers = [layer for name in lists for layer in model.get_submodule(name).children()]
    around = {name.rpartition(".")[0] for name in lists}
    around |= {name[:i] for name in around for i, letter in enumerate(name) if letter == "."}
    outwards = sorted(around - {""}, key=lambda name: -name.count("."))
    base: Any = model
    embeddings = [base.get_input_embeddings()] if hasattr(base, "get_input_embeddings") else []
    for module in [*layers, *embeddings, *map(model.get_submodule, outwards)]:
        inside = left & set(module.parameters())
        if inside:
            left -= inside
            yield module
    yield model

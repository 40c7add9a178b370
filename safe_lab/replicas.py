"""Copies of one model on several processes, and how they come to the same gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from safe_lab.processes import Processes
from safe_lab.sharding import is_sharded


@dataclass
class Traffic:
    """Bytes of gradients that a process gave into averages.

    Attributes:
        gradient_bytes: Over the run.
        first_step_bytes: In the first optimizer step.
        last_step_bytes: In the last one so far.
    """

    gradient_bytes: int = 0
    first_step_bytes: int = 0
    last_step_bytes: int = 0

    def add(self, step_bytes: int) -> None:
        """Book an optimizer step."""
        self.first_step_bytes = self.first_step_bytes if self.gradient_bytes else step_bytes
        self.gradient_bytes += step_bytes
        self.last_step_bytes = step_bytes


class Replicas:
    """Averages the gradients of what trains over the processes, and counts the bytes of it.

    Overlapped, PyTorch's DistributedDataParallel does it while the backward pass runs. It waits for the gradients of all that
    trained when it was made, and sends no others: it is made anew whenever something freezes (:meth:`wrap`; pytorch #22049).
    Otherwise they are averaged after it (:meth:`average`): a process that runs out of memory half-way can begin anew, since no
    other waits for it in the middle of its own backward pass, and a weight that a pass does not use may lack a gradient. So they
    are where the weights that do not train are spread over the processes (:mod:`safe_lab.sharding`).

    On one process there is nothing to do.

    Attributes:
        model: What the forward pass of training goes through; all else uses the model inside.
        traffic: What has gone between the processes.
    """

    def __init__(self, model: nn.Module, processes: Processes, *, overlapped: bool = True) -> None:
        """Bring the weights that train to those of process 0, and wrap the model.

        Args:
            model: On its device. What does not train must be the same on all processes already.
            processes: Those with a copy of the model.
            overlapped: While the backward pass runs; False: after it, by :meth:`average`.
        """
        self.model = self._inside = model
        self._processes = processes
        self._overlapped = overlapped and processes.count > 1 and not is_sharded(model)
        self.traffic = Traffic()
        self._sent = _Sent(processes.group)
        with torch.no_grad():
            for parameter in self._live if processes.count > 1 else ():
                # All others give zeros, which change no bit of it.
                parameter.copy_(processes.sum(parameter if processes.is_main else torch.zeros_like(parameter)))
        self.wrap()

    def wrap(self) -> None:
        """Begin anew with what trains now; on all processes at the same step.

        DDP lays its buckets out by the order of the first backward pass, and of three processes or more the sums are rounded by
        that layout: a run that is to have the bits of a resumed one begins anew where the other resumes.
        """
        if not self._overlapped:
            return
        # The old one's hooks go with it, and must have gone before there are new ones.
        self.model = self._inside
        if not self._live:
            return
        device = self._live[0].device
        self.model = DistributedDataParallel(
            self._inside,
            device_ids=None if device.type == "cpu" else [device],
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            # Copying all weights from process 0 once more would take longer than many steps.
            init_sync=False,
            process_group=self._processes.group,
        )
        self.model.register_comm_hook(self._sent, _all_reduce)

    def held_back(self) -> AbstractContextManager[Any]:
        """Inside, gradients add up on each process by itself."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    @torch.no_grad()
    def average(self) -> None:
        """After the last backward pass of a step: average what has not been yet; nothing if that was done in the pass."""
        if self._overlapped or self._processes.count == 1:
            return
        live = self._live
        if not live:
            return
        # Where a pass goes through some of the weights only, they may be others on each process.
        has_gradient = torch.tensor([float(p.grad is not None) for p in live], device=live[0].device)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter, used in zip(live, self._processes.sum(has_gradient).tolist(), strict=True):
            if used:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sent.num_bytes += flat.nbytes
            flat = self._processes.sum(flat / self._processes.count)
            for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def end_step(self) -> None:
        """Book what an optimizer step has sent."""
        self.traffic.add(self._sent.num_bytes)
        self._sent.num_bytes = 0

    def state_dict(self) -> dict[str, int]:
        """What has been counted."""
        return asdict(self.traffic)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`, with what is frozen frozen."""
        self.traffic = Traffic(**state)
        self.wrap()

    @property
    def _live(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._inside.parameters() if parameter.requires_grad]


@dataclass
class _Sent:
    """What the hook of DDP works with; no part of :class:`Replicas`, which the old DDP would keep alive, and itself with it."""

    group: Any
    num_bytes: int = 0


# DDP compares the annotations of a hook with types, and these would be strings (torch 2.13).
def _all_reduce(sent, bucket):  # type: ignore[no-untyped-def]
    sent.num_bytes += bucket.buffer().nbytes
    return allreduce_hook(sent.group, bucket)

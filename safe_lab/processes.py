"""The processes of one training: which of them this is, and what they tell each other.

It knows torch.distributed and nothing of who started the processes. What a process on its own asks of the others comes back as
it is, so that the same code runs on one and on many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# gloo's and NCCL's own words (torch 2.13).
_CONNECTION_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error", "Write error"),
    *("ncclRemoteError", "remote process exited", "NCCL communicator was aborted"),
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The processes that train one model, as one of them sees them.

    What exchanges something (every method but :meth:`of_job`) must be called by all of them, in the same order.

    Attributes:
        rank: Number of this process, from 0; process 0 writes, draws and decides.
        count: How many there are.
        device: Where tensors must lie to be exchanged; None: anywhere.
        group: Through which they talk; None: all processes of the job.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    group: Any = None

    @classmethod
    def of_job(cls, device: torch.device) -> Self:
        """Those of the default group of torch.distributed; this one alone where that was not set up.

        Args:
            device: The device of this process: NCCL exchanges what lies on it, and nothing else.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), None if device.type == "cpu" else device)

    def on_node(self, node: str) -> Processes:
        """Those on this machine, which share its disk.

        Args:
            node: The machine's name.
        """
        if self.count == 1:
            return self
        nodes = self.gather(node)
        ours = None
        # Every process has to take part in the making of every group, in the same order.
        for name in dict.fromkeys(nodes):
            members = [rank for rank, its_node in enumerate(nodes) if its_node == name]
            group = dist.new_group(members)
            if name == node:
                ours = Processes(members.index(self.rank), len(members), self.device, group)
        assert ours is not None
        return ours

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, the same bits on each; shape, dtype and device as given."""
        if self.count == 1:
            return tensor
        total = tensor.detach().to(self.device or tensor.device, copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def broadcast(self, value: Value) -> Value:
        """What process 0 gave: anything that can be pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.group, device=self.device)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """What each process gave, by rank: anything that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on at least one process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def largest(self, number: int) -> int:
        """The largest number that a process gave."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def in_step(self, items: Iterable[Value]) -> Iterator[Value | None]:
        """Each of the items, and None as long as another process has some left: on all processes as many times.

        So that something which all must do is done by all as often: what runs a sharded model.
        """
        for item in items:
            self.any(True)
            yield item
        while self.any(False):
            yield None

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)


ALONE = Processes()


def end_job() -> None:
    """Take leave of the other processes, at the end of all."""
    if not dist.is_available() or not dist.is_initialized():
        return
    try:
        # Whoever leaves while another is still about to may crash that one at its exit (gloo, torch 2.13: one job in four).
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    except RuntimeError as error:
        if not is_connection_lost(error):
            raise
    dist.destroy_process_group()


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more.

    >>> is_connection_lost(RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:2943"))
    True
    """
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CONNECTION_LOST)

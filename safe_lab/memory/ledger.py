"""The ledger of a step: which storages are live when, what they are for, and how many FLOPs were done.

One dispatch mode sees every operator of a forward, backward and optimizer step, on CPU, on CUDA, and on fake tensors that have
a shape and no memory: a prediction and a measurement are the same code over the same operators.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from safe_lab.sharding import Groups, own_part

KINDS = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary", "cache")
PHASES = ("forward", "backward")

_aten = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _cpu_attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch's table, told the shapes of an operator's own arguments and of its one result.

    Torch looks for tensors in whatever the arguments hold (2.13), which for a small product takes longer than the product.
    """
    plain = getattr(formula, "__wrapped__", None)
    if plain is None:
        return formula

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        if kwargs or not isinstance(out_val, Tensor) or any(isinstance(arg, list | tuple) for arg in args):
            return formula(*args, out_val=out_val, **kwargs)
        shapes = [arg.shape if isinstance(arg, Tensor) else arg for arg in args]
        found: int = plain(*shapes, out_shape=out_val.shape)
        return found

    return count


# FLOPs of an operator from its arguments and its result: torch's own table, and fused attention on CPU, which that leaves out
# (2.13).
_FLOPS: dict[Any, Callable[..., int]] = {
    operator: _of_shapes(formula) for operator, formula in flop_registry.items()
} | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}
# The same by the id of each operator seen so far: to hash an operator takes longer than a view.
_flops_by_id: dict[int, Callable[..., int] | None] = {}


@dataclass(frozen=True)
class Trace:
    """What a ledger saw between entering and leaving.

    Attributes:
        peak_bytes: Most bytes live after any operator.
        peak: Those bytes by kind: ``parameters``, ``buffers``, ``gradients`` (of parameters), ``optimizer`` (its state),
            ``activations`` (made outside the backward pass, or recomputed in it, and live when the backward pass goes on),
            ``cache`` (what is kept beside the model, as the caller says), ``temporary`` (the rest: results that die within
            their pass, gradients of activations, the batch).
        mean: Bytes by kind, averaged over the time that operators ran.
        held: Bytes by kind live on entering.
        left: Bytes by kind live on leaving.
        flops: Floating-point operations by phase, ``forward`` and ``backward`` (recomputation is in the latter); a
            multiply-add counts as two.
        seconds: Time that operators ran.
        seconds_by_phase: The same: ``forward``, ``backward``, and ``optimizer`` for what came after the backward pass.
    """

    peak_bytes: int
    peak: dict[str, int]
    mean: dict[str, float]
    held: dict[str, int]
    left: dict[str, int]
    flops: dict[str, int]
    seconds: float
    seconds_by_phase: dict[str, float] = field(default_factory=dict)

    @property
    def mean_bytes(self) -> float:
        """Live bytes averaged over the time that operators ran."""
        return sum(self.mean.values())

    @property
    def total_flops(self) -> int:
        """FLOPs of all phases."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Pace:
    """How long operators take, by the roofline model: as long as their FLOPs, or as the bytes they read and write.

    Only ratios of times mean anything: those of a device with so many FLOPs to a byte.

    Attributes:
        flops_per_byte: FLOPs that the device does in the time in which it moves a byte.
    """

    flops_per_byte: float

    def seconds(self, func: Any, flops: int, tensors: Any) -> float:
        """Time of an operator, in FLOPs; none of a view, which moves nothing."""
        if getattr(func, "is_view", False):
            return 0.0
        return max(flops, self.flops_per_byte * sum(tensor.nbytes for tensor in _tensors(tensors)))


@dataclass(eq=False, slots=True)
class _Storage:
    """A storage's life; times are numbers of operators done."""

    nbytes: int
    born: int
    region: int
    kind: str | None
    died: int | None = None

    def live_at(self, moment: int) -> bool:
        return self.born <= moment and (self.died is None or self.died >= moment)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the live storages and the FLOPs of what runs inside; :attr:`trace` tells, once left.

    A storage counts once, however many views it has, from the operator that made it until the last reference is gone. What
    an operator allocates and frees within itself, and what an allocator keeps back, is not seen.

    Example::

        with Ledger(model, optimizer) as ledger:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(ledger.trace.peak, ledger.trace.flops)
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        cache: Iterable[Tensor] = (),
        batch: Iterable[Tensor] = (),
        activations: Iterable[Tensor] = (),
        pace: Pace | None = None,
    ) -> None:
        """Prepare to trace.

        Args:
            model: Whose parameters, buffers and gradients are told apart.
            optimizer: Whose state is told apart.
            cache: Tensors that are kept beside the model.
            batch: Tensors made before entering that the step works on.
            activations: Tensors made before entering that it keeps for its backward pass (the output of a frozen prefix).
            pace: How long operators take that do not really run, on fake tensors; None: the time that passes.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        # Gathered once: to walk a model's modules takes as long as a hundred operators.
        self._parameters = list(model.parameters())
        self._buffers = list(model.buffers())
        self._optimizer = optimizer
        self._cache = tuple(cache)
        self._batch = tuple(batch)
        self._activations = tuple(activations)
        self._storages: list[_Storage] = []
        self._live: dict[int, tuple[weakref.ref[Any], _Storage]] = {}
        self._moment = 0
        self._region = 0
        self._region_state = 0
        self._region_ends: list[int] = []
        self._bytes = 0
        self._peak = (0, 0)
        # Time that operators ran, after each of them; the moment before the first is 0.
        self._clock: list[float] = [0.0]
        self._pace = pace
        self._seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self._flops = dict.fromkeys(PHASES, 0)
        self._trace: Trace | None = None
        self._hooks: list[Any] = []
        # Weights of a sharded model come and go without an operator; by group, the entry of those that are there.
        self._groups = Groups(model)
        self._whole_groups: list[_Storage | None] = [None] * len(self._groups)
        self._group_keys: set[int] = set()
        # On an accelerator, host tensors (Adam's counters) do not count, and an operator has run once the device is done.
        self._on_cuda = bool(self._parameters) and self._parameters[0].is_cuda

    @property
    def trace(self) -> Trace:
        """What was seen.

        Raises:
            RuntimeError: The ledger has not been left yet.
        """
        if self._trace is None:
            raise RuntimeError("a ledger tells its trace once it has been left")
        return self._trace

    def __enter__(self) -> Self:
        self._follow_groups()
        for kind, tensors in (
            ("parameters", [*self._groups.parts(), *self._parameters]),
            ("buffers", self._buffers),
            ("cache", self._cache),
            ("temporary", self._batch),
            ("activations", self._activations),
        ):
            self._name(tensors, kind)
        self._name_results()
        self._peak = (self._bytes, 0)
        if self._optimizer is not None:
            self._hooks = [
                self._optimizer.register_step_pre_hook(lambda *_: self._name_results()),
                self._optimizer.register_step_post_hook(lambda *_: self._name_results()),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._name_results()
        self._follow_groups()
        self._region_ends.append(self._moment)
        self._trace = self._summarize()
        self._live.clear()
        self._storages.clear()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and enter what it made."""
        kwargs = kwargs or {}
        if func is _DEVICE_OF:  # asked of fake tensors only, and no computation
            return func(*args, **kwargs)
        began = time.perf_counter()
        result = func(*args, **kwargs)
        if self._on_cuda:
            torch.cuda.synchronize(self._parameters[0].device)
        elapsed = time.perf_counter() - began
        self._moment += 1
        in_backward = torch._C._current_graph_task_id() != -1
        # Outside the backward pass, recomputing in it (which turns grad mode on), or in the backward pass itself.
        state = 1 + torch.is_grad_enabled() if in_backward else 0
        if state != self._region_state:
            self._region_ends.append(self._moment - 1)
            self._region, self._region_state = self._region + 1, state
        try:
            count = _flops_by_id[id(func)]
        except KeyError:
            count = _flops_by_id[id(func)] = _FLOPS.get(getattr(func, "_overloadpacket", func))
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        self._flops["backward" if in_backward else "forward"] += flops
        if self._pace is not None:
            elapsed = self._pace.seconds(func, flops, (args, result))
        self._clock.append(self._clock[-1] + elapsed)
        self._seconds["backward" if in_backward else "optimizer" if self._seconds["backward"] else "forward"] += elapsed
        if self._whole_groups:
            self._follow_groups()
        if isinstance(result, Tensor):
            self._enter_storage(result, None)
        else:
            for tensor in _tensors(result):
                self._enter_storage(tensor, None)
        if self._bytes > self._peak[0]:
            self._peak = (self._bytes, self._moment)
        return result

    def _enter_storage(self, tensor: Tensor, kind: str | None) -> None:
        """Enter the storage of a tensor, unless it is known; with ``kind``, say what it is for."""
        if self._on_cuda and not tensor.is_cuda:
            return
        try:
            storage = own_part(tensor).untyped_storage()
        except NotImplementedError:  # opaque and sparse tensors have none
            return
        key = storage._cdata
        if key in self._group_keys:
            return
        known = self._live.get(key)
        if known is not None:
            if kind is not None and known[1].kind is None:
                known[1].kind = kind
            return
        nbytes = storage.nbytes()
        entry = _Storage(nbytes, self._moment, -1 if self._region_state == 1 else self._region, kind)
        self._storages.append(entry)
        self._bytes += nbytes
        self._live[key] = weakref.ref(storage, lambda _: self._leave(key, entry)), entry

    def _leave(self, key: int, entry: _Storage) -> None:
        if self._trace is None:
            del self._live[key]
            self._bytes -= entry.nbytes
            entry.died = self._moment

    def _follow_groups(self) -> None:
        """Enter the groups of weights that are whole since the last operator, and leave those that are no longer."""
        for group, entry in enumerate(self._whole_groups):
            if self._groups.is_whole(group) == (entry is not None):
                continue
            if entry is not None:
                self._bytes -= entry.nbytes
                entry.died, self._whole_groups[group] = max(entry.born, self._moment - 1), None
                continue
            storages = self._groups.storages(group)
            for key in {storage._cdata for storage in storages} - self._group_keys:
                self._group_keys.add(key)
                if key in self._live:
                    # As it was made, the operators that made it gave it out for a result of theirs.
                    _, made = self._live.pop(key)
                    self._bytes -= made.nbytes
                    made.died = max(made.born, self._moment - 1)
            entry = _Storage(sum(storage.nbytes() for storage in storages), self._moment, -1, "parameters")
            self._storages.append(entry)
            self._whole_groups[group] = entry
            self._bytes += entry.nbytes

    def _name(self, tensors: Iterable[Tensor], kind: str) -> None:
        for tensor in tensors:
            self._enter_storage(tensor, kind)

    def _name_results(self) -> None:
        """Tell gradients and optimizer state from what else was made."""
        self._name((p.grad for p in self._parameters if p.grad is not None), "gradients")
        if self._optimizer is not None:
            self._name(
                (value for state in self._optimizer.state.values() for value in state.values() if _is_tensor(value)),
                "optimizer",
            )

    def _summarize(self) -> Trace:
        moments = self._moment
        total_seconds = self._clock[-1]
        peak, held, left = (dict.fromkeys(KINDS, 0) for _ in range(3))
        mean = dict.fromkeys(KINDS, 0.0)
        for entry in self._storages:
            kind = entry.kind or self._kind_of(entry)
            if entry.live_at(self._peak[1]):
                peak[kind] += entry.nbytes
            if entry.born == 0:
                held[kind] += entry.nbytes
            if entry.died is None:
                left[kind] += entry.nbytes
            # It lives from the operator that made it to the end of the last that ran while it lived.
            died = moments if entry.died is None else entry.died
            lived = self._clock[died] - self._clock[max(entry.born - 1, 0)]
            mean[kind] += entry.nbytes * (lived / total_seconds if total_seconds else 1.0)
        return Trace(self._peak[0], peak, mean, held, left, dict(self._flops), total_seconds, dict(self._seconds))

    def _kind_of(self, entry: _Storage) -> str:
        if entry.region < 0:
            return "temporary"
        last = self._region_ends[entry.region]
        outlives = entry.died is None or entry.died > last
        return "activations" if outlives and entry.region < len(self._region_ends) - 1 else "temporary"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _tensors(result: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples and lists."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, result))

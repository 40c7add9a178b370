"""What a step would cost: the model on fake tensors, which have a shape and a dtype and no memory.

The same :class:`~safe_lab.memory.ledger.Ledger` that measures a real step traces the fake one, over the same operators; so a
prediction is a measurement of a model that is not there. :class:`Rehearsal` works on real tensors just as well.

Where it differs from a run: the operators are those of the CPU, where kernels are less fused than on CUDA; loss scaling (mixed
precision fp16) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from safe_lab.memory.ledger import Ledger, Pace, Trace
from safe_lab.units import Unit

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer by a fake one on the CPU; what modules share stays shared.

    Args:
        model: Of any device, ``meta`` as a rule. Adapters must be attached already: PEFT fails on fake tensors (0.21).
        mode: What the model then runs under.
    """
    fakes: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            fakes[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return fakes[tensor]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)  # type: ignore[assignment]


class Rehearsal:
    """Steps of a run, traced with any units frozen and any number of rows, of any length, in a micro-batch.

    Attributes:
        model: The model.
        units: Its adapters.
        mode: What the model runs under.
        trained: Weights that train while nothing is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer,
        make_batch: Callable[[int, int], Mapping[str, Tensor]],
        *,
        tokens: int,
        mode: FakeTensorMode | None = None,
        mixed_precision: str = "none",
        max_grad_norm: float | None = 1.0,
    ) -> None:
        """Take a model as it stands before training, and make a first step, for there to be optimizer state.

        Args:
            model: With adapters; puts out ``loss``.
            units: Its adapters, in the order of execution.
            optimizer: Over what trains.
            make_batch: ``make_batch(rows, tokens)`` makes a micro-batch.
            tokens: Length of its rows where a trace does not say otherwise.
            mode: Of a fake model; None: the model is real.
            mixed_precision: ``none``, ``bf16`` or ``fp16``.
            max_grad_norm: Gradients are clipped to this norm; None: they are not.
        """
        self.model = model
        self.units = units
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        self.make_batch = make_batch
        self._tokens = tokens
        self.mode: AbstractContextManager[object] = mode or nullcontext()
        self._mixed_precision = mixed_precision
        self._max_grad_norm = max_grad_norm
        with self.mode:
            self._step(make_batch(1, tokens))
        self._state = dict(optimizer.state)
        self._evaluations: dict[tuple[int, int], Trace] = {}

    def trace(
        self,
        frozen: Collection[int],
        *,
        rows: int,
        tokens: int | None = None,
        accumulating: bool = False,
        hidden: Tensor | None = None,
        pace: Pace | None = None,
    ) -> Trace:
        """The ledger of a step's last micro-step and update, with optimizer state there as after the first step.

        Args:
            frozen: Indices of the units that are frozen, in the way the Freezer does it.
            rows: Examples in the micro-batch.
            tokens: Length of each; None: as configured.
            accumulating: Gradients of earlier micro-steps are there when it begins.
            hidden: Output of a frozen prefix, which the model has been made to start from.
            pace: How long operators take; None: the time that passes, which on fake tensors means nothing.
        """
        self.freeze(frozen)
        with self.mode:
            batch = self.make_batch(rows, tokens or self._tokens)
            if accumulating:
                for parameter in self._optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)
            kept = () if hidden is None else (hidden,)
            with Ledger(self.model, self._optimizer, batch=batch.values(), activations=kept, pace=pace) as ledger:
                self._step(batch)
        return ledger.trace

    def trace_evaluation(self, *, rows: int, tokens: int | None = None) -> Trace:
        """The ledger of a forward pass in evaluation mode, without a graph and beside the whole optimizer state.

        What is frozen changes nothing of it but that state, which only shrinks. So the trace is made with nothing frozen, once,
        and holds for all of a run.

        Args:
            rows: Examples in the batch.
            tokens: Length of each; None: as configured.
        """
        shape = (rows, tokens or self._tokens)
        if shape not in self._evaluations:
            self.freeze(())
            self.model.eval()
            with self.mode:
                batch = self.make_batch(*shape)
                with Ledger(self.model, self._optimizer, batch=batch.values()) as ledger, torch.no_grad():
                    self.compute_loss(batch)
            self._evaluations[shape] = ledger.trace
        return self._evaluations[shape]

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes activations: gradient checkpointing."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    @property
    def num_trainable(self) -> int:
        """Weights that train, as the last trace left it."""
        return sum(parameter.numel() for parameter in self.trained if parameter.requires_grad)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state, as the last trace left it."""
        return count_bytes(tensor for state in self._optimizer.state.values() for tensor in state.values())

    def _step(self, batch: Mapping[str, Tensor]) -> None:
        self.model.train()
        self.compute_loss(batch).backward()  # type: ignore[no-untyped-call]
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def compute_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, in the precision of the run."""
        dtype = AUTOCAST.get(self._mixed_precision)
        # As Accelerate does it: autocast around the forward pass alone, and float32 after it.
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss: Tensor = self.model(**batch).loss
        return loss.float() if dtype else loss

    def freeze(self, frozen: Collection[int]) -> None:
        """Freeze these units and no others, in the way the Freezer does it."""
        # A weight that several units share freezes with the last of them.
        live = {id(p) for i, unit in enumerate(self.units) if i not in frozen for p in unit.parameters.values()}
        held = {id(p) for i in frozen for p in self.units[i].parameters.values()} - live
        for parameter in self.trained:
            parameter.requires_grad = id(parameter) not in held
        self._optimizer.state.clear()
        self._optimizer.state.update({p: state for p, state in self._state.items() if id(p) not in held})


def make_full_batch(rows: int, *, tokens: int, num_labels: int, vocabulary: int) -> dict[str, Tensor]:
    """A micro-batch as large as it can be: every row has ``tokens`` tokens, and each but the first of several one of padding.

    So the padding mask is one that masks. Of a fake mask transformers cannot see what it masks, and never skips it, as it
    never can for a batch that is really padded (``masking_utils._ignore_causal_mask_sdpa``, 5.23). Of a batch without any
    padding sdpa needs no mask, and a little less memory.

    Args:
        rows: Examples.
        tokens: Length of each.
        num_labels: Number of classes; 1: regression.
        vocabulary: Number of different tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` (rows, tokens), int64; ``labels`` (rows,), int64 or float32.
    """
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[min(1, rows - 1) :, -1:] = 0
    return {
        "input_ids": torch.randint(vocabulary, (rows, tokens)),
        "attention_mask": mask,
        "labels": torch.rand(rows) if num_labels == 1 else torch.randint(num_labels, (rows,)),
    }


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.nbytes for tensor in tensors)

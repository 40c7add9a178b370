"""What an importance metric is given: model, units, probe batches, and how to get losses and gradients from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safe_lab.processes import ALONE, Processes
from safe_lab.units import Unit

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, eq=False)
class Probe:
    """The arguments of every metric.

    Attributes:
        model: The model, in evaluation mode while a metric runs.
        units: The units to score.
        batches: The probe, fixed for the whole run: mappings of tensors whose first dimension is the example. Where
            there is an ``attention_mask`` of shape (batch, tokens), tokens with 0 count as padding.
        loss_function: ``loss_function(model, batch)`` returns the mean loss over the batch's examples, a scalar with
            graph.
        optimizer: The optimizer that trains the units; read by metrics that use its statistics.
        seed: Seed of the run, for metrics that draw.
        scoring: How many scorings came before this one.
        reference: What the metric's ``prepare`` returned.
        reference_is_current: Before training the model as it stands is the pre-trained function, while switching the
            adapters off is not: PiSSA and others that change the base weights on attaching. Read by ``prepare`` only.
        memory: The metric's own state from one scoring to the next: tensors and plain values by name. It is saved
            with the freezing state.
        processes: Who computes it together: each has its share of every batch's examples (:func:`share_of`), perhaps none
            of some, and sums over examples are summed over the processes.

    Raises:
        ValueError: There is no batch.
    """

    model: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Batch]
    loss_function: LossFunction
    optimizer: torch.optim.Optimizer | None = None
    seed: int = 0
    scoring: int = 0
    reference: Any = None
    reference_is_current: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("the probe has no batches: give it at least one example of the training split")

    def count_examples(self) -> int:
        """Number of examples in the whole probe."""
        return int(self.processes.sum(torch.tensor(sum(map(count_examples, self.batches)))))


def count_examples(batch: Batch) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))


def share_of(batch: Batch, processes: Processes) -> Batch:
    """The examples of a batch that fall to this process: every ``processes.count``-th."""
    return {name: tensor[processes.rank :: processes.count] for name, tensor in batch.items()}


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if that is wider: sums over half-precision values need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mean_loss(probe: Probe) -> float:
    """Mean loss over the probe's examples, without a graph."""
    total = 0.0
    with torch.no_grad():
        for batch in probe.batches:
            if count_examples(batch):
                total += count_examples(batch) * probe.loss_function(probe.model, batch).item()
    return float(probe.processes.sum(torch.tensor(total, dtype=torch.float64))) / probe.count_examples()


@contextmanager
def differentiable(units: Sequence[Unit]) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach every parameter of ``units``, frozen ones too; on leaving, ``requires_grad`` is what it was.

    Yields:
        The parameters, each once.
    """
    parameters = list(dict.fromkeys(parameter for unit in units for parameter in unit.parameters.values()))
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def batch_gradients(probe: Probe, parameters: Sequence[nn.Parameter], batch: Batch) -> list[Tensor]:
    """Gradient of the mean loss over ``batch``, in float32 or better; ``grad`` of the parameters is left alone.

    Args:
        probe: Where model and loss come from.
        parameters: What to differentiate by; those the loss does not depend on get zeros, and so do all where ``batch`` is
            empty.
        batch: One batch, not necessarily one of the probe's.

    Raises:
        ValueError: The loss has no graph.
    """
    if not count_examples(batch):
        return [torch.zeros_like(widened(parameter.detach())) for parameter in parameters]
    with torch.enable_grad():
        loss = probe.loss_function(probe.model, batch)
        if not loss.requires_grad:
            raise ValueError(
                "loss_function must return a loss with a graph, got one without: take torch.no_grad() out of it"
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [widened(gradient) for gradient in gradients]


def probe_gradients(probe: Probe) -> list[dict[str, Tensor]]:
    r"""Gradient of the mean loss over all examples of the probe.

    .. math:: g = \frac{1}{\sum_b n_b} \sum_b n_b \nabla_\theta L_b

    with n_b the number of examples in batch b, so that a smaller last batch weighs what it should.

    Returns:
        For each of ``probe.units``, parameter name -> gradient, shaped as the parameter.
    """
    num_examples = probe.count_examples()
    with differentiable(probe.units) as parameters:
        totals = [torch.zeros_like(widened(parameter.detach())) for parameter in parameters]
        for batch in probe.batches:
            for total, gradient in zip(totals, batch_gradients(probe, parameters, batch), strict=True):
                total.add_(gradient, alpha=count_examples(batch) / num_examples)
    by_parameter = dict(zip(parameters, map(probe.processes.sum, totals), strict=True))
    return [{name: by_parameter[parameter] for name, parameter in unit.parameters.items()} for unit in probe.units]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode and leave no trace.

    On leaving, also through an exception, train mode of every module, ``requires_grad`` and ``grad`` of every
    parameter and the random streams of Python, NumPy and torch (CPU and every CUDA device) are what they were on
    entering. Inside, ``grad`` is None.
    """
    # The flag is set and not eval() called: some adapter layers (loralib's) merge their weights in train() and eval().
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Asking for CUDA's streams would start CUDA; where it has not started nothing can draw from them.
    cuda_has_started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_devices = range(torch.cuda.device_count()) if cuda_has_started else ()
    with torch.random.fork_rng(devices=list(cuda_devices), device_type="cuda"):
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            random.setstate(python_state)
            np.random.set_state(numpy_state)

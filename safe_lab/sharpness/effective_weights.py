r"""Curvature by the weights that adapters act on, whatever they are made of: the trace that no rescaling of factors can move.

LoRA's update :math:`s B A` stays as it is under :math:`B \to B M, A \to M^{-1} A`, while the Hessian by A and B does not. An
adapted layer computes :math:`y = W x` with an effective weight W (base and update); by that the curvature is one of the function
alone, the same for every way to write W.

Legend: n examples in a batch, T tokens, I inputs and O outputs of a layer, C outputs of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Batch, count_examples, share_of
from safe_lab.processes import ALONE, Processes
from safe_lab.sharpness.surface import logits

log = logging.getLogger(__name__)


def effective_weight_traces(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    roots: Callable[[Tensor], Tensor],
    *,
    outputs: Callable[[nn.Module, Batch], Tensor] = logits,
    processes: Processes = ALONE,
) -> dict[str, float]:
    r"""Trace of the Gauss-Newton matrix by the effective weight of each layer; exact.

    .. math:: \mathrm{tr}\, G_W = \frac{1}{N} \sum_x \sum_c \Bigl\| \sum_t \delta_{xct}\, a_{xt}^\top \Bigr\|_F^2
        = \frac{1}{N} \sum_x \sum_c \sum_{t, t'} (\delta_{xct} \cdot \delta_{xct'}) (a_{xt} \cdot a_{xt'})

    with :math:`a_{xt}` the layer's input for token t of example x, and :math:`\delta_{xct}` the gradient, by the layer's output,
    of the model's outputs times column c of the root of the loss's own Hessian. The right-hand side never builds a gradient of
    W's size; it takes C backward passes.

    Invariant to every change of the adapter's own weights that leaves W as it is: to LoRA's rescaling, to rotations of its
    factors, to folding. Not invariant to rescaling W against another layer's weight, which LoRA cannot do exactly and IA3 can
    (queries against keys).

    Source: Gauss-Newton as in Martens (JMLR 2020); norms of single examples' gradients by the tokens' inner products:
    Goodfellow (2015), Li et al. (ICLR 2022), section 4.

    Args:
        model: The model, inside :func:`~safe_lab.sharpness.differentiable.twice_differentiable`.
        batches: Mappings of tensors whose first dimension is the example; the same on all processes.
        layers: Layers by name that compute an affine function of their input (n, T, I) or (n, I).
        roots: Of the loss's curvature by the outputs: see :class:`~safe_lab.sharpness.output_curvature.OutputCurvature`.
        outputs: What of the model the loss is a function of (n, C).
        processes: Who computes it together.

    Returns:
        The trace by name of the layer; 0 for one that does not run. A layer whose input does not have the examples for its first
        dimension is left out, with a warning.
    """
    mixing = _layers_that_mix(model, batches[0], layers, outputs)
    if mixing:
        log.warning(
            "effective weights: %d layers do not keep examples apart and are left out, %s among them",
            len(mixing),
            mixing[0],
        )
        layers = {name: layer for name, layer in layers.items() if name not in mixing}
    num_examples = sum(map(count_examples, batches))
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for batch in batches:
        share = share_of(batch, processes)
        if not count_examples(share):
            continue
        with _recorded(layers) as passes, torch.enable_grad():
            outputs_nC = outputs(model, share)
        if not passes:
            continue
        for column_nC in roots(outputs_nC.detach()):
            deltas = torch.autograd.grad(
                outputs_nC, [output for _, _, output in passes], column_nC, retain_graph=True, allow_unused=True
            )
            # A layer that runs twice has one weight, whose gradient is the sum over its passes.
            tokens: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for (index, inputs, _), delta in zip(passes, deltas, strict=True):
                if delta is not None:
                    tokens.setdefault(index, []).append((_by_token(inputs), _by_token(delta)))
            for index, pairs in tokens.items():
                a_nTI, delta_nTO = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
                totals[index] += _squared_norms(a_nTI, delta_nTO) / num_examples
    return dict(zip(layers, processes.sum(totals).tolist(), strict=True))


def _layers_that_mix(
    model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module], outputs: Callable[[nn.Module, Batch], Tensor]
) -> list[str]:
    """Names of the layers that run on anything but a row for each example: DeBERTa's also on its table of relative positions."""
    # Three of them, as a table of one row is not one of two examples, and one of two heads not one of three.
    three = {name: tensor[:1].repeat_interleave(3, 0) for name, tensor in batch.items()}
    with _recorded(layers) as passes, torch.no_grad():
        outputs(model, three)
    names = list(layers)
    return sorted({names[index] for index, inputs, _ in passes if inputs.ndim < 2 or len(inputs) != 3}, key=names.index)


def _by_token(tensor: Tensor) -> Tensor:
    """(n, ..., features) -> (n, T, features)."""
    return tensor.flatten(1, -2) if tensor.ndim > 2 else tensor[:, None]


def _squared_norms(a_nTI: Tensor, delta_nTO: Tensor) -> float:
    """Sum over examples of the squared norm of the gradient of a layer's weight."""
    return float(((a_nTI @ a_nTI.mT) * (delta_nTO @ delta_nTO.mT)).sum(dtype=torch.float64))


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Inside, each pass of a layer leaves its number, input and output."""
    passes: list[tuple[int, Tensor, Tensor]] = []

    def record(index: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            # Below the first adapter that trains nothing would have a gradient.
            output = output if output.requires_grad else output.requires_grad_(True)
            passes.append((index, inputs[0].detach(), output))
            return output

        return hook

    hooks = [layer.register_forward_hook(record(index)) for index, layer in enumerate(layers.values())]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()

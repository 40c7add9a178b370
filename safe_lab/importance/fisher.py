"""Empirical Fisher information: how much the loss of single examples depends on a unit's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Probe, batch_gradients, count_examples, differentiable, widened


def score(probe: Probe, *, source: str = "probe", weighted: bool = False) -> list[float]:
    r"""Mean over the unit's weights of the diagonal of the empirical Fisher matrix.

    .. math:: \hat F(\theta) = \frac{1}{N} \sum_{i=1}^{N} \Bigl(\frac{\partial L_i}{\partial \theta}\Bigr)^2

    over the N examples of the probe, each with its own gradient; ``weighted``: of :math:`\hat F(\theta)\,\theta^2`, the
    second-order estimate of what removing the weight costs.

    With ``source="adam"`` :math:`\hat F = v / (1 - \beta_2^t)`, Adam's second moment without its bias. It costs no
    pass, but is a moving average of squared gradients of whole training batches, after clipping: smaller than the
    above by up to the batch size, and not to be compared with it in value.

    Source: Kunstner et al., Limitations of the Empirical Fisher Approximation, NeurIPS 2019; weighted: Theis et al.,
    Faster Gaze Prediction with Dense Networks and Fisher Pruning, 2018 (there halved); v: Kingma and Ba, ICLR 2015,
    algorithm 1.

    Args:
        probe: With ``probe.optimizer`` for ``source="adam"``.
        source: ``probe``: one backward pass for each example. ``adam``: the optimizer's state.
        weighted: Multiply by the squared weight.

    Returns:
        One score for each of ``probe.units``.

    Raises:
        ValueError: With ``source="adam"``, the optimizer has no second moment of a parameter.
    """
    if source == "adam":
        return [
            sum(
                _total(second_moment(probe.optimizer, parameter, name), parameter, weighted=weighted).item()
                for name, parameter in unit.parameters.items()
            )
            / unit.num_parameters
            for unit in probe.units
        ]
    num_examples = probe.count_examples()
    with differentiable(probe.units) as parameters:
        totals = {parameter: widened(parameter.detach()).new_zeros(()) for parameter in parameters}
        for batch in probe.batches:
            for i in range(count_examples(batch)):
                example = {name: tensor[i : i + 1] for name, tensor in batch.items()}
                for parameter, gradient in zip(parameters, batch_gradients(probe, parameters, example), strict=True):
                    totals[parameter] = totals[parameter] + _total(gradient.square(), parameter, weighted=weighted)
    summed = probe.processes.sum(torch.stack(list(totals.values()))).tolist()
    by_parameter = dict(zip(totals, summed, strict=True))
    return [
        sum(by_parameter[parameter] for parameter in unit.parameters.values()) / (num_examples * unit.num_parameters)
        for unit in probe.units
    ]


def _total(fisher: Tensor, parameter: nn.Parameter, *, weighted: bool) -> Tensor:
    return (fisher * widened(parameter.detach()).square() if weighted else fisher).sum()


def second_moment(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, name: str) -> Tensor:
    r"""Adam's second moment without its bias, :math:`v / (1 - \beta_2^t)`.

    Args:
        optimizer: An optimizer, or Accelerate's wrapper of one.
        parameter: The parameter v belongs to.
        name: The parameter's name, for messages.

    Returns:
        Shaped as the parameter, in float32 or better.

    Raises:
        ValueError: There is no optimizer, it keeps no second moment, or it has never stepped this parameter.
    """
    if optimizer is None:
        raise ValueError("fisher with source: adam reads the optimizer: give Probe.optimizer, or set source: probe")
    groups = [group for group in optimizer.param_groups if any(member is parameter for member in group["params"])]
    betas = groups[0].get("betas") if groups else None
    # state is a defaultdict: indexing it would leave an empty entry behind.
    state = optimizer.state.get(parameter, {})
    if betas is not None and not state:
        raise ValueError(
            f"fisher with source: adam has nothing to read: {name} was never stepped; train first, or set source: probe"
        )
    if betas is None or "exp_avg_sq" not in state:
        raise ValueError(
            f"fisher with source: adam needs the second moment of {name}, and {type(optimizer).__name__} keeps none: "
            "train with torch.optim.AdamW, or set source: probe"
        )
    return widened(state["exp_avg_sq"]) / (1 - math.pow(betas[1], state["step"]))

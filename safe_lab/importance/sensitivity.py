"""Gradient sensitivity: the first-order change of the loss if a weight were set to zero."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Probe, batch_gradients, count_examples, differentiable, probe_gradients, widened


def score(probe: Probe, *, smoothing: bool = False, beta1: float = 0.85, beta2: float = 0.85) -> list[float]:
    r"""Mean over the unit's weights of the sensitivity.

    .. math:: I(\theta) = |\theta \, \partial L / \partial \theta|

    with L the mean loss over the probe. With ``smoothing`` each probe batch t is one step of

    .. math::
        \bar I_t &= \beta_1 \bar I_{t-1} + (1 - \beta_1) I_t \\
        \bar U_t &= \beta_2 \bar U_{t-1} + (1 - \beta_2) |I_t - \bar I_t| \\
        s_t &= \bar I_t \cdot \bar U_t

    from 0, and the score is the mean of s after the last batch; the averages go on from one scoring to the next.

    Source: AdaLoRA (Zhang et al., ICLR 2023), eqs. 8-11. Deviation: gradients of probe batches, not of training
    batches.

    Args:
        probe: With ``smoothing``, ``probe.memory`` keeps the averages as ``importance/<parameter>``,
            ``uncertainty/<parameter>``.
        smoothing: Average as above.
        beta1: Decay of I-bar, in (0, 1); smoothing only.
        beta2: Decay of U-bar, in (0, 1); smoothing only.

    Returns:
        One score for each of ``probe.units``.

    Raises:
        ValueError: With ``smoothing``, two parameters have one name.
    """
    if smoothing:
        return _smoothed(probe, beta1=beta1, beta2=beta2)
    return [
        sum((widened(p.detach()) * gradients[name]).abs().sum().item() for name, p in unit.parameters.items())
        / unit.num_parameters
        for unit, gradients in zip(probe.units, probe_gradients(probe), strict=True)
    ]


def _smoothed(probe: Probe, *, beta1: float, beta2: float) -> list[float]:
    names = _names(probe)
    with differentiable(probe.units) as parameters:
        for batch in probe.batches:
            # The averages go from batch to batch, so that each is summed by itself.
            num_here = torch.tensor(count_examples(batch))
            weight = int(num_here) / int(probe.processes.sum(num_here))
            for parameter, part in zip(parameters, batch_gradients(probe, parameters, batch), strict=True):
                gradient = part if probe.processes.count == 1 else probe.processes.sum(part * weight)
                sensitivity = (widened(parameter.detach()) * gradient).abs()
                importance = _average(probe, f"importance/{names[parameter]}", sensitivity, decay=beta1)
                _average(probe, f"uncertainty/{names[parameter]}", (sensitivity - importance).abs(), decay=beta2)

    def total(parameter: nn.Parameter) -> float:
        name = names[parameter]
        product: Tensor = probe.memory[f"importance/{name}"] * probe.memory[f"uncertainty/{name}"]
        return product.sum().item()

    return [sum(map(total, unit.parameters.values())) / unit.num_parameters for unit in probe.units]


def _names(probe: Probe) -> dict[nn.Parameter, str]:
    names: dict[nn.Parameter, str] = {}
    for unit in probe.units:
        for name, parameter in unit.parameters.items():
            names.setdefault(parameter, name)
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(f"smoothing tells parameters apart by name, got several of the name {twice[0]}: qualify them")
    return names


def _average(probe: Probe, key: str, value: Tensor, *, decay: float) -> Tensor:
    # A memory loaded from a checkpoint may lie on another device.
    previous = probe.memory.get(key, torch.zeros_like(value)).to(value.device)
    average: Tensor = decay * previous + (1 - decay) * value
    probe.memory[key] = average
    return average

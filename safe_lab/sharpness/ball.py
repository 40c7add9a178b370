"""Sharpness around where the weights stand: how much the loss rises in a ball, and in random directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_lab.sharpness.estimate import Estimate
from safe_lab.sharpness.surface import Surface


def ball_sharpness(surface: Surface, radius: float, *, adaptive: bool = False, num_steps: int = 5) -> float:
    r"""Largest rise of the loss that is found in a ball.

    .. math:: \max_{\|T^{-1} \epsilon\|_2 \le \rho} L(\theta + \epsilon) - L(\theta)

    with T = 1 (SAM), or T = diag(|theta|) (adaptive SAM), whose ball stretches with the weights. The first step is SAM's,
    :math:`\epsilon = \rho\, T^2 \nabla L / \|T \nabla L\|`; further ones do the same with the gradient at the place that was
    reached, and the highest counts, so that it is a lower bound that more steps can only raise.

    The adaptive one is invariant to B -> cB, A -> A/c in LoRA, and to any other rescaling weight by weight that leaves the
    function as it is; the plain one is not.

    Source: Foret et al. (ICLR 2021), eq. 2; Kwon et al., ASAM (ICML 2021), eq. 3 and 4.

    Args:
        surface: The loss.
        radius: :math:`\rho`, in the units of the weights, or, adaptive, as a share of them.
        adaptive: Which ball.
        num_steps: Gradients to take.

    Returns:
        The rise; 0 where the gradient vanishes.
    """
    start_D = surface.space.position()
    stretch_D = start_D.abs() if adaptive else torch.ones_like(start_D)
    at_start, highest = surface.loss(), -math.inf
    position_D = start_D
    for _ in range(num_steps):
        with surface.space.moved_to(position_D):
            along_D = stretch_D * surface.gradient()
        length = float(along_D.double().norm())
        if not math.isfinite(length) or length == 0.0:
            break
        position_D = start_D + radius / length * stretch_D * along_D
        highest = max(highest, _rise(surface, position_D, at_start))
    return max(highest, 0.0)


def average_sharpness(
    surface: Surface,
    deviation: float,
    *,
    generator: torch.Generator,
    adaptive: bool = False,
    num_directions: int = 8,
) -> Estimate:
    r"""Mean rise of the loss under Gaussian noise on the weights.

    .. math:: E_{z \sim \mathcal{N}(0, I)}\, L(\theta + \sigma T z) - L(\theta) \approx \frac{\sigma^2}{2} \mathrm{tr}(T H T)

    with T as in :func:`ball_sharpness`, and as invariant. Each direction is taken both ways, which cancels the slope.

    Source: Keskar et al. (ICLR 2017), in the mean; Andriushchenko et al. (ICML 2023), eq. 2.

    Args:
        surface: The loss.
        deviation: :math:`\sigma`, in the units of the weights, or, adaptive, as a share of them.
        generator: Of the directions, on the CPU.
        adaptive: Which noise.
        num_directions: Pairs of losses to take.

    Returns:
        Mean and standard error over the pairs; infinite where a loss is not finite.
    """
    start_D = surface.space.position()
    stretch_D = start_D.abs() if adaptive else torch.ones_like(start_D)
    at_start = surface.loss()
    rises = []
    for _ in range(num_directions):
        z_D = torch.randn(len(start_D), generator=generator, dtype=torch.float64).to(start_D)
        step_D = deviation * stretch_D * z_D
        rises.append((_rise(surface, start_D + step_D, at_start) + _rise(surface, start_D - step_D, at_start)) / 2)
    samples: Tensor = torch.tensor(rises, dtype=torch.float64)
    error = float(samples.std()) / math.sqrt(len(rises)) if len(rises) > 1 else math.nan
    return Estimate(float(samples.mean()), error)


def _rise(surface: Surface, position_D: Tensor, from_loss: float) -> float:
    loss = surface.loss_at(position_D)
    return math.inf if math.isnan(loss) else loss - from_loss

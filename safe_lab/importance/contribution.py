"""Task contribution: what the loss says when one adapter is taken away."""

from __future__ import annotations

from safe_lab.importance.probe import Probe, mean_loss
from safe_lab.units import switched_off


def score(probe: Probe) -> list[float]:
    r"""Rise of the probe loss with that one unit switched off.

    .. math:: \mathrm{Imp}(A_i) = L(\theta \setminus A_i) - L(\theta)

    with L the mean loss over the probe's examples. Negative where the unit does harm. One forward pass of the probe
    for each unit, and one more.

    Source: leave-one-out ablation; the target that first-order sensitivity estimates (Molchanov et al., ICLR
    2017). Deviation: with its sign, not its absolute value, as a unit that does harm need not be kept.

    Args:
        probe: Units that can be switched off.

    Returns:
        One score for each of ``probe.units``.

    Raises:
        ValueError: A unit cannot be switched off.
    """
    loss = mean_loss(probe)
    scores = []
    for unit in probe.units:
        with switched_off([unit]):
            scores.append(mean_loss(probe) - loss)
    return scores

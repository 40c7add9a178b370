r"""When freezing begins and how fast the threshold rises: pure functions of the scoring's number.

Time is counted in scorings, t = 1, 2, ...: one after each interval (an epoch, or N steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Curve:
    """One row of :data:`CURVES`: how a ramp rises from 0 to 1.

    Attributes:
        summary: One line for ``--help``.
        rise: ``rise(x, stairs)`` for x in [0, 1): the share of the final value reached, non-decreasing in x.
    """

    summary: str
    rise: Callable[[float, int], float]


CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "cubic": Curve("fast at first, 1 - (1 - x)^3", lambda x, stairs: 1 - (1 - x) ** 3),
        "linear": Curve("evenly, x", lambda x, stairs: x),
        "step": Curve("in equal stairs, floor(stairs * x) / stairs", lambda x, stairs: math.floor(stairs * x) / stairs),
        "constant": Curve("at once, at t_w", lambda x, stairs: 1.0),
    }
)


def threshold(t: int, *, start: int | None, end: int, final: float, curve: str = "cubic", stairs: int = 4) -> float:
    r"""Freezing threshold at scoring ``t``.

    .. math:: \tau_t = \tau_T \bigl(1 - (1 - \tfrac{t - t_w}{t_f - t_w})^3\bigr)

    for the cubic curve; 0 before ``start`` (t_w), ``final`` (tau_T) from ``end`` (t_f) on. With ``start=None`` warm-up has not
    ended and the threshold is 0; a warm-up that ends after t_f goes to ``final`` at once.
    Source: SAFE, NAACL 2025, section on freezing. Reconstruction: the mirror of AdaLoRA's budget (ICLR 2023, eq. 12); the
    linear, step and constant curves are ours.

    Args:
        t: Number of the scoring, from 1.
        start: t_w, the end of warm-up, in scorings.
        end: t_f, in scorings.
        final: tau_T, in units of the (normalised) score.
        curve: A name in :data:`CURVES`.
        stairs: Number of rises of the step curve.

    >>> [round(threshold(t, start=1, end=3, final=0.4), 3) for t in range(5)]
    [0.0, 0.0, 0.35, 0.4, 0.4]
    """
    if start is None or t < start:
        return 0.0
    if t >= end:
        return final
    return final * CURVES[curve].rise((t - start) / (end - start), stairs)


def is_settled(previous: Sequence[float], current: Sequence[float], *, share: float) -> bool:
    r"""Whether no score changed by more than ``share`` of itself between two scorings.

    .. math:: |s_i^{(t)} - s_i^{(t-1)}| \le \text{share} \cdot \max\bigl(|s_i^{(t-1)}|,\ 10^{-2} \max_j |s_j^{(t-1)}|\bigr)

    Reconstruction: the paper ends warm-up once importance settles, without a rule that we could read. The floor of one
    hundredth of the largest score is ours: scores span orders of magnitude, and the noise of the smallest would otherwise keep
    warm-up going for ever.

    Args:
        previous: Scores at the scoring before, by unit.
        current: Scores now, by unit.
        share: Largest relative change that counts as settled.

    >>> is_settled([0.5, 0.1], [0.51, 0.101], share=0.05), is_settled([0.5, 0.1], [0.6, 0.1], share=0.05)
    (True, False)
    """
    floor = 0.01 * max((abs(score) for score in previous), default=0.0)
    return all(abs(new - old) <= share * max(abs(old), floor) for old, new in zip(previous, current, strict=True))

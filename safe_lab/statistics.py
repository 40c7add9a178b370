r"""Whether one way of training differs from another, from few seeds: paired differences, their interval, p and effect size.

Everything here is about differences d_1 .. d_n between two variants that share seed i, and with it data order and initial
weights, so that what a seed does to both falls out. n is small, five or ten, and that is what shapes the choices:

- The *interval* of the mean difference is the BCa bootstrap's (Efron, "Better bootstrap confidence intervals", JASA 1987), its
  ends widened as Hesterberg does for small samples ("What teachers should know about the bootstrap", The American Statistician
  2015): at ten seeds the plain one covers 91 % where 95 % is said. Below eight seeds resampling has too little to draw from,
  whatever the correction, and it is Student's t.
- *p* is of the exact sign-flip permutation test, or Wilcoxon's signed ranks. With n seeds there are 2^n ways to put the signs,
  so that p cannot come below 2 / 2^n however large the difference: :func:`smallest_p`, which a reader must know before taking
  a large p for "no difference".
- p of several comparisons are corrected by Holm's step-down method (Scandinavian Journal of Statistics 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Test = Literal["permutation", "wilcoxon"]
Alternative = Literal["two-sided", "greater"]

# Fewer values are too few to resample.
FEWEST_FOR_BOOTSTRAP = 8
_RESAMPLES = 9999
# Up to here all ways to put the signs are walked; beyond, so many are drawn.
_MOST_EXACT = 14
_SEED = 0
# What differs by less, as a share, differs by rounding.
_SAME = 1e-9
# Resamples that must lie beyond an end of an interval for it to be told by them.
_FEWEST_BEYOND = 20
# Beyond this number of seeds an estimate of how many are needed only says "far more".
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: Lower end.
        high: Upper end.
        confidence: Share of such intervals that hold the true value.
        method: ``BCa`` (with widened ends), ``t``, or ``all alike`` where every value is the same.
    """

    low: float
    high: float
    confidence: float
    method: Literal["BCa", "t", "all alike"]


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of a single value.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0])
    (1.0, None)
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Interval of the mean that values are a sample of; None for a single value.

    Args:
        values: [n], finite.
        confidence: In (0, 1).

    Raises:
        ValueError: One is not finite: a seed without a figure is to be left out.

    >>> found = mean_interval([0.1, 0.2, 0.3])
    >>> found.method, round(found.low, 3), round(found.high, 3)
    ('t', -0.048, 0.448)
    """
    x = _finite(values)
    if len(x) < 2:
        return None
    if _are_alike(x):
        return Interval(float(x[0]), float(x[0]), confidence, "all alike")
    if len(x) >= FEWEST_FOR_BOOTSTRAP:
        ends = _bootstrap(x, confidence)
        if ends is not None and all(map(math.isfinite, ends)):
            return Interval(*ends, confidence, "BCa")
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    mean = float(x.mean())
    return Interval(mean - half, mean + half, confidence, "t")


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{list(values)}: only finite values have a mean; leave seeds without a figure out")
    return x


def _bootstrap(x: np.ndarray, confidence: float) -> tuple[float, float] | None:
    r"""BCa with tails of :math:`\Phi(-\sqrt{n / (n - 1)}\, t_{1 - \alpha / 2, n - 1})` instead of alpha / 2 (Hesterberg 2015)."""
    n = len(x)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    if tail * _RESAMPLES < _FEWEST_BEYOND:
        return None
    found = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=1 - 2 * tail,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(_SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def p_value(
    differences: Sequence[float], *, test: Test = "permutation", alternative: Alternative = "two-sided"
) -> float | None:
    """Probability of differences as far from zero as these, were their signs a matter of chance; None for a single one.

    Args:
        differences: [n], finite, of two variants with the same seed.
        test: ``permutation`` flips signs and goes by the mean: exact up to 14 seeds, 9,999 draws beyond. ``wilcoxon`` goes by
            signed ranks, and so less by a seed that is far out.
        alternative: ``greater``: as far above zero.

    Raises:
        ValueError: One is not finite: a seed without a figure is to be left out.

    >>> p_value([0.1, 0.2, 0.3, 0.4, 0.5])
    0.0625
    >>> p_value([0.1, 0.2, 0.3, 0.4, 0.5], alternative="greater")
    0.03125
    """
    d = _finite(differences)
    if len(d) < 2:
        return None
    if not d.any():
        return 1.0
    if test == "wilcoxon":
        # Flipping the signs of the ranks is exact where tables are not, with ties and (as Pratt has them) zeros.
        d = _rank(d)
    return _flip_signs(d, alternative)


def _flip_signs(d: np.ndarray, alternative: Alternative) -> float:
    """Share of ways to put the signs whose sum is as extreme as the one seen, which is one of them.

    Sums that are equal in exact arithmetic count as such: accuracies are counts over a number of rows, their differences tie all
    the time, and rounding must not break a tie. (scipy.stats.permutation_test allows 1e-14 of the sum, which is too little.)
    """
    n = len(d)
    if n <= _MOST_EXACT:
        signs, own = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1), 0
    else:
        # Those drawn, and the one seen.
        signs, own = np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(_RESAMPLES, n)), 1
    sums, seen, slack = signs @ np.abs(d), float(d.sum()), _SAME * float(np.abs(d).sum())
    extreme = np.abs(sums) >= abs(seen) - slack if alternative == "two-sided" else sums >= seen - slack
    return float((np.count_nonzero(extreme) + own) / (len(signs) + own))


def smallest_p(num_seeds: int, alternative: Alternative = "two-sided") -> float:
    """The smallest p that :func:`p_value` can come to with so many seeds.

    >>> smallest_p(5), smallest_p(6, "greater")
    (0.0625, 0.015625)
    """
    if num_seeds > _MOST_EXACT:
        return 1 / (_RESAMPLES + 1)
    return float(min(1.0, (2 if alternative == "two-sided" else 1) / 2**num_seeds))


def find_side(differences: Sequence[float], test: Test = "permutation") -> int:
    """On which side of zero differences lie, by what a test goes by: 1, -1 or 0.

    >>> find_side([0.1, 0.2, 0.3, -0.9]), find_side([0.1, 0.2, 0.3, -0.9], "wilcoxon")
    (-1, 1)
    """
    d = np.asarray(differences, dtype=np.float64)
    total = float((_rank(d) if test == "wilcoxon" else d).sum())
    return 0 if abs(total) <= _SAME * float(np.abs(d).sum()) else int(math.copysign(1, total))


def _rank(d: np.ndarray) -> np.ndarray:
    """Signed ranks; magnitudes that differ by rounding alone tie."""
    scale = float(np.abs(d).max()) or 1.0
    magnitudes = np.round(np.abs(d) / scale, 9)
    ranks: np.ndarray = np.where(magnitudes > 0, np.sign(d), 0.0) * stats.rankdata(magnitudes)
    return ranks


def _are_alike(x: np.ndarray) -> bool:
    """Whether values differ by no more than rounding."""
    return bool(np.ptp(x) <= _SAME * np.abs(x).max())


def correct(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: each p as it counts among several comparisons, so that one false positive in all is as unlikely as said.

    Args:
        ps: Of the comparisons; None is kept, and not counted.

    >>> correct([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for place, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        corrected[i] = largest
    return corrected


def effect_size(differences: Sequence[float]) -> float | None:
    """Mean difference in standard deviations of the differences (Cohen's d_z), without its bias at few seeds (Hedges' J).

    None of a single difference, or where all are the same.

    >>> round(effect_size([0.1, 0.2, 0.3, 0.4, 0.5]), 2)
    1.51
    """
    deviation = spread(differences)
    if not deviation or _are_alike(np.asarray(differences, dtype=np.float64)):
        return None
    freedom = len(differences) - 1
    # Hedges, Journal of Educational Statistics 1981.
    bias = (
        math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
        if freedom > 1
        else 1.0
    )
    return float(np.mean(differences)) / deviation * bias


def seeds_needed(differences: Sequence[float], half_width: float, confidence: float = 0.95) -> int | None:
    """With how many seeds, more than there are, the interval of the mean would be within +- ``half_width``, by their spread.

    None of a single difference, or where it is more than a thousand.

    >>> seeds_needed([0.1, 0.2, 0.3], 0.1)
    7
    """
    deviation = spread(differences)
    if deviation is None or half_width <= 0:
        return None
    for n in range(len(differences) + 1, _MOST_SEEDS + 1):
        if stats.t.ppf((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n) <= half_width:
            return n
    return None

r"""Variants held against a baseline, seed by seed, figure by figure.

Differences are of the seeds that both variants have finished. Of a task metric, a share or a depth they are taken as they are.
Costs and curvatures differ by factors: where they are positive, their differences are of logarithms, and told as
:math:`\exp(\overline{\Delta \log x}) - 1`, so that a fall to a half and a rise to the double weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import Any

from safe_lab.ablation.caveats import find_own_warnings, find_sharpness_warnings, find_twins, find_warnings
from safe_lab.ablation.claims import Outcome
from safe_lab.ablation.claims import judge as judge_claim
from safe_lab.ablation.records import PLACE, Record
from safe_lab.ablation.rules import Rules
from safe_lab.figures import differs_by_factor, direction_of
from safe_lab.run_folder import changed_keys
from safe_lab.statistics import (
    correct,
    effect_size,
    find_side,
    mean_interval,
    p_value,
    seeds_needed,
    smallest_p,
    spread,
)

# Of a difference, in a table.
_TOLD = ("is_relative", "low", "high", "p", "p_corrected", "effect_size")


class Verdict(StrEnum):
    """What can be said of a variant's metric against the baseline's."""

    BASELINE = "baseline"
    BETTER = "better"
    WORSE = "worse"
    NO_WORSE = "no worse"
    NO_DIFFERENCE_FOUND = "no difference found"
    NOT_ENOUGH_SEEDS = "not enough seeds to say"
    NO_RUNS = "no runs to compare"


@dataclass(frozen=True)
class Difference:
    """A figure of a variant against the baseline's.

    Attributes:
        by_seed: The difference of each seed that both have.
        terms: The same by seed, as mean, interval and tests take them: of shares the logarithms of the ratios.
        is_relative: Whether it is a share of the baseline's figure: -0.25 is a quarter less.
        mean: Mean difference over the seeds.
        low: Lower end of its interval; None with a single seed.
        high: Upper end.
        method: Of the interval: BCa or t.
        p: That seeds alone make such a difference, of this comparison by itself; None with a single seed.
        p_corrected: The same among the comparisons of all variants by this figure (Holm).
        smallest_p: That ``p`` can come to with so many seeds.
        effect_size: In standard deviations of the differences (Hedges).
    """

    by_seed: Mapping[int, float]
    terms: Mapping[int, float]
    is_relative: bool
    mean: float
    low: float | None
    high: float | None
    method: str | None
    p: float | None
    p_corrected: float | None
    smallest_p: float
    effect_size: float | None


@dataclass(frozen=True)
class Cell:
    """A figure of a variant.

    Attributes:
        by_seed: The figure of each run that has it.
        mean: Over them.
        spread: Their standard deviation; None with a single one.
        difference: To the baseline; None of the baseline itself, and where no seed has both.
    """

    by_seed: Mapping[int, float]
    mean: float
    spread: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        variant: Its name.
        cells: By figure; those no run has are left out.
        verdict: What can be said of its metric.
        reason: Why, in words.
        p_worse: That it is worse than the baseline by the margin or more and came out so well by chance (one-sided).
        p_worse_corrected: The same among all variants (Holm).
        changes: Where its configuration differs from the baseline's: the baseline's value and its own, by dotted key.
        faults: Why runs are not in it, by seed.
    """

    variant: str
    cells: Mapping[str, Cell]
    verdict: Verdict
    reason: str
    p_worse: float | None
    p_worse_corrected: float | None
    changes: Mapping[str, tuple[Any, Any]]
    faults: Mapping[int, str]


@dataclass(frozen=True)
class Comparison:
    """Variants held against a baseline.

    Attributes:
        rules: How.
        baseline: Which.
        rows: The variants, the baseline among them, in their order.
        warnings: What stands against taking the differences at their word.
        claims: What came of each claim of the rules.
    """

    rules: Rules
    baseline: str
    rows: Sequence[Row]
    warnings: Sequence[str]
    claims: Sequence[Outcome] = ()

    def row(self, variant: str) -> Row:
        """That of a variant."""
        return next(row for row in self.rows if row.variant == variant)

    def table(self) -> list[dict[str, Any]]:
        """A row of plain values for each variant and figure, the metric first; None where there is none."""
        rows = []
        for row in self.rows:
            for figure, cell in row.cells.items():
                found = cell.difference
                rows.append(
                    {
                        "variant": row.variant,
                        "figure": figure,
                        "n": len(cell.by_seed),
                        "mean": cell.mean,
                        "spread": cell.spread,
                        "difference": None if found is None else found.mean,
                        **{key: None if found is None else getattr(found, key) for key in _TOLD},
                        "verdict": row.verdict.value if figure == self.rules.metric else None,
                    }
                )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare(records: Sequence[Record], rules: Rules, baseline: str) -> Comparison:
    """Hold the variants of some runs against one of them.

    Args:
        records: The runs, of one variant and seed each.
        rules: How.
        baseline: A variant among them.
    """
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        if not record.fault and record.figure(rules.metric) is None:
            record = replace(record, fault=f"its result.json has no finite {rules.metric}")
        by_variant.setdefault(record.variant, []).append(record)
    base = by_variant[baseline]
    others = [variant for variant in by_variant if variant != baseline]
    cells: dict[str, dict[str, Cell]] = {variant: {} for variant in by_variant}
    compared = list(dict.fromkeys((rules.metric, *rules.figures, *(claim.figure for claim in rules.claims))))
    for figure in compared:
        values = {variant: _by_seed(runs, figure) for variant, runs in by_variant.items()}
        differences = {variant: _differ(figure, values[variant], values[baseline], rules) for variant in others}
        for variant, difference in _correct(differences).items():
            if values[variant]:
                found = list(values[variant].values())
                cells[variant][figure] = Cell(values[variant], fmean(found), spread(found), difference)
        if values[baseline]:
            found = list(values[baseline].values())
            cells[baseline][figure] = Cell(values[baseline], fmean(found), spread(found), None)
    ps = [_p_worse(cells[variant].get(rules.metric), rules) for variant in others]
    worse = dict(zip(others, zip(ps, correct(ps), strict=True), strict=True))
    num_compared = max(sum(difference_p is not None for difference_p in _ps(cells, others, rules.metric)), 1)
    rows = []
    for variant, runs in by_variant.items():
        p, corrected_p = worse.get(variant, (None, None))
        verdict, reason = (
            (Verdict.BASELINE, "")
            if variant == baseline
            else judge(cells[variant].get(rules.metric), num_compared, rules, (p, corrected_p))
        )
        faults = {record.seed: record.fault for record in runs if record.fault}
        rows.append(Row(variant, cells[variant], verdict, reason, p, corrected_p, _changes(base, runs), faults))
    warnings = [
        *find_warnings(by_variant, baseline),
        *find_own_warnings(by_variant),
        *find_twins(by_variant),
        *find_sharpness_warnings(by_variant, baseline, compared),
    ]
    if rules.margin is not None:
        differences_of = {row.variant: row.cells[rules.metric].difference for row in rows if rules.metric in row.cells}
        without = [name for name, one in differences_of.items() if one is not None and not _has_margin(one, rules)]
        if without:
            warnings.append(
                f"{rules.metric} of {', '.join(without)} is not always positive: differences are no shares, as a margin is"
            )
    outcomes = []
    for claim in rules.claims:
        cell = cells.get(claim.variant, {}).get(claim.figure)
        outcomes.append(judge_claim(claim, None if cell is None else cell.difference))
    return Comparison(rules, baseline, rows, warnings, outcomes)


def judge(
    cell: Cell | None, num_comparisons: int, rules: Rules, ps_worse: tuple[float | None, float | None] = (None, None)
) -> tuple[Verdict, str]:
    """What can be said of a variant's metric.

    Better or worse is what p says after correction. No worse, and worse by more than the margin, is what the interval says:
    it lies on one side of the margin (as non-inferiority is told in trials: Piaggio et al., CONSORT, JAMA 2012).

    Args:
        cell: The metric of the variant.
        num_comparisons: Variants that are held against the baseline.
        rules: Metric, margin and confidence.
        ps_worse: One-sided, that it is worse by the margin: by itself, which decides where all differences are alike and tell no
            spread, and after correction.
    """
    found = None if cell is None else cell.difference
    if found is None:
        return Verdict.NO_RUNS, "no seed has finished in both"
    if len(found.by_seed) < 2 or found.low is None or found.high is None:
        return Verdict.NOT_ENOUGH_SEEDS, "one seed tells nothing of what another would do"
    alpha, sign = 1 - rules.confidence, direction_of(rules.metric)
    worst, best = sorted((sign * found.low, sign * found.high))
    said = "" if found.p_corrected is None else f"p = {found.p_corrected:.2g} after correction"
    # The side that the test has found, where the mean is on it too: one seed far out may draw the mean over to the other.
    side = sign * find_side(list(found.terms.values()), rules.test)
    is_told = found.p_corrected is not None and found.p_corrected <= alpha and side * sign * found.mean > 0
    if is_told and side > 0:
        return Verdict.BETTER, said
    if rules.margin is None or not _has_margin(found, rules):
        if is_told:
            return Verdict.WORSE, said
        attainable = min(1.0, found.smallest_p * num_comparisons)
        if attainable > alpha:
            seeds = f"with {len(found.by_seed)} seeds and {num_comparisons} comparisons"
            return Verdict.NOT_ENOUGH_SEEDS, f"{seeds} p cannot come below {attainable:.2g}"
        return Verdict.NO_DIFFERENCE_FOUND, said
    p_worse, p_worse_corrected = ps_worse
    has_interval = found.method != "all alike" or (p_worse is not None and p_worse <= alpha / 2)
    if has_interval and worst > -rules.margin:
        how = f"worse ({said})" if is_told else _say_worst(worst)
        against = ""
        # Where it could have come to as little as the interval leaves on a side; else it would seem to contradict that.
        if p_worse_corrected is not None and smallest_p_worse(found, num_comparisons) <= alpha / 2:
            correction = " after correction" if num_comparisons > 1 else ""
            against = f"; p = {p_worse_corrected:.2g} against being worse by that much{correction}"
        return Verdict.NO_WORSE, f"{how}, within the margin of {rules.margin:g}{against}"
    if is_told or (has_interval and best < -rules.margin):
        return Verdict.WORSE, said if is_told else f"the whole interval is beyond the margin of {rules.margin:g}"
    return Verdict.NOT_ENOUGH_SEEDS, _say_needed(found, worst, rules)


def smallest_p_worse(found: Difference, num_comparisons: int) -> float:
    """The smallest one-sided p against being worse by the margin that there can be after correction."""
    return min(1.0, smallest_p(len(found.by_seed), "greater") * num_comparisons)


def _has_margin(found: Difference, rules: Rules) -> bool:
    """Whether a margin is in the unit of a difference: that of a cost is a share, and there is none of what may be nothing."""
    return found.is_relative == differs_by_factor(rules.metric)


def _say_worst(worst: float) -> str:
    return f"at worst {-worst:.3g} worse" if worst < 0 else "nowhere in its interval worse"


def _say_needed(found: Difference, worst: float, rules: Rules) -> str:
    assert rules.margin is not None
    if found.method == "all alike":
        return f"{len(found.by_seed)} differences that are all alike tell no spread"
    said = f"it may be {-worst:.3g} worse, and {rules.margin:g} is the margin"
    # The interval must come to no more than what is left between the mean and the margin.
    room = fmean(_above_margin(found, rules))
    if room <= 0:
        mean = -direction_of(rules.metric) * found.mean
        return f"it may be {-worst:.3g} worse, its mean is {mean:.3g} worse, and {rules.margin:g} is the margin"
    needed = seeds_needed(list(found.terms.values()), room, rules.confidence)
    return f"{said}; some {needed} seeds of such a spread and mean might show" if needed else said


def _ps(cells: Mapping[str, Mapping[str, Cell]], variants: Sequence[str], figure: str) -> list[float | None]:
    found = [cells[variant].get(figure) for variant in variants]
    return [None if cell is None or cell.difference is None else cell.difference.p for cell in found]


def _correct(differences: Mapping[str, Difference | None]) -> dict[str, Difference | None]:
    """The same differences, their p corrected for there being several."""
    corrected = correct([None if found is None else found.p for found in differences.values()])
    return {
        variant: None if found is None else replace(found, p_corrected=p)
        for (variant, found), p in zip(differences.items(), corrected, strict=True)
    }


def _by_seed(records: Sequence[Record], figure: str) -> dict[int, float]:
    found = {record.seed: record.figure(figure) for record in records}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def _differ(figure: str, ours: Mapping[int, float], theirs: Mapping[int, float], rules: Rules) -> Difference | None:
    """The difference over the seeds that both have; its p stands by itself."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    is_relative = differs_by_factor(figure) and all(values[seed] > 0 for values in (ours, theirs) for seed in seeds)
    scale = math.log if is_relative else float
    tell = math.expm1 if is_relative else float
    differences = [scale(ours[seed]) - scale(theirs[seed]) for seed in seeds]
    interval = mean_interval(differences, rules.confidence)
    p = p_value(differences, test=rules.test)
    return Difference(
        by_seed={seed: tell(value) for seed, value in zip(seeds, differences, strict=True)},
        terms=dict(zip(seeds, differences, strict=True)),
        is_relative=is_relative,
        mean=tell(fmean(differences)),
        low=None if interval is None else tell(interval.low),
        high=None if interval is None else tell(interval.high),
        method=None if interval is None else interval.method,
        p=p,
        p_corrected=p,
        smallest_p=smallest_p(len(seeds)),
        effect_size=effect_size(differences),
    )


def _p_worse(ours: Cell | None, rules: Rules) -> float | None:
    """How likely a variant would come out so well by chance, were it worse by the margin."""
    found = None if ours is None else ours.difference
    if rules.margin is None or found is None or not _has_margin(found, rules):
        return None
    return p_value(_above_margin(found, rules), test=rules.test, alternative="greater")


def _above_margin(found: Difference, rules: Rules) -> list[float]:
    """How far the terms of a difference lie on the better side of the margin, by seed."""
    assert rules.margin is not None
    sign = direction_of(rules.metric)
    limit = -sign * rules.margin
    return [sign * (term - (math.log1p(limit) if found.is_relative else limit)) for term in found.terms.values()]


def _changes(base: Sequence[Record], runs: Sequence[Record]) -> dict[str, tuple[Any, Any]]:
    """Where a variant's settings differ from the baseline's, by the first run of each that can be read."""
    configs = [
        next((record.config for record in records if record.config is not None), None) for records in (base, runs)
    ]
    if configs[0] is None or configs[1] is None:
        return {}
    found = changed_keys(configs[0], configs[1])
    return {key: values for key, values in found.items() if key.partition(".")[0] not in PLACE}

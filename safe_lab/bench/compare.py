"""What the measurements of a bench come to: figures, ratios to the baseline, and whether the loss curves are the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safe_lab.bench.config import Bench
from safe_lab.bench.processes import FIGURES, Measurement

_COMPARED_OF_ENVIRONMENTS = ("commit", "python", "platform", "processor", "processors", "threads", "devices")

Figures = Mapping[str, Mapping[str, Sequence[float | None]]]
Spread = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Figures of the variants side by side.

    Attributes:
        baseline: Variant that ratios are taken to.
        variants: Variant -> figure -> one value a repetition; None where the training failed or there is no such meter.
        ratios: Variant -> figure -> ``median``, ``min`` and ``max`` of the ratios to the baseline, each within its repetition.
        metric_differences: Variant -> ``mean``, ``low`` and ``high`` of its metric less the baseline's of the same repetition,
            with the 95 % interval of the mean (Student's t); None where there are too few.
        same_curve: Variants that do the baseline's arithmetic, so that their loss curves ought to be the baseline's, as far
            as both have been measured.
        loss_curve_difference: Largest difference between a row of the baseline's training loss and the same row of theirs;
            None if there is nothing to compare.
        num_loss_rows: How many rows of the training loss were compared.
        environment_differences: What was not the same for all trainings, of machine, threads, versions and commit.
        failures: Variant, repetition and reason of each training that failed.
        complete: Every training that was asked for has been made, and none failed.
    """

    baseline: str
    variants: Figures
    ratios: Mapping[str, Mapping[str, Spread]]
    metric_differences: Mapping[str, Spread]
    same_curve: Sequence[str]
    loss_curve_difference: float | None
    num_loss_rows: int
    environment_differences: Sequence[str]
    failures: Sequence[Mapping[str, Any]]
    complete: bool


def compare(bench: Bench, measurements: Sequence[Measurement]) -> Comparison:
    """Compare what was measured, be it all or not.

    Args:
        bench: What was asked for.
        measurements: What has been made of it.
    """
    by_turn = {(entry.variant, entry.repetition): entry for entry in measurements}
    repetitions = range(1 + max((entry.repetition for entry in measurements), default=-1))
    variants = {
        name: {figure: [_figure(by_turn.get((name, i)), figure) for i in repetitions] for figure in FIGURES}
        for name in bench.configs
    }
    ratios = {
        name: {figure: take_ratio(values[figure], variants[bench.baseline][figure]) for figure in FIGURES}
        for name, values in variants.items()
    }
    alike = [
        (name, by_turn[name, i].losses, by_turn[bench.baseline, i].losses)
        for name in bench.configs
        if name != bench.baseline and bench.repeats_baseline(name)
        for i in repetitions
        if all(turn in by_turn and by_turn[turn].losses for turn in ((name, i), (bench.baseline, i)))
    ]
    measurements = sorted(measurements, key=lambda entry: (entry.repetition, list(bench.configs).index(entry.variant)))
    failures = [
        {"variant": entry.variant, "repetition": entry.repetition, "failure": entry.failure}
        for entry in measurements
        if entry.failure
    ]
    complete = len(measurements) == len(bench.configs) * bench.settings.repetitions and not failures
    return Comparison(
        baseline=bench.baseline,
        variants=variants,
        ratios=ratios,
        metric_differences={
            name: take_difference(values["metric"], variants[bench.baseline]["metric"])
            for name, values in variants.items()
            if name != bench.baseline
        },
        same_curve=list(dict.fromkeys(name for name, _, _ in alike)),
        loss_curve_difference=max((difference_of_losses(ours, theirs) for _, ours, theirs in alike), default=None),
        num_loss_rows=sum(len(ours) for _, ours, _ in alike),
        environment_differences=find_differences([entry.environment for entry in measurements if entry.environment]),
        failures=failures,
        complete=complete,
    )


def take_ratio(values: Sequence[float | None], baseline: Sequence[float | None]) -> Spread:
    """Median, least and largest ratio of values to the baseline's of the same repetition; None if there is no ratio.

    >>> take_ratio([1.0, 3.0, None, 6.0], [2.0, 2.0, 2.0, 3.0])
    {'median': 1.5, 'min': 0.5, 'max': 2.0}
    """
    ratios = [value / base for value, base in zip(values, baseline, strict=True) if value is not None and base]
    if not ratios:
        return {"median": None, "min": None, "max": None}
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def find_differences(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same in all environments (:func:`safe_lab.environment.describe_environment`), with all its values.

    >>> find_differences([{"threads": 1, "time": "12:00"}, {"threads": 2, "time": "13:00"}])
    ['threads: 1, 2']
    """
    values: dict[str, list[str]] = {}
    for environment in environments:
        packages = environment.get("packages", {})
        for key, value in {**environment, **packages}.items():
            if key in _COMPARED_OF_ENVIRONMENTS or key in packages:
                known = values.setdefault(key, [])
                known += [str(value)] if str(value) not in known else []
    return [f"{key}: {', '.join(known)}" for key, known in values.items() if len(known) > 1]


def take_difference(values: Sequence[float | None], baseline: Sequence[float | None]) -> Spread:
    """Mean of values less the baseline's of the same repetition, and the ends of its 95 % interval (paired Student's t).

    >>> take_difference([1.0, 2.0, None], [0.5, 1.5, 1.0])
    {'mean': 0.5, 'low': 0.5, 'high': 0.5}
    """
    pairs = zip(values, baseline, strict=True)
    differences = [value - base for value, base in pairs if value is not None and base is not None]
    if not differences:
        return {"mean": None, "low": None, "high": None}
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(differences) - 1))
    half = quantile * statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def difference_of_losses(losses: Iterable[tuple[int, float]], others: Iterable[tuple[int, float]]) -> float:
    """Largest absolute difference of two loss curves over the same steps.

    >>> difference_of_losses([(10, 0.5), (20, 0.25)], [(10, 0.5), (20, 0.375)])
    0.125
    """
    curve, other = dict(losses), dict(others)
    assert curve.keys() == other.keys()
    return max(abs(curve[step] - other[step]) for step in curve)


def _figure(measurement: Measurement | None, figure: str) -> float | None:
    return measurement.figures.get(figure) if measurement else None

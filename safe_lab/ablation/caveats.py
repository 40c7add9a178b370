"""What stands against taking differences between runs at their word."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from safe_lab.ablation.records import Record
from safe_lab.run_folder import RunFolder

# What froze when, and the metrics.
_Training = tuple[list[tuple[int, list[str]]], Mapping[str, float]]
_Value = TypeVar("_Value")


def find_warnings(by_variant: Mapping[str, Sequence[Record]], baseline: str) -> list[str]:
    """What stands against pairing runs by their seeds."""
    base = {record.seed: record for record in by_variant[baseline] if not record.fault}
    warnings = []
    for variant, records in by_variant.items():
        for record in records:
            other = base.get(record.seed)
            if record.fault or other is None:
                continue
            ours, theirs = record.result["fingerprints"], other.result["fingerprints"]
            differ = [name for name in ours if name in theirs and ours[name] != theirs[name]]
            if differ:
                warnings.append(
                    f"{variant}, seed {record.seed}: other {' and '.join(differ)} than {baseline}: nothing pairs them"
                )
    machines = {record.machine for records in by_variant.values() for record in records if not record.fault}
    if len(machines) > 1:
        warnings.append(f"seconds and bytes do not compare, as the runs were made on: {'; '.join(sorted(machines))}")
    return warnings


def find_twins(by_variant: Mapping[str, Sequence[Record]]) -> list[str]:
    """Variants that came to one and the same training: what froze when, and every metric, are alike to the last digit.

    No number of seeds tells such variants apart: they differ in nothing that has had an effect.
    """
    trainings: dict[str, dict[int, _Training]] = {}
    for variant, records in by_variant.items():
        found = {record.seed: _training_of(record) for record in records}
        trainings[variant] = {seed: training for seed, training in found.items() if training is not None}
    warnings = []
    groups = _group(trainings, _are_alike)
    for group in groups:
        if len(group) > 1:
            froze = any(events for variant in group for events, _ in trainings[variant].values())
            how = "the same units froze at the same steps" if froze else "nothing froze"
            told = f"{_list(group)} are one training in every seed that they share"
            warnings.append(f"{told}: {how}, and all metrics are alike")
    # From here on the first of a group stands for all of it.
    seeds_of: dict[tuple[str, ...], list[int]] = {}
    for seed in sorted(set().union(*trainings.values())):
        there = {group[0]: trainings[group[0]][seed] for group in groups if seed in trainings[group[0]]}
        for alike in _group(there, operator.eq):
            if len(alike) > 1:
                seeds_of.setdefault(alike, []).append(seed)
    if seeds_of:
        told = "; ".join(f"{_list(group)} in {_say_seeds(seeds)}" for group, seeds in seeds_of.items())
        warnings.append(f"one training in some seeds, by what froze when and all metrics: {told}")
    return warnings


def _are_alike(one: Mapping[int, _Training], other: Mapping[int, _Training]) -> bool:
    """Whether trainings are alike in every seed of both, of which there is one."""
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[seed] == other[seed] for seed in shared)


def _group(values: Mapping[str, _Value], is_alike: Callable[[_Value, _Value], bool]) -> list[tuple[str, ...]]:
    """Names in their order, those with like values together."""
    groups: list[list[str]] = []
    for name, value in values.items():
        group = next((group for group in groups if is_alike(values[group[0]], value)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [tuple(group) for group in groups]


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _training_of(record: Record) -> _Training | None:
    """What froze when, and the metrics; None where that cannot be told."""
    if record.fault:
        return None
    try:
        rows = RunFolder(record.path, writes=False).rows("events.jsonl")
        events = [(row["step"], sorted(row["units"])) for row in rows if row["units"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_told = bool(events) == bool(record.result["frozen_share"])
    return (events, record.result["metrics"]) if is_told else None


def find_sharpness_warnings(
    by_variant: Mapping[str, Sequence[Record]], baseline: str, figures: Sequence[str]
) -> list[str]:
    """What stands against comparing figures of sharpness."""
    names = {figure.removeprefix("sharpness/") for figure in figures if figure.startswith("sharpness/")}
    base = {record.seed: _sharpness_of(record) for record in by_variant[baseline]}
    warnings = []
    for variant, records in by_variant.items():
        measured = {record.seed: found for record in records if (found := _sharpness_of(record))}
        loose = {seed: sorted(names & _not_converged(found)) for seed, found in measured.items()}
        seeds = [seed for seed, some in loose.items() if some]
        if seeds:
            told = ", ".join(sorted({name for some in loose.values() for name in some}))
            warnings.append(
                f"{variant}: sharpness ({told}) was not within its tolerance when its budget was spent: {_say_seeds(seeds)}"
            )
        for key, how in (("fingerprint", "over other examples"), ("settings", "by other settings")):
            others = [
                seed for seed, found in measured.items() if base.get(seed) and found.get(key) != base[seed].get(key)
            ]
            if others:
                warnings.append(
                    f"{variant}: sharpness was measured {how} than that of {baseline}: {_say_seeds(others)}"
                )
    return warnings


def _sharpness_of(record: Record) -> Mapping[str, Any]:
    return {} if record.fault else record.result.get("sharpness") or {}


def _say_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _not_converged(sharpness: Mapping[str, Any]) -> set[str]:
    """Figures that are not within their tolerance."""
    # It loads torch.
    from safe_lab.gauging import summarize_all

    suffix = "_converged"
    try:
        flat = summarize_all(sharpness)
    except (ValueError, KeyError, TypeError, AttributeError):
        # Damaged: it has no figures, and so no cells.
        return set()
    return {name.removesuffix(suffix) for name, value in flat.items() if name.endswith(suffix) and not value}

"""What stands against taking differences between runs at their word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safe_lab.ablation.records import PLACE, Record
from safe_lab.config import Config
from safe_lab.run_folder import RunFolder, changed_keys

# What froze when, and the metrics.
_Training = tuple[list[tuple[int, list[str]]], Mapping[str, float]]
_NUMBER = re.compile(r"[-+]?\d[\d.e+-]*")


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


def find_own_warnings(by_variant: Mapping[str, Sequence[Record]]) -> list[str]:
    """What runs have warned of themselves, each once, with the variants that say it and the figures of the first."""
    first: dict[str, str] = {}
    variants: dict[str, list[str]] = {}
    for record in (record for records in by_variant.values() for record in records if not record.fault):
        for warning in record.warnings:
            kind = kind_of(warning)
            first.setdefault(kind, f"{warning} ({record.variant}, seed {record.seed})")
            if record.variant not in variants.setdefault(kind, []):
                variants[kind].append(record.variant)
    return [f"{_list(variants[kind])} warned: {warning}" for kind, warning in first.items()]


def kind_of(warning: str) -> str:
    """A warning without its figures, in which the seeds of a variant differ."""
    return _NUMBER.sub("", warning)


def find_twins(by_variant: Mapping[str, Sequence[Record]]) -> list[str]:
    """Variants that came to one and the same training: what froze when, and every metric, are alike to the last digit.

    No number of seeds tells their metrics apart. Of those that differ in nothing but what freezing is turned into this is as it
    should be, and no warning.
    """
    trainings: dict[str, dict[int, _Training]] = {}
    for variant, records in by_variant.items():
        found = {record.seed: _training_of(record) for record in records}
        trainings[variant] = {seed: training for seed, training in found.items() if training is not None}
    warnings = []
    groups = [group for group in _group(trainings) if trainings[group[0]]]
    for group in groups:
        told = _without_savings_alone(group, by_variant)
        if len(told) > 1:
            froze = any(events for events, _ in trainings[group[0]].values())
            how = "the same units froze at the same steps" if froze else "nothing froze"
            warnings.append(
                f"{_list(told)} are one training in every seed: {how}, and all metrics are alike; their costs may differ"
            )
    members = {group[0]: group for group in groups}
    seeds_of: dict[tuple[str, ...], list[int]] = {}
    for seed in sorted(set().union(*trainings.values())):
        for alike in _group({first: trainings[first][seed] for first in members if seed in trainings[first]}):
            together = _without_savings_alone([name for first in alike for name in members[first]], by_variant)
            if len(alike) > 1 and len(together) > 1:
                seeds_of.setdefault(tuple(together), []).append(seed)
    if seeds_of:
        told_some = "; ".join(f"{_list(group)} in {_say_seeds(seeds)}" for group, seeds in seeds_of.items())
        warnings.append(f"one training in some seeds, by what froze when and all metrics: {told_some}")
    return warnings


def _group(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names in their order, those with equal values together."""
    groups: list[list[str]] = []
    for name, value in values.items():
        group = next((group for group in groups if values[group[0]] == value), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [tuple(group) for group in groups]


def _without_savings_alone(group: Sequence[str], by_variant: Mapping[str, Sequence[Record]]) -> list[str]:
    """Of some variants, those that differ from the ones before in more than what freezing is turned into."""
    kept: list[str] = []
    for variant in group:
        config = by_variant[variant][0].config
        before = [by_variant[name][0].config for name in kept]
        if config is None or not any(other and _differ_in_savings_alone(other, config) for other in before):
            kept.append(variant)
    return kept


def _differ_in_savings_alone(one: Config, other: Config) -> bool:
    return all(key.partition(".")[0] in (*PLACE, "savings") for key in changed_keys(one, other))


def _list(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


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

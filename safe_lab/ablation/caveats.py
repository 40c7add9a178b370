"""What stands against taking differences between runs at their word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safe_lab.ablation.records import Record


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

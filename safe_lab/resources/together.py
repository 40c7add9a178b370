"""Figures of several processes as those of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# By the first part of a key: what processes add up to; what is averaged; what process 0 tells, as all keep step with it and it
# has taken part from the start. Of all else the largest counts.
_ADDED = {
    "flops",
    "flops_by_phase",
    "cpu_seconds",
    "joules",
    "tokens_computed",
    "traced_micro_steps",
    "scaled_micro_steps",
}
_AVERAGED = {
    "memory_mean_bytes",
    "memory_mean_by_kind",
    "memory_mean_step_peak_bytes",
    "activations_mean_bytes",
    "step_memory_mean_bytes",
}
_OF_PROCESS_0 = {"seconds", "wall_seconds"}
# What goes with the highest peak: the figures of the process that has it.
_OF_THE_HIGHEST = {
    "memory_peak_bytes": ("memory_peak_in", "memory_peak_by_kind"),
    "step_memory_peak_bytes": ("step_memory", "step_traced"),
}


def combine(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the figures of all processes come to: the one process's own, if there is but one.

    FLOPs, CPU seconds, joules and counts are added up; means over time are averaged; seconds are process 0's; peaks are the
    largest, and what a peak consists of belongs to the process that has it.

    Args:
        figures: Of each process, with the same keys; numbers, None, or mappings of them.

    >>> combine([{"flops": 3, "wall_seconds": 5, "seconds/data": 1.0}, {"flops": 4, "wall_seconds": 9, "seconds/data": 2.0}])
    {'flops': 7, 'wall_seconds': 5, 'seconds/data': 1.0}
    """
    first, *others = figures
    if not others:
        return dict(first)
    highest = {
        part: max(figures, key=lambda process: process[peak] or 0)
        for peak, parts in _OF_THE_HIGHEST.items()
        if first.get(peak) is not None
        for part in parts
    }
    combined = {}
    for key, value in first.items():
        group = key.partition("/")[0]
        if group in highest:
            combined[key] = highest[group][key]
        elif isinstance(value, Mapping):
            combined[key] = {name: _reduce(_rule(group), [process[key][name] for process in figures]) for name in value}
        else:
            combined[key] = _reduce(_rule(group), [process[key] for process in figures])
    return combined


def spread(figures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sum, mean and largest of every number over the processes, by its key; those within a mapping as ``key/name``."""
    columns: dict[str, list[float]] = {}
    for process in figures:
        # One may lack what another has: a counter of joules, a mean over time that it took no part in.
        for key, value in _flatten(process):
            columns.setdefault(key, []).append(value)
    return {
        "sum": {key: sum(values) for key, values in columns.items()},
        "mean": {key: sum(values) / len(values) for key, values in columns.items()},
        "largest": {key: max(values) for key, values in columns.items()},
    }


def _rule(group: str) -> Callable[[list[Any]], Any]:
    if group in _ADDED:
        return sum
    if group in _OF_PROCESS_0:
        return lambda values: values[0]
    return (lambda values: sum(values) / len(values)) if group in _AVERAGED else max


def _reduce(rule: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return rule(known) if known else None


def _flatten(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    flat = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            flat += [(f"{key}/{name}", number) for name, number in value.items() if number is not None]
        elif isinstance(value, int | float):
            flat.append((key, value))
    return flat

"""What a run came to: the fields of ``result.json``, and how the freezing history is drawn from the rows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a run came to, as in ``result.json``; the fields are documented in docs/run_folder.md."""

    name: str
    variant: str
    seed: int
    main_metric: str
    metrics: dict[str, float]
    baselines: dict[str, float]
    labels: list[str]
    selected_step: int
    steps: int
    epochs: int
    tokens: int
    seconds: dict[str, float]
    resources: dict[str, Any]
    unfrozen_forecast: dict[str, float | None] | None
    processes: dict[str, Any]
    savings: dict[str, int]
    parameters: dict[str, int]
    examples: dict[str, int]
    truncated: dict[str, int]
    frozen_share: float
    frozen_depth: int
    adapters: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    fingerprints: dict[str, str]
    sharpness: dict[str, Any] | None = None


def summarize_freezing(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What happened to each adapter, and to all over time, from the rows of importance.jsonl.

    Returns:
        One entry for each unit: depth, unit, first and last score, the last as compared with the threshold, step and epoch
        at which it froze, and the threshold then (None if it did not); and one for each scoring: scoring, step, epoch,
        threshold, frozen_share, frozen_depth.
    """
    by_unit: dict[str, list[Mapping[str, Any]]] = {}
    by_scoring: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_unit.setdefault(row["unit"], []).append(row)
        by_scoring.setdefault(row["scoring"], []).append(row)
    adapters = []
    for unit, history in by_unit.items():
        froze = next((row for row in history if row["frozen"]), None)
        adapters.append(
            {
                "depth": history[0]["depth"],
                "unit": unit,
                "first_score": history[0]["score"],
                "last_score": history[-1]["score"],
                "normalized_score": history[-1]["normalized_score"],
                "frozen_at_step": froze and froze["step"],
                "frozen_at_epoch": froze and froze["epoch"],
                "threshold": froze and froze["threshold"],
            }
        )
    timeline = []
    for scoring, entries in by_scoring.items():
        frozen = [entry["frozen"] for entry in entries]
        timeline.append(
            {
                "scoring": scoring,
                "step": entries[0]["step"],
                "epoch": entries[0]["epoch"],
                "threshold": entries[0]["threshold"],
                "frozen_share": sum(frozen) / len(frozen),
                "frozen_depth": frozen.index(False) if False in frozen else len(frozen),
            }
        )
    return adapters, timeline

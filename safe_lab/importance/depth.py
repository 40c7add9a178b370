"""Control: the nearer to the output, the more important, whatever the adapters learn."""

from __future__ import annotations

from safe_lab.importance.probe import Probe


def score(probe: Probe) -> list[float]:
    """``unit.depth + 1``, so that a threshold freezes from the input upwards and no unit scores 0.

    Not divided by the number of units: a score must not change when other units are frozen and no longer in the probe.

    Returns:
        One score for each of ``probe.units``, from 1 on.
    """
    return [float(unit.depth + 1) for unit in probe.units]

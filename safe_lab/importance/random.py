"""Control: what a metric that knows nothing would do."""

from __future__ import annotations

import random

from safe_lab.importance.probe import Probe


def score(probe: Probe) -> list[float]:
    """Uniform noise, drawn anew at each scoring.

    A unit's draw depends on the run's seed, the number of the scoring and the unit's name: not on which other units
    are still in the probe, nor on any global random stream.

    Returns:
        One score in [0, 1) for each of ``probe.units``.
    """
    # Seeded by a string, Python hashes it with SHA-512: the same on every machine and in every process, unlike hash().
    return [random.Random(f"{probe.seed}/{probe.scoring}/{unit.name}").random() for unit in probe.units]

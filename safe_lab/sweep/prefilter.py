"""Turn away trials that will break a constraint, before they cost anything: by replay of the runs a study has finished."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from safe_lab.config import Config
from safe_lab.figures import FORECAST, format_figure
from safe_lab.replay import Replayer, forecast_peak, read_recording
from safe_lab.section import ConfigError
from safe_lab.sweep.study_file import Constraint, StudyFile

log = logging.getLogger(__name__)

_PEAK = "resources/memory_peak_bytes"
# Share of scores of earlier scorings beyond which a replay is none to turn a trial away by.
_MOST_STALE = 0.25
# Finished runs among which the one to replay is looked for.
_MOST_TRIED = 8


@dataclass
class Prefilter:
    """Forecasts what a trial would come to, from the finished runs of its study that lie on this disk.

    Attributes:
        study_file: What is searched.
    """

    study_file: StudyFile
    _runs: dict[Path, Replayer | None] = field(default_factory=dict)
    _told: set[Path] = field(default_factory=set)

    def forecast(self, config: Config) -> Mapping[str, float]:
        """What a run would come to, for each constraint that can be told: its figure by the constraint's text.

        The figures are those of a replay of a finished run: of those whose scores tell about this one that with the fewest scores
        of earlier scorings, and of equals that which froze least. The peak, where none tells, follows from any run on the same
        data.
        """
        wanted = [constraint for constraint in self.study_file.constraints if constraint.figure in FORECAST]
        try:
            found = self._replay(config)
            if _PEAK not in found and any(constraint.figure == _PEAK for constraint in wanted):
                found = {**found, **self._scale_peak(config)}
        except Exception as error:  # noqa: BLE001 - a forecast is a favour, and must not cost the trial
            log.warning("no forecast is made: %s: %s", type(error).__name__, error)
            return {}
        return {constraint.text: found[constraint.figure] for constraint in wanted if constraint.figure in found}

    def find_reason(self, forecast: Mapping[str, float]) -> str | None:
        """Why a trial is turned away, if it is: the constraints that it would break by more than the margin."""
        margin = self.study_file.settings.prefilter_margin
        broken = [
            f"{constraint.figure} would be {format_figure(constraint.figure, forecast[constraint.text])}, and is to be "
            f"{constraint.describe_bound()}"
            for constraint in self.study_file.constraints
            if constraint.text in forecast and is_broken(constraint, forecast[constraint.text], margin)
        ]
        return "; ".join(broken) or None

    def _replay(self, config: Config) -> Mapping[str, float]:
        usable: list[tuple[float, Replayer]] = []
        for replayer in sorted(self._finished(config.seed), key=_frozen_share):
            with suppress(ConfigError):
                usable.append((replayer.history(config).stale_share, replayer))
            if len(usable) == _MOST_TRIED:
                break
        stale_share, chosen = min(usable, key=lambda entry: entry[0], default=(1.0, None))
        if chosen is None or stale_share > _MOST_STALE:
            return {}
        replayed = chosen.replay(config)
        if replayed.no_forecast and chosen.recording.path not in self._told:
            self._told.add(chosen.recording.path)
            log.warning("costs are not forecast: %s", replayed.no_forecast)
        return replayed.forecast

    def _scale_peak(self, config: Config) -> Mapping[str, float]:
        for replayer in self._finished(config.seed):
            with suppress(ConfigError):
                return {_PEAK: forecast_peak(replayer.recording, config)}
        return {}

    def _finished(self, seed: int) -> Iterator[Replayer]:
        for path in sorted(self.study_file.folder.glob(f"trial-*/seed-{seed}/result.json")):
            if path.parent not in self._runs:
                try:
                    self._runs[path.parent] = Replayer(read_recording(path.parent))
                except ConfigError as error:
                    log.warning("no forecast is made from a finished run: %s", error)
                    self._runs[path.parent] = None
            replayer = self._runs[path.parent]
            if replayer is not None:
                yield replayer


def is_broken(constraint: Constraint, value: float, margin: float) -> bool:
    """Whether a constraint is broken by a value even if that is off by a share of it.

    >>> at_most = Constraint("frozen_depth <= 10", "frozen_depth", 10.0, 1)
    >>> is_broken(at_most, 10.4, 0.05), is_broken(at_most, 10.6, 0.05)
    (False, True)
    """
    return constraint.excess(value / (1 + margin) if constraint.sign > 0 else value * (1 + margin)) > 0


def _frozen_share(replayer: Replayer) -> float:
    """Share of units that were frozen, on average over a run's scorings; 1 of a run without any, which tells nothing."""
    scorings = replayer.recording.scorings
    return fmean(len(scoring.frozen_units) / len(scoring.frozen) for scoring in scorings) if scorings else 1.0

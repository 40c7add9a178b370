"""Turn away trials that will break a constraint, before they cost anything: by replay of the runs a study has finished."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
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
# Until so many trials have been forecast and trained, forecasts count as off by as much as this.
_FEWEST_CHECKED = 2
_UNCHECKED_MARGIN = 0.5
# Finished runs among which the one to replay is looked for.
_MOST_TRIED = 8


@dataclass(frozen=True)
class Forecast:
    """What a trial is thought to come to.

    Attributes:
        by_constraint: Its figure, by the text of each constraint that can be told.
        told_from: Folder of the finished run that tells it, below the study's; empty if none does.
        untold: Why a constraint on a figure that can be forecast is not among them; empty if all are.
    """

    by_constraint: Mapping[str, float]
    told_from: str = ""
    untold: str = ""


@dataclass
class Prefilter:
    """Forecasts what a trial would come to, from the finished runs of its study that lie on this disk.

    Attributes:
        study_file: What is searched.
    """

    study_file: StudyFile
    _runs: dict[Path, Replayer | None] = field(default_factory=dict)
    _told: set[Path] = field(default_factory=set)

    def forecast(self, config: Config) -> Forecast:
        """What a run would come to, for each constraint that can be told.

        The figures are those of a replay of a finished run: of those whose scores tell about this one that with the fewest scores
        of earlier scorings, and of equals that which froze least. The peak, where none tells, follows from any run on the same
        data.
        """
        wanted = [constraint for constraint in self.study_file.constraints if constraint.figure in FORECAST]
        try:
            figures, told_from, untold = self._replay(config)
            if _PEAK not in figures and any(constraint.figure == _PEAK for constraint in wanted):
                peak, scaled_from = self._scale_peak(config)
                figures, told_from = {**figures, **peak}, told_from or scaled_from
        except Exception as error:  # noqa: BLE001 - a forecast is a favour, and must not cost the trial
            log.warning("no forecast is made: %s: %s", type(error).__name__, error)
            return Forecast({}, untold=f"{type(error).__name__}: {error}")
        found = {constraint.text: figures[constraint.figure] for constraint in wanted if constraint.figure in figures}
        return Forecast(found, told_from if found else "", untold if len(found) < len(wanted) else "")

    def find_reason(self, forecast: Forecast, errors: Mapping[str, Sequence[float]]) -> str | None:
        """Why a trial is turned away, if it is: the constraints that it would break by more than forecasts are off.

        Args:
            forecast: Of the trial.
            errors: By text of a constraint, forecast / truth - 1 of trials that were trained.
        """
        least = self.study_file.settings.prefilter_margin
        found = [
            (constraint, forecast.by_constraint[constraint.text])
            for constraint in self.study_file.constraints
            if constraint.text in forecast.by_constraint
        ]
        broken = [
            f"{constraint.figure} would be {format_figure(constraint.figure, value)}, and is to be "
            f"{constraint.describe_bound()}"
            for constraint, value in found
            if is_broken(constraint, value, find_margin(constraint, errors.get(constraint.text, ()), least))
        ]
        return "; ".join(broken) or None

    def _replay(self, config: Config) -> tuple[Mapping[str, float], str, str]:
        """The figures of a replay, the run they are of, and why there are none, or not all."""
        usable: list[tuple[float, Replayer]] = []
        untold = "no run of this study and seed has finished here"
        for replayer in sorted(self._finished(config.seed), key=_frozen_share):
            try:
                usable.append((replayer.history(config).stale_share, replayer))
            except ConfigError as error:
                untold = str(error)
            if len(usable) == _MOST_TRIED:
                break
        stale_share, chosen = min(usable, key=lambda entry: entry[0], default=(1.0, None))
        if chosen is None:
            return {}, "", untold
        if stale_share > _MOST_STALE:
            return (
                {},
                "",
                f"{stale_share:.0%} of the scores it would go by are not recorded, as their units were frozen",
            )
        replayed = chosen.replay(config)
        if replayed.no_forecast and chosen.recording.path not in self._told:
            self._told.add(chosen.recording.path)
            log.warning("costs are not forecast: %s", replayed.no_forecast)
        return replayed.forecast, self._name(chosen), replayed.no_forecast

    def _scale_peak(self, config: Config) -> tuple[Mapping[str, float], str]:
        for replayer in self._finished(config.seed):
            with suppress(ConfigError):
                return {_PEAK: forecast_peak(replayer.recording, config)}, self._name(replayer)
        return {}, ""

    def _name(self, replayer: Replayer) -> str:
        return replayer.recording.path.relative_to(self.study_file.folder).as_posix()

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


def find_margin(constraint: Constraint, errors: Sequence[float], least: float) -> float:
    """Share by which forecasts for a constraint may be off, by the trials in which they were held against the truth.

    Only errors to the side on which a trial would be turned away for nothing count.

    >>> at_most = Constraint("frozen_depth <= 10", "frozen_depth", 10.0, 1)
    >>> find_margin(at_most, [0.2], 0.05), find_margin(at_most, [0.2, -0.4, 0.1], 0.05), find_margin(at_most, [0.0, -0.4], 0.05)
    (0.5, 0.2, 0.05)
    """
    if len(errors) < _FEWEST_CHECKED:
        return max(least, _UNCHECKED_MARGIN)
    if constraint.sign > 0:
        return max(least, *errors)
    return max(least, *(1 / (1 + error) - 1 if error > -1 else math.inf for error in errors))


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

"""Where figures go: the run folder always, W&B and Accelerate's other trackers on request.

Every key that is logged is listed here, once. A tracker that fails is named once and left; training goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, WandBTracker

from safe_lab.freezing import Scoring
from safe_lab.run_folder import SHARPNESS_ROWS, RunFolder
from safe_lab.units import Unit

log = logging.getLogger(__name__)

STEP = "step"
EPOCH = "epoch"
LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
GRADIENT_NORM = "train/gradient_norm"
LEVEL = "freezing/threshold"
FROZEN_SHARE = "freezing/frozen_share"
FROZEN_DEPTH = "freezing/frozen_depth"
TRAINABLE = "freezing/trainable_parameters"
WALL_SECONDS = "resources/wall_seconds"
TOKENS_PER_SECOND = "resources/tokens_per_second"
GRADIENT_BYTES = "resources/gradient_bytes_per_step"
# Each figure of Meter.recent while training, and of result.json's "resources" in a tracker's summary.
RESOURCES = "resources/{name}"
# Each figure of what freezing is turned into: Trainer's effect.
SAVINGS = "savings/{name}"
# <split>/<metric> for each validation split and task metric, e.g. validation/accuracy: see data.tasks.metric_key.
ADAPTER_SCORE = "adapter/{depth}/score"
ADAPTER_NORMALIZED = "adapter/{depth}/normalized_score"
ADAPTER_FROZEN = "adapter/{depth}/frozen"
ADAPTER_THRESHOLD = "adapter/{depth}/threshold"
ADAPTER_UPDATE_NORM = "adapter/{depth}/update_norm"

# Each single number of the sharpness measured during training, and of result.json's "sharpness" in a tracker's summary.
SHARPNESS = "sharpness/{name}"

EVENT_COLUMNS = ("step", "epoch", "scoring", "units", "scores", "threshold", "frozen_share", "frozen_depth")


class Tracking:
    """Writes rows to the run folder and passes them on."""

    def __init__(self, folder: RunFolder, units: Sequence[Unit], trackers: Sequence[GeneralTracker] = ()) -> None:
        """Track into a folder and, besides, to ``trackers`` (see :func:`start_trackers`)."""
        self._folder = folder
        self._units = units
        self._trackers = list(trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl; it has ``step`` and ``epoch``."""
        self._folder.append("metrics.jsonl", row)
        self._send(row)

    def log_processes(self, step: int, figures: Sequence[Mapping[str, Any]]) -> None:
        """A row of processes.jsonl for each process, with what it has used itself."""
        for rank, figures_of_one in enumerate(figures):
            own = {RESOURCES.format(name=name): value for name, value in figures_of_one.items()}
            self._folder.append("processes.jsonl", {STEP: step, "process": rank, **own})

    def log_scoring(self, scoring: Scoring, epoch: float, effect: Mapping[str, int | None]) -> None:
        """A row of importance.jsonl for each unit, and one of events.jsonl if a unit froze, with what that is turned into."""
        nothing: list[float | None] = [None] * len(self._units)
        scores, normalized = scoring.scores or nothing, scoring.normalized or nothing
        values: dict[str, Any] = {STEP: scoring.step, EPOCH: epoch}
        for i, unit in enumerate(self._units):
            row = {
                "step": scoring.step,
                "epoch": epoch,
                "scoring": scoring.t,
                "unit": unit.name,
                "depth": unit.depth,
                "score": scores[i],
                "normalized_score": normalized[i],
                "threshold": scoring.level,
                "frozen": scoring.frozen[i],
                "update_norm": scoring.update_norms[i],
            }
            self._folder.append("importance.jsonl", row)
            values |= self._adapter_values(row)
        self._send(values)
        if scoring.froze:
            event = {
                "step": scoring.step,
                "epoch": epoch,
                "scoring": scoring.t,
                "units": [self._units[i].name for i in scoring.froze],
                "scores": [scores[i] for i in scoring.froze],
                "threshold": scoring.level,
                "frozen_share": scoring.frozen_share,
                "frozen_depth": scoring.frozen_depth,
                **effect,
            }
            self._folder.append("events.jsonl", event)

    def log_sharpness(self, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        """A row of sharpness.jsonl."""
        row = {STEP: step, EPOCH: epoch, **{SHARPNESS.format(name=name): value for name, value in figures.items()}}
        self._folder.append(SHARPNESS_ROWS, row)
        self._send(row)

    def replay(self) -> None:
        """Send the folder's rows to the trackers: a resumed run's charts begin where the run began."""
        if not self._trackers:
            return
        rows = [(row[STEP], 0, row) for row in self._folder.rows("metrics.jsonl")]
        rows += [
            (row["step"], 1, {STEP: row["step"], EPOCH: row["epoch"]} | self._adapter_values(row))
            for row in self._folder.rows("importance.jsonl")
        ]
        rows += [(row[STEP], 2, row) for row in self._folder.rows(SHARPNESS_ROWS)]
        for _, _, row in sorted(rows, key=lambda entry: entry[:2]):
            self._send(row)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Send result, table of freeze events and schedule."""
        for tracker in list(self._trackers):
            if tracker.name == "wandb":
                self._guard(tracker, partial(self._finish_wandb, tracker.tracker, summary))

    def summarize_sharpness(self, figures: Mapping[str, float], pictures: Sequence[Path]) -> None:
        """Send the sharpness at the end, and its pictures."""
        for tracker in list(self._trackers):
            if tracker.name == "wandb":
                self._guard(tracker, partial(self._add_sharpness, tracker.tracker, figures, pictures))

    def close(self) -> None:
        """Close the trackers, also after a failure: what was sent is kept, and the next run starts its own."""
        for tracker in list(self._trackers):
            self._guard(tracker, tracker.finish)
        self._trackers.clear()

    def _adapter_values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        depth = row["depth"]
        values = {
            ADAPTER_SCORE: row["score"],
            ADAPTER_NORMALIZED: row["normalized_score"],
            ADAPTER_FROZEN: int(row["frozen"]),
            ADAPTER_THRESHOLD: row["threshold"],
            ADAPTER_UPDATE_NORM: row["update_norm"],
        }
        return {key.format(depth=depth): value for key, value in values.items() if value is not None}

    def _send(self, values: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in list(self._trackers):
            self._guard(tracker, partial(tracker.log, numbers, step=values[STEP]))

    def _finish_wandb(self, run: Any, summary: Mapping[str, Any]) -> None:
        import wandb

        events = self._folder.rows("events.jsonl")
        table = wandb.Table(
            columns=list(EVENT_COLUMNS), data=[[_cell(event[column]) for column in EVENT_COLUMNS] for event in events]
        )
        run.log({"freeze_events": table})
        schedule = wandb.Artifact(
            f"freeze-schedule-{run.id}", type="freeze-schedule", metadata={"num_events": len(events)}
        )
        for file in ("config.yaml", "importance.jsonl", "events.jsonl"):
            if (self._folder.path / file).exists():
                schedule.add_file(str(self._folder.path / file))
        run.log_artifact(schedule)
        run.summary.update(summary)

    @staticmethod
    def _add_sharpness(run: Any, figures: Mapping[str, float], pictures: Sequence[Path]) -> None:
        import wandb

        run.summary.update({SHARPNESS.format(name=name): value for name, value in figures.items()})
        if pictures:
            run.log({SHARPNESS.format(name=path.stem): wandb.Image(str(path)) for path in pictures})

    def _guard(self, tracker: GeneralTracker, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's code raises, training goes on
            self._trackers.remove(tracker)
            log.warning(
                "tracker %s failed and is left: %s: %s; training goes on", tracker.name, type(error).__name__, error
            )


def start_trackers(
    *, wandb: str, others: Sequence[str], project: str, name: str, group: str, folder: Path, config: Mapping[str, Any]
) -> list[GeneralTracker]:
    """Start Accelerate's trackers by name; one that cannot start is named and left out.

    Args:
        wandb: ``offline``, ``online`` or ``disabled``.
        others: Names of Accelerate's other trackers.
        project: Project name.
        name: Name of the run.
        group: Name of the experiment, by which W&B groups runs.
        folder: Where trackers put their files.
        config: The resolved configuration.
    """
    started: list[GeneralTracker] = []
    for tracker in (*([] if wandb == "disabled" else ["wandb"]), *others):
        try:
            started.append(
                _start_wandb(wandb, project, name, group, folder, config)
                if tracker == "wandb"
                else _start(tracker, project, folder, config)
            )
        except Exception as error:  # noqa: BLE001 - whatever a tracker's code raises, training goes on
            log.warning(
                "tracker %s cannot start: %s: %s; training goes on without it", tracker, type(error).__name__, error
            )
    return started


def log_group(
    *,
    kind: Literal["sweep", "ablation"],
    mode: Literal["offline", "online"],
    project: str,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    summary: Mapping[str, Any],
    identity: str,
    pictures: Mapping[str, Any] | None = None,
) -> None:
    """Send what many runs came to, as a W&B run in their group; a W&B that fails is told and left.

    Args:
        kind: What made them.
        mode: ``offline`` or ``online``.
        project: Project name.
        name: By which its runs are grouped too.
        folder: Where W&B puts its files.
        config: What was asked for.
        tables: By name, rows that all have the same columns.
        summary: What it came to.
        identity: Told again, it is the same run.
        pictures: Plotly's figures, by name.
    """
    try:
        import wandb

        _require_key(mode)
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(
            project=project,
            name=name,
            group=name,
            job_type=kind,
            id=identity,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(config),
            settings=settings,
        )
        for title, rows in tables.items():
            if rows:
                columns: list[str | int] = list(rows[0])
                data = [[_cell(value) for value in row.values()] for row in rows]
                run.log({title: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
        for title, picture in (pictures or {}).items():
            run.log({f"pictures/{title}": wandb.Plotly(picture)})
        run.summary.update(dict(summary))
        run.finish()
    except Exception as error:  # noqa: BLE001 - whatever a tracker's code raises, the runs have ended well
        log.warning("tracker wandb failed and is left: %s: %s", type(error).__name__, error)


def _require_key(mode: str) -> None:
    import wandb

    # W&B asks for a key on the terminal where it finds none, and nothing must wait for that.
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.Api().api_key):
        raise RuntimeError("no API key: run `wandb login` first, or set tracking.wandb=offline")


def _start_wandb(
    mode: str, project: str, name: str, group: str, folder: Path, config: Mapping[str, Any]
) -> GeneralTracker:
    import wandb

    _require_key(mode)
    settings = wandb.Settings(silent=True, console="off")
    tracker = WandBTracker(project, name=name, group=group, dir=str(folder), mode=mode, settings=settings)
    tracker.start()
    tracker.store_init_configuration(dict(config))
    tracker.tracker.define_metric(STEP)
    tracker.tracker.define_metric("*", step_metric=STEP)
    return tracker


def _start(name: str, project: str, folder: Path, config: Mapping[str, Any]) -> GeneralTracker:
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    tracker: GeneralTracker = (
        tracker_class(project, str(folder)) if tracker_class.requires_logging_directory else tracker_class(project)
    )
    tracker.start()
    tracker.store_init_configuration(dict(_flatten(config)))
    return tracker


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, int | float | str | bool) else str(value)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in value)
    return value

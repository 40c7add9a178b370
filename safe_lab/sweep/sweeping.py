"""A study from its file to its outcome, with the workers of this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safe_lab import run_folder
from safe_lab.hardware import environments, find_gpus
from safe_lab.run_folder import RunFolder, to_json
from safe_lab.section import ConfigError
from safe_lab.sweep.joining import alone, exists, join, read_identity
from safe_lab.sweep.outcome import Outcome
from safe_lab.sweep.pictures import draw, measure_importance
from safe_lab.sweep.roster import Roster
from safe_lab.sweep.storage import default_address, default_path, open_storage, takes_one_worker
from safe_lab.sweep.study_file import StudyFile
from safe_lab.sweep.supervisor import Supervisor
from safe_lab.trainings import check_data

log = logging.getLogger(__name__)


def run(
    study_file: StudyFile,
    *,
    workers: int = 1,
    address: str | None = None,
    export: Path | None = None,
    show: Callable[[str], None],
) -> Outcome:
    """Begin a study, go on with it, or join others that work on it, until it has come to its end.

    Args:
        study_file: What is searched.
        workers: Trials at a time on this machine.
        address: Of the storage; None: a file in the study's folder.
        export: Folder for a YAML file of each point of the front; None: none is written.
        show: Called with a line for the person, again and again.

    Raises:
        ConfigError: Something the user can mend.
        RuntimeError: The workers die again and again.
    """
    for note in study_file.notes:
        show(note)
    gpus = find_gpus()
    worker_environments = environments(workers, gpus)
    if not gpus:
        _refuse_what_gpus_tell(study_file)
    address = address or _find_address(study_file.folder, workers)
    if takes_one_worker(address) and workers > 1:
        raise ConfigError(
            f"--workers {workers}: SQLite is for one worker; a study that begins with several is kept in a journal, into which "
            "optuna.copy_study brings one that has begun"
        )
    try:
        study_file.folder.mkdir(parents=True, exist_ok=True)
        if export is not None:
            export.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be written to: {error}") from None
    with ExitStack() as held:
        if takes_one_worker(address):
            taken = "a sweep is running here, and SQLite is for one worker; end it, and start both with --storage journal://PATH"
            held.enter_context(run_folder.hold(study_file.folder, taken))
        storage = open_storage(address)
        if not exists(study_file, storage) and not any(key.startswith("data.") for key in study_file.space.keys):
            check_data(study_file.config_of(0, {}, study_file.settings.seeds[0]))
        study = join(study_file, storage, address)
        Supervisor(study_file, study, address, worker_environments, show).run()
    objectives = study_file.objectives
    roster = Roster(study.get_trials(deepcopy=False), study_file.settings.num_trials)
    outcome = Outcome(study_file, roster, measure_importance(study, objectives))
    pictures: Mapping[str, Any] = {}
    with alone(study_file.folder):
        RunFolder(study_file.folder).write("result.json", to_json(outcome.to_dict()))
        try:
            pictures = draw(study, objectives, outcome.importance, study_file.folder / "pictures")
        except (ValueError, RuntimeError, OSError) as error:
            log.warning("no pictures were drawn: %s", error)
        if export is not None:
            outcome.export(export)
    _log_to_wandb(outcome, pictures)
    return outcome


def _log_to_wandb(outcome: Outcome, pictures: Mapping[str, Any]) -> None:
    """One run beside those of the trials, in the same group: the table of the trials, and what they came to."""
    study_file = outcome.study_file
    config = study_file.config_of(0, {}, study_file.settings.seeds[0])
    if config.tracking.wandb == "disabled":
        return
    from safe_lab.tracking import log_group

    log_group(
        kind="sweep",
        mode=config.tracking.wandb,
        project=config.tracking.project,
        name=study_file.settings.name,
        folder=study_file.folder,
        config=study_file.definition(),
        tables={"trials": outcome.rows()},
        summary=outcome.to_dict(),
        pictures=pictures,
        identity=read_identity(study_file.folder),
    )


def _refuse_what_gpus_tell(study_file: StudyFile) -> None:
    """Refuse figures for which this machine has no meter: each trial would train to its end, and then fail.

    Raises:
        ConfigError: There are such.
    """
    wanted = [*study_file.objectives, *(constraint.figure for constraint in study_file.constraints)]
    told = [name for name in wanted if name.startswith(("resources/device_", "resources/joules"))]
    if told:
        raise ConfigError(f"{', '.join(told)}: this machine has no GPU, and nothing to measure that by")


def _find_address(folder: Path, workers: int) -> str:
    """The study's file that is there; else the one that suits the number of workers."""
    there = [several for several in (True, False) if default_path(folder, several=several).exists()]
    several = there[0] if there else workers > 1
    return default_address(folder, several=several)

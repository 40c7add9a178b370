"""Make a study, or join one that is there: in its storage and in its folder."""

from __future__ import annotations

import fcntl
import json
import socket
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from safe_lab import yaml_core
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError
from safe_lab.sweep.roster import KNOWN, ROOT, TICKET, VOID
from safe_lab.sweep.storage import hide_password
from safe_lab.sweep.study_file import StudyFile

DEFINITION = "definition"
FOLDER = "folder/{identity}"
_FILE = "study.yaml"
_IDENTITY_FILE = "study_id"


def join(study_file: StudyFile, storage: BaseStorage, address: str) -> Study:
    """The study in its storage and folder, made where it is not there yet, with its known points in the queue.

    Safe to call from several machines at the same moment.

    Raises:
        ConfigError: What is there under this name is another study, or its folder holds another one's.
    """
    settings, shown = study_file.settings, hide_password(address)
    study = optuna.create_study(
        study_name=settings.name, storage=storage, directions=list(settings.objectives.values()), load_if_exists=True
    )
    ours, theirs = study_file.definition(), study.user_attrs.get(DEFINITION)
    if theirs is None:
        if study.get_trials(deepcopy=False):
            raise ConfigError(
                f"{shown} holds a study {settings.name!r} that is not of safe_lab; give this one another name"
            )
        study.set_metric_names(list(settings.objectives))
        study.set_user_attr(DEFINITION, ours)
        # Another machine may have done the same at this moment, with another file.
        theirs = study.user_attrs[DEFINITION]
    found = list(_differences(json.loads(json.dumps(theirs)), json.loads(json.dumps(ours))))
    if found:
        raise ConfigError(
            f"{shown} holds a study {settings.name!r} of another definition, and its trials would not be comparable; "
            f"give this one another name, or remove it there and {study_file.folder} to begin anew\n" + "\n".join(found)
        )
    _claim_folder(study_file, study, shown)
    _enqueue(study_file, study)
    return study


def exists(study_file: StudyFile, storage: BaseStorage) -> bool:
    """Whether a storage has a study of this name."""
    return study_file.settings.name in optuna.get_all_study_names(storage)


def open_study(study_file: StudyFile, storage: BaseStorage) -> Study:
    """The study of a worker, to which it has been joined before."""
    return optuna.load_study(
        study_name=study_file.settings.name,
        storage=storage,
        sampler=study_file.build_sampler(),
        pruner=study_file.build_pruner(),
    )


def read_identity(folder: Path) -> str:
    """What names the folder of a study, to which it has been joined."""
    return (folder / _IDENTITY_FILE).read_text().strip()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other command writes the files that they share in a study's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _claim_folder(study_file: StudyFile, study: Study, shown: str) -> None:
    """Name the folder as one of the study's, of which there may be one on each machine."""
    folder = study_file.folder
    try:
        with alone(folder):
            held = folder / _IDENTITY_FILE
            identity = held.read_text().strip() if held.exists() else uuid.uuid4().hex
            if held.exists() and FOLDER.format(identity=identity) not in study.user_attrs:
                raise ConfigError(
                    f"{folder}: holds the runs of another study of this name than {shown} does; "
                    "give this one another name or output_dir"
                )
            files = RunFolder(folder)
            if not held.exists():
                # First there: a folder whose name the study does not know would be another's.
                study.set_user_attr(FOLDER.format(identity=identity), socket.gethostname())
                files.write(_IDENTITY_FILE, identity + "\n")
            files.write(_FILE, yaml_core.write(study_file.settings.model_dump(mode="json")))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error})") from None


def _enqueue(study_file: StudyFile, study: Study) -> None:
    trials = study.get_trials(deepcopy=False)
    there = {
        trial.user_attrs.get(TICKET)
        for trial in trials
        if VOID not in trial.user_attrs and ROOT not in trial.user_attrs
    }
    seen: Counter[str] = Counter()
    for point in study_file.points:
        # By what it is and not by its place, which another point may have by now.
        text = json.dumps(point, sort_keys=True)
        seen[text] += 1
        ticket = f"point {text}, {seen[text]}"
        if ticket not in there:
            study.enqueue_trial(point, user_attrs={TICKET: ticket, KNOWN: True})


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield f"{key}: {_plain(old)} there, {_plain(new)} here"


def _plain(value: Any) -> str:
    return "nothing" if value is None else yaml_core.write(value, flow=True).removesuffix("...\n").strip()

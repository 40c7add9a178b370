"""An experiment from its file to what it comes to."""

from __future__ import annotations

import uuid

from safe_lab import run_folder, yaml_core
from safe_lab.ablation.comparison import Comparison, compare
from safe_lab.ablation.experiment_file import Experiment
from safe_lab.ablation.records import read_experiment
from safe_lab.ablation.running import Show, State, run_missing
from safe_lab.hardware import environments, find_gpus
from safe_lab.run_folder import RunFolder, to_json
from safe_lab.section import ConfigError
from safe_lab.trainings import check_data, is_finished

_IDENTITY_FILE = "experiment_id"


def run(experiment: Experiment, *, workers: int = 1, show: Show) -> Comparison:
    """Train what is missing of an experiment, and compare.

    Args:
        experiment: What is to be there.
        workers: Trainings at a time on this machine.
        show: Called whenever a run's state has changed.

    Returns:
        The comparison, which also lies as ``comparison.json`` in the experiment's folder, and is told to W&B where its runs are.

    Raises:
        ConfigError: Something the user can mend.
        OSError: The machine is at fault; the same call goes on once that is mended.
    """
    gpus = find_gpus()
    shares = environments(workers, gpus)
    if not any(is_finished(experiment.config_of(*run)) for run in experiment.runs):
        check_data(experiment.config_of(*experiment.runs[0]))
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{experiment.folder}: cannot be written to ({error})") from None
    files = RunFolder(experiment.folder)
    with run_folder.hold(experiment.folder, "the experiment is being run here by another command"):
        files.write("experiment.yaml", yaml_core.write(experiment.to_dict()))
        stood = run_missing(experiment, shares, show, on_gpus=bool(gpus))
        failures = {(run.variant, run.seed): run.note for run in stood if run.state == State.FAILED}
        found = compare_runs(experiment, failures)
        files.write("comparison.json", to_json(found.to_dict()))
        _log_to_wandb(experiment, found)
    return found


def compare_runs(experiment: Experiment, failures: dict[tuple[str, int], str]) -> Comparison:
    """What the runs of an experiment come to, as far as they are there."""
    return compare(read_experiment(experiment, failures), experiment.rules, experiment.baseline)


def _log_to_wandb(experiment: Experiment, found: Comparison) -> None:
    """One run beside those of the variants, in the same group: the table of the comparison."""
    config = experiment.config_of(*experiment.runs[0])
    if config.tracking.wandb == "disabled":
        return
    from safe_lab.tracking import log_group

    log_group(
        kind="ablation",
        mode=config.tracking.wandb,
        project=config.tracking.project,
        name=experiment.name,
        folder=experiment.folder,
        config=experiment.to_dict(),
        tables={"comparison": found.table()},
        summary={row.variant: row.verdict.value for row in found.rows},
        identity=_identify(experiment),
    )


def _identify(experiment: Experiment) -> str:
    """What names the experiment in this folder for as long as it is there."""
    path = experiment.folder / _IDENTITY_FILE
    if not path.exists():
        RunFolder(experiment.folder).write(_IDENTITY_FILE, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()

"""Whole studies: real processes, really killed; whatever dies, the study ends with the trials that were asked for."""

import json
import subprocess
import sys

import optuna
import psutil
import pytest
from parallel import free_port
from sweep_tools import processes_of, trainings_of, wait_for

from safe_lab import config as configuration
from safe_lab.run import run
from safe_lab.sweep.roster import root_of
from safe_lab.sweep.storage import open_storage

LONG = {"epochs": 30, "save_every": 5, "keep_checkpoints": 1, "eval_every": 20}


def test_a_study_gives_its_best_trial_and_a_folder_for_each(sweep):
    sweep.write(enqueue=[{"training.learning_rate": 0.05}])
    with sweep.start("--json") as process:
        found = sweep.finish(process)
    assert (found["complete"], found["pruned"], found["failed"], found["open"]) == (3, 0, 0, 0)
    (best,) = found["front"]
    results = [json.loads((sweep.folder / f"trial-{i:04d}/seed-0/result.json").read_text()) for i in range(3)]
    assert best["values"]["validation/accuracy"] == max(result["metrics"]["validation/accuracy"] for result in results)
    assert configuration.load(sweep.folder / "trial-0000/seed-0/config.yaml").training.learning_rate == 0.05
    assert json.loads((sweep.folder / "result.json").read_text()) == found
    assert not list(sweep.folder.glob("trial-*/seed-*/checkpoints"))


def test_a_study_is_gone_on_with_and_ends_with_the_trials_it_is_given_then(sweep):
    sweep.write()
    first = sweep.run("--trials", 1)
    assert first["complete"] == 1
    before = (sweep.folder / "trial-0000/seed-0/result.json").stat().st_mtime_ns
    assert sweep.run("--trials", 3)["complete"] == 3
    assert (sweep.folder / "trial-0000/seed-0/result.json").stat().st_mtime_ns == before
    # All there is was done before: nothing is started.
    assert sweep.run()["complete"] == 3
    sweep.write(space={"training.learning_rate": {"low": 1e-3, "high": 1.0, "log": True}})
    said = sweep.refuse()
    assert "of another definition" in said
    assert "space.training.learning_rate.high: 0.1 there, 1.0 here" in said


def test_an_exported_point_trains_again_to_the_bit(sweep, tmp_path):
    sweep.write(seeds=[3], num_trials=2)
    (best,) = sweep.run("--export", tmp_path / "front")["front"]
    (file,) = (tmp_path / "front").iterdir()
    result = run(configuration.load(file))
    assert result.metrics["validation/accuracy"] == best["values"]["validation/accuracy"]
    ours, theirs = (
        folder / "adapter" / "adapter_model.safetensors"
        for folder in (configuration.load(file).run_folder, sweep.folder / f"trial-{best['trial']:04d}" / "seed-3")
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_point_that_was_trained_is_not_trained_again(sweep):
    sweep.write(space={"training.batch_size": [4]}, num_trials=3, seeds=2)
    found = sweep.run()
    assert (found["complete"], len(found["front"])) == (3, 1)
    assert [trial["same_as"] for trial in found["trials"]] == [None, 0, 0]
    assert found["trials"][1]["values"] == found["trials"][0]["values"]
    assert [path.name for path in sweep.folder.glob("trial-*")] == ["trial-0000"]


def test_another_point_is_drawn_for_one_that_was_tried(sweep):
    sweep.write(space={"training.batch_size": [4, 8, 16]}, num_trials=3, enqueue=[{"training.batch_size": 8}])
    found = sweep.run()
    assert {trial["settings"]["training.batch_size"] for trial in found["trials"]} == {4, 8, 16}
    assert [trial["same_as"] for trial in found["trials"]] == [None] * 3


def test_data_that_are_not_there_are_told_before_the_first_trial(sweep):
    path = sweep.tree["base"]["data"]["path"]
    sweep.tree["base"]["data"]["path"] = "nowhere.csv"
    sweep.write(num_trials=1)
    assert "data: " in sweep.refuse()
    # Nothing has been begun that would now be of another definition.
    sweep.tree["base"]["data"]["path"] = path
    sweep.write()
    assert sweep.run()["complete"] == 1


def test_means_over_seeds_are_told_with_their_spread(sweep):
    sweep.write(seeds=2, num_trials=1, objectives={"validation/accuracy": "maximize", "validation/loss": "minimize"})
    (point,) = sweep.run()["front"]
    losses = [
        json.loads((sweep.folder / f"trial-0000/seed-{seed}/result.json").read_text())["metrics"]["validation/loss"]
        for seed in (0, 1)
    ]
    assert point["by_seed"]["validation/loss"] == losses
    assert point["values"]["validation/loss"] == pytest.approx(sum(losses) / 2)
    assert point["spread"]["validation/loss"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)


def test_a_trial_that_fails_is_named_with_its_reason_and_the_study_goes_on(sweep):
    sweep.write(
        space={"training.learning_rate": [0.01, 1e30], "adapter.target_modules": [["query"], ["nowhere"]]},
        enqueue=[
            {"training.learning_rate": 1e30, "adapter.target_modules": ["query"]},
            {"training.learning_rate": 0.01, "adapter.target_modules": ["nowhere"]},
            {"training.learning_rate": 0.01, "adapter.target_modules": ["query"]},
        ],
    )
    found = sweep.run()
    assert (found["complete"], found["failed"]) == (1, 2)
    assert "stopped: " in found["failures"]["0"]
    assert "nowhere" in found["failures"]["1"]
    assert found["front"][0]["trial"] == 2


def test_a_trial_that_breaks_a_constraint_is_no_solution(sweep):
    sweep.write(
        space={"training.batch_size": [4, 16]},
        objectives={"resources/tokens_computed": "minimize"},
        constraints=["resources/memory_peak_bytes <= 1KiB"],
        enqueue=[{"training.batch_size": 4}],
        num_trials=1,
    )
    found = sweep.run()
    assert (found["complete"], found["front"], found["nearest"]) == (1, [], 0)
    (trial,) = found["trials"]
    assert trial["constraints"]["resources/memory_peak_bytes <= 1KiB"]["value"] > 1024
    assert not trial["constraints"]["resources/memory_peak_bytes <= 1KiB"]["is_kept"]


def test_trials_that_will_break_a_constraint_are_turned_away_by_replay_of_those_before(sweep):
    sweep.tree["base"]["training"] |= {"epochs": 3, "log_every": 1}
    points = [{"freezing.final_threshold": value} for value in (0.0, 2.0, 0.4)]
    sweep.write(
        space={"freezing.final_threshold": {"low": 0.0, "high": 2.0}},
        constraints=["frozen_share <= 0.5", "resources/memory_peak_bytes <= 1GiB"],
        enqueue=points,
        prefilter=True,
    )
    found = sweep.run()
    assert (found["complete"], found["pruned"], found["failed"]) == (2, 1, 0)
    assert found["turned_away"] == {"1": "frozen_share would be 1, and is to be at most 0.5"}
    assert not (sweep.folder / "trial-0001").exists()
    trained, away, third = found["trials"]
    assert "no run of this study and seed has finished" in trained["no_forecast"]
    assert (away["state"], away["values"], away["forecast_from"]) == ("pruned", None, "trial-0000/seed-0")
    assert away["constraints"]["frozen_share <= 0.5"] == {"value": None, "forecast": 1.0, "is_kept": False}
    assert away["settings"] == {"freezing.final_threshold": 2.0}
    assert third["constraints"]["frozen_share <= 0.5"]["is_kept"]
    # The first had none to be told by; the third was told by it, and trained.
    (error,) = found["forecast_errors"]["resources/memory_peak_bytes <= 1GiB"]
    assert abs(error) < 0.1


def test_hopeless_trials_are_pruned_by_what_they_report(sweep):
    sweep.tree["base"]["training"] |= {"epochs": 4, "eval_every": 2, "log_every": 1}
    sweep.write(
        objectives={"validation/loss": "minimize"},
        pruner={"name": "threshold", "upper": 0.0001},
        num_trials=2,
    )
    found = sweep.run()
    assert (found["complete"], found["pruned"]) == (0, 2)
    assert not (sweep.folder / "trial-0000/seed-0/result.json").exists()
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{sweep.folder / 'study.db'}").trials
    assert all(next(iter(trial.intermediate_values)) == 2 for trial in trials)


def test_a_trial_that_is_behind_seed_by_seed_is_given_up_before_all_have_run(sweep):
    sweep.write(
        space={"training.learning_rate": {"low": 1e-3, "high": 10.0, "log": True}},
        objectives={"validation/loss": "minimize"},
        enqueue=[{"training.learning_rate": 1e-3}, {"training.learning_rate": 10.0}],
        pruner={"name": "wilcoxon", "p_threshold": 0.3, "n_startup_steps": 2},
        seeds=4,
        num_trials=2,
    )
    found = sweep.run()
    assert (found["complete"], found["pruned"]) == (1, 1)
    assert len(list(sweep.folder.glob("trial-0000/seed-*/result.json"))) == 4
    assert 2 <= len(list(sweep.folder.glob("trial-0001/seed-*/result.json"))) < 4


def test_a_trial_that_is_killed_goes_on_from_its_checkpoint(sweep):
    sweep.tree["base"]["training"] |= LONG
    sweep.write(num_trials=1)
    with sweep.start("--json") as process:
        run_folder = sweep.folder / "trial-0000" / "seed-0"
        wait_for(lambda: list(run_folder.glob("checkpoints/step-*")))
        (training,) = trainings_of(process)
        training.kill()
        (again,) = wait_for(lambda: [p for p in trainings_of(process) if p.pid != training.pid])
        found = sweep.finish(process)
    assert (found["complete"], found["failed"], found["taken_up"]) == (1, 0, 0)
    check_rows_are_whole(sweep)


def test_a_worker_that_is_killed_leaves_its_trial_to_the_next(sweep):
    sweep.tree["base"]["training"] |= LONG
    sweep.write(num_trials=2)
    with sweep.start("--json") as process:
        wait_for(lambda: list(sweep.folder.glob("trial-0000/seed-0/checkpoints/step-*")))
        (training,) = trainings_of(process)
        (worker,) = processes_of(process, "safe_lab.sweep.worker_process")
        worker.kill()
        # What it had going ends with it.
        training.wait(timeout=20)
        found = sweep.finish(process)
    assert (found["complete"], found["failed"], found["taken_up"], found["open"]) == (2, 0, 1, 0)
    assert sorted(path.name for path in sweep.folder.glob("trial-*")) == ["trial-0000", "trial-0002"]
    check_rows_are_whole(sweep)
    said = sweep.log.read_text()
    assert "trial 0: its worker is gone; it is taken up again" in said
    assert "trial 0 goes on" in said


def test_a_whole_sweep_that_is_killed_goes_on_with_the_same_command(sweep):
    sweep.tree["base"]["training"] |= LONG
    sweep.write(num_trials=1)
    with sweep.start() as process:
        wait_for(lambda: list(sweep.folder.glob("trial-0000/seed-0/checkpoints/step-*")))
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert not psutil.wait_procs(below, timeout=20)[1]
    found = sweep.run()
    assert (found["complete"], found["taken_up"]) == (1, 1)
    check_rows_are_whole(sweep)


def check_rows_are_whole(sweep):
    """No row of the first trial is doubled or missing, and it did not begin anew."""
    steps = [row["step"] for row in sweep.rows(0) if "train/loss" in row]
    assert steps == list(range(2, steps[-1] + 1, 2))
    log = (sweep.folder / "trial-0000" / "seed-0.log").read_text()
    assert "starts anew" not in log


def test_two_workers_share_a_journal_and_each_trial_is_done_once(sweep):
    sweep.write(num_trials=6)
    found = sweep.run("--workers", 2)
    assert (found["complete"], found["failed"], found["taken_up"]) == (6, 0, 0)
    assert len(list(sweep.folder.glob("trial-*"))) == 6
    assert (sweep.folder / "study.journal").exists()
    rates = {
        configuration.load(path).training.learning_rate for path in sweep.folder.glob("trial-*/seed-0/config.yaml")
    }
    assert len(rates) == 6


def test_sqlite_is_for_one_worker(sweep):
    sweep.write()
    assert "SQLite is for one worker" in sweep.refuse(
        "--workers", 2, "--storage", f"sqlite:///{sweep.path.parent}/x.db"
    )


def test_a_storage_that_is_none_is_told(sweep, monkeypatch):
    sweep.write()
    assert "an address such as postgresql://" in sweep.refuse("--storage", "study.db")


def test_three_workers_of_two_commands_share_a_database_and_one_of_them_is_killed(sweep, postgresql):
    sweep.write(num_trials=7)
    with sweep.start("--json", "--workers", 2, "--storage", postgresql.address) as first:
        wait_for(lambda: list(sweep.folder.glob("trial-0000/seed-0.log")))
        with sweep.start("--json", "--storage", postgresql.address) as second:
            wait_for(lambda: len(list(sweep.folder.glob("trial-*/seed-0.log"))) >= 3)
            processes_of(first, "safe_lab.sweep.worker_process")[0].kill()
            found = [sweep.finish(process) for process in (first, second)]
    assert found[0] == found[1]
    assert (found[0]["complete"], found[0]["failed"], found[0]["open"]) == (7, 0, 0)
    study = optuna.load_study(study_name="study", storage=open_storage(postgresql.address))
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 7
    assert len({root_of(trial) for trial in complete}) == 7


SERVE = """
import sys
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend
run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]))
"""


def test_two_workers_share_a_study_behind_optunas_proxy(sweep, tmp_path):
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path / "journal"), str(port)])
    try:
        # The command waits for a storage that does not answer yet.
        sweep.write(num_trials=3)
        with sweep.start("--json", "--storage", f"grpc://127.0.0.1:{port}", "--workers", 2) as process:
            found = sweep.finish(process)
    finally:
        server.kill()
        server.wait()
    assert (found["complete"], found["failed"], found["open"]) == (3, 0, 0)

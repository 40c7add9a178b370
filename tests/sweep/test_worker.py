"""What a worker draws, and what it does with a point that has been tried: without trainings, which these tests make up."""

import optuna
import pytest
from optuna.trial import TrialState

from safe_lab import sweep, yaml_core
from safe_lab.section import ConfigError
from safe_lab.sweep import roster as stored
from safe_lab.sweep.joining import join, open_study
from safe_lab.sweep.owner import describe_owner
from safe_lab.sweep.worker import Worker
from safe_lab.trainings import Ended

FIGURE = "resources/tokens_computed"
POLICY, THRESHOLD = "freezing.policy", "freezing.final_threshold"


@pytest.fixture
def work(tiny_tree, tmp_path, monkeypatch):
    """Work on a study to its end; returns its trials and the points that were trained."""
    del tiny_tree["name"]
    tree = {
        "name": "study",
        "base": tiny_tree,
        "space": {"training.batch_size": [4, 8]},
        "objectives": {FIGURE: "minimize"},
        "sampler": "random",
        "num_trials": 2,
    }
    storage = optuna.storages.InMemoryStorage()

    def run(before=lambda study: None, **changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml_core.write(tree | changes))
        study_file = sweep.load(path)
        join(study_file, storage, "memory")
        study = open_study(study_file, storage)
        before(study)
        trained = []

        def train(worker, trial, number, values):
            trained.append(values)
            result = {"metrics": {}, "resources": {"tokens_computed": len(trained)}}
            return [Ended("finished", result) for _ in study_file.settings.seeds]

        monkeypatch.setattr(Worker, "_train", train)
        Worker(study_file, study, start=None).work()
        return study.trials, trained

    return run


def void(trials):
    return [trial for trial in trials if stored.VOID in trial.user_attrs]


@pytest.mark.parametrize("seed", range(6))
def test_each_point_is_trained_once_and_what_was_drawn_in_vain_counts_for_nothing(work, seed):
    trials, trained = work(sampler_seed=seed)
    assert sorted(values["training.batch_size"] for values in trained) == [4, 8]
    assert len(trials) - len(void(trials)) == 2


def test_some_of_these_were_drawn_in_vain(work):
    trials, trained = work(space={"training.batch_size": [4, 8, 16, 32]}, num_trials=4)
    assert len(trained) == 4
    assert void(trials)
    assert all(trial.state == TrialState.FAIL for trial in void(trials))


def test_where_there_is_no_other_point_a_trial_takes_the_figures_of_the_one_that_was_trained(work):
    trials, trained = work(num_trials=5, seeds=2)
    assert len(trained) == 2
    copies = [trial for trial in trials if stored.SAME_AS in trial.user_attrs]
    assert len(copies) == 3
    assert all(trial.value == trials[trial.user_attrs[stored.SAME_AS]].value for trial in copies)
    assert len(void(trials)) >= 30


def test_a_point_that_another_worker_is_at_is_left_to_it(work):
    def another(study):
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params={"training.batch_size": 4},
                distributions={"training.batch_size": optuna.distributions.CategoricalDistribution((4, 8))},
                user_attrs={stored.OWNER: {"machine": "elsewhere", "process": 1, "since": 0}},
            )
        )
        # It ends before this worker would wait for it.
        stop = study.tell

        def tell(trial, *arguments, **more):
            if stored.VOID not in trial.user_attrs:
                stop(0, 1.0)
            return stop(trial, *arguments, **more)

        study.tell = tell

    trials, trained = work(another)
    assert [values["training.batch_size"] for values in trained] == [8]
    assert trials[0].state == TrialState.COMPLETE


def test_a_known_point_that_was_turned_away_is_looked_at_anew(work):
    def away(study):
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED,
                params={"training.batch_size": 4},
                distributions={"training.batch_size": optuna.distributions.CategoricalDistribution((4, 8))},
                user_attrs={stored.TURNED_AWAY: "too much"},
            )
        )

    _, trained = work(away, enqueue=[{"training.batch_size": 4}], num_trials=2)
    assert trained == [{"training.batch_size": 4}]


def test_a_grid_is_of_points_that_differ_in_what_is_asked_for(work):
    space = {POLICY: ["none", "safe"], THRESHOLD: {"choices": [0.1, 0.2, 0.3], "when": {POLICY: "safe"}}}
    trials, trained = work(space=space, sampler="grid", num_trials=4, enqueue=[{POLICY: "none"}])
    assert trained[0] == {POLICY: "none"}
    assert sorted(values[THRESHOLD] for values in trained[1:]) == [0.1, 0.2, 0.3]
    assert not void(trials)
    with pytest.raises(ConfigError, match="the grid has 4 points"):
        work(space=space, sampler="grid", num_trials=5)


def test_a_trial_that_was_voided_and_left_is_ended_by_another(work):
    def leave(study):
        trial = study.ask()
        trial.set_user_attr(stored.OWNER, describe_owner() | {"since": 1.0})
        trial.set_user_attr(stored.VOID, True)

    trials, _ = work(leave)
    assert trials[0].state == TrialState.FAIL

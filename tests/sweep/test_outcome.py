"""What is told of a study: its front, and where there is none, the trial that is nearest to one."""

import io

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from safe_lab import sweep, yaml_core
from safe_lab.sweep import roster as stored
from safe_lab.sweep.outcome import Outcome, print_tables
from safe_lab.sweep.roster import Roster

MEMORY, DEPTH = "resources/memory_peak_bytes", "frozen_depth"
BOUNDS = [f"{MEMORY} <= 1KiB", f"{DEPTH} >= 4"]
BATCH_SIZE = "training.batch_size"


@pytest.fixture
def outcome(tiny_tree, tmp_path):
    """Make the outcome of a study from its trials."""
    del tiny_tree["name"]
    tree = {
        "name": "study",
        "base": tiny_tree,
        "space": {BATCH_SIZE: {"low": 1, "high": 64}},
        "objectives": {"validation/loss": "minimize"},
        "constraints": BOUNDS,
        "prefilter": True,
        "num_trials": 9,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml_core.write(tree))
    study_file = sweep.load(str(path), [])

    def make(*trials):
        study = optuna.create_study()
        study.add_trials(trials)
        return Outcome(study_file, Roster(study.get_trials(), 9), {})

    return make


def complete(loss, memory, depth, **attributes):
    by_seed = {"validation/loss": [loss], MEMORY: [memory], DEPTH: [depth]}
    trial = create_trial(
        value=loss,
        params={BATCH_SIZE: 8},
        distributions={BATCH_SIZE: optuna.distributions.IntDistribution(1, 64)},
        user_attrs={stored.BY_SEED: by_seed} | attributes,
    )
    for text, excess in zip(BOUNDS, (memory - 1024, 4 - depth), strict=True):
        trial.set_constraint(text, excess)
    return trial


def turned_away(memory, depth):
    return create_trial(
        state=TrialState.PRUNED,
        params={BATCH_SIZE: 64},
        distributions={BATCH_SIZE: optuna.distributions.IntDistribution(1, 64)},
        user_attrs={stored.FORECAST: dict(zip(BOUNDS, (memory, depth), strict=True)), stored.TURNED_AWAY: "too much"},
    )


def printed(found):
    stream = io.StringIO()
    print_tables(found, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_best_trial_is_the_best_of_those_that_keep_the_constraints(outcome):
    found = outcome(complete(0.1, 4096, 4), complete(0.3, 512, 4), complete(0.2, 1024, 5))
    assert [trial.number for trial in found.front] == [2]
    assert found.nearest is None
    assert "trained, and a constraint is broken: 1 of the complete" in printed(found)


def test_where_none_keeps_them_the_nearest_is_named_with_what_it_lacks(outcome):
    # By shares of the bounds: 3 and 0, 0.5 and 0, 0 and 0.75.
    found = outcome(complete(0.1, 4096, 4), complete(0.9, 1536, 4), complete(0.2, 512, 1))
    assert found.nearest.number == 1
    said = printed(found)
    assert "no trial that was trained keeps the constraints" in said
    assert (
        f"nearest is trial 1: {MEMORY} 1.5 KiB (at most 1.0 KiB is asked for), {DEPTH} 4 (at least 4 is asked for)"
        in said
    )


def test_a_trial_that_was_turned_away_may_be_the_nearest_by_its_forecast(outcome):
    found = outcome(complete(0.1, 4096, 4), turned_away(1100, 4))
    assert found.to_dict()["nearest"] == 1
    assert "nearest is trial 1 by its forecast" in printed(found)
    assert found.to_dict()["trials"][1]["constraints"][BOUNDS[0]] == {
        "value": None,
        "forecast": 1100,
        "is_kept": False,
    }


def test_forecasts_are_held_against_the_truth(outcome):
    forecast = {stored.FORECAST: {BOUNDS[0]: 1536}}
    found = outcome(complete(0.1, 1024, 4, **forecast), complete(0.1, 2048, 4))
    assert found.to_dict()["forecast_errors"] == {BOUNDS[0]: [0.5]}
    assert "were off by 50.0%, 50.0% at worst (trainings to tell by: 1)" in printed(found)


def test_a_study_without_a_complete_trial_says_so(outcome):
    failed = create_trial(state=TrialState.FAIL, user_attrs={stored.FAILURE: "stopped: it was not to be\nmore"})
    found = outcome(failed)
    assert found.nearest is None
    assert "trial 0 failed: stopped: it was not to be" in printed(found)
    assert found.to_dict()["trials"][0]["reason"].startswith("stopped: ")

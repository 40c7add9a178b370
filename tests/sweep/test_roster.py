"""Who has which trial: what every worker reads off the same trials, whoever died when."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from safe_lab.sweep import roster as stored
from safe_lab.sweep.roster import Roster, take_up
from safe_lab.sweep.study_file import Constraint


@pytest.fixture
def study():
    return optuna.create_study()


def roster(study, num_trials=9):
    return Roster(study.get_trials(deepcopy=False), num_trials)


def cut_off(study, trial):
    trial.set_user_attr(stored.CUT_OFF, True)
    study.tell(trial, state=TrialState.FAIL)
    return study.trials[trial.number]


def test_trials_that_end_by_themselves_are_finished(study):
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    found = roster(study)
    assert [len(found.of_state(state)) for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)] == [
        1,
        1,
        1,
    ]
    assert [trial.number for trial in found.open] == [3]


def test_a_point_that_was_tried_is_known_again(study):
    space = {"x": optuna.distributions.IntDistribution(1, 9)}

    def add(x, state=TrialState.COMPLETE, **attributes):
        value = 1.0 if state == TrialState.COMPLETE else None
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params={"x": x}, distributions=space, user_attrs=attributes
            )
        )

    add(1)
    add(2, TrialState.FAIL)
    add(3, TrialState.PRUNED)
    add(4, TrialState.PRUNED, **{stored.TURNED_AWAY: "too much"})
    found = [roster(study).find_same({"x": x}, 9) for x in range(1, 6)]
    assert [trial and trial.number for trial in found] == [0, None, None, 3, None]
    add(4)
    assert roster(study).find_same({"x": 4}, 9).number == 4
    running = study.ask(space)
    assert roster(study).find_same(running.params, running.number + 1) is not None


def test_a_trial_that_takes_up_another_goes_on_with_what_is_known_of_it(study):
    trial = study.ask()
    known = {stored.KNOWN: True, stored.KILLED: 2, stored.FORECAST: {"frozen_share <= 0.5": 0.4}}
    for key, value in known.items():
        trial.set_user_attr(key, value)
    taken = take_up(cut_off(study, trial)).user_attrs
    assert {key: taken[key] for key in known} == known


@pytest.mark.parametrize(("forecast", "truth", "error"), [(3.0, 2.0, 0.5), (0.0, 0.0, 0.0), (0.5, 0.0, math.inf)])
def test_forecasts_are_held_against_the_truth_of_the_first_seed(study, forecast, truth, error):
    constraint = Constraint("frozen_share <= 0.5", "frozen_share", 0.5, 1)
    attributes = {stored.FORECAST: {constraint.text: forecast}, stored.BY_SEED: {"frozen_share": [truth, 9.0]}}
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
    assert roster(study).forecast_errors(constraint) == [error]


def test_a_trial_that_was_cut_off_is_open_until_it_has_been_taken_up_and_ended(study):
    left = cut_off(study, study.ask())
    assert [trial.number for trial in roster(study).cut_off] == [0]
    assert not roster(study).finished
    study.add_trial(take_up(left))
    assert not roster(study).cut_off
    assert len(roster(study).open) == 1
    study.tell(study.ask(), 1.0)
    assert [stored.root_of(trial) for trial in roster(study).finished] == [0]
    assert roster(study).num_taken_up == 1


def test_a_trial_can_be_cut_off_again_and_again_and_stays_one_entry(study):
    left = cut_off(study, study.ask())
    for _ in range(3):
        study.add_trial(take_up(left))
        left = cut_off(study, study.ask())
        assert len(roster(study).entries) == 1
        assert [trial.number for trial in roster(study).cut_off] == [left.number]


def test_a_worker_out_of_reach_that_ends_its_trial_first_has_ended_it(study):
    trial = study.ask()
    trial.set_user_attr(stored.CUT_OFF, True)
    study.tell(trial, 1.0)
    assert len(roster(study).finished) == 1
    assert not roster(study).cut_off


def test_of_two_that_took_up_the_same_trial_the_second_is_one_too_many(study):
    left = cut_off(study, study.ask())
    for _ in range(2):
        study.add_trial(take_up(left))
    first, second = study.ask(), study.ask()
    assert not roster(study, 1).is_one_too_many(first.number)
    assert roster(study, 1).is_one_too_many(second.number)


def test_trials_beyond_the_number_asked_for_are_too_many_by_their_numbers(study):
    trials = [study.ask() for _ in range(5)]
    found = roster(study, 3)
    assert [found.is_one_too_many(trial.number) for trial in trials] == [False, False, False, True, True]


def test_void_trials_take_no_place(study):
    void = study.ask()
    void.set_user_attr(stored.VOID, True)
    study.tell(void, state=TrialState.FAIL)
    trial = study.ask()
    assert not roster(study, 1).is_one_too_many(trial.number)
    assert not roster(study).of_state(TrialState.FAIL)


def test_a_known_point_that_two_machines_have_added_counts_once(study):
    for _ in range(2):
        study.enqueue_trial({}, user_attrs={stored.TICKET: "point 0"})
    first, second = study.ask(), study.ask()
    assert [roster(study).is_one_too_many(trial.number) for trial in (first, second)] == [False, True]


def test_one_too_many_whose_worker_died_is_nobodys_concern(study):
    study.tell(study.ask(), 1.0)
    cut_off(study, study.ask())
    found = roster(study, 1)
    assert (found.open, found.cut_off, found.running) == ([], [], [])
    assert [trial.number for trial in roster(study, 2).cut_off] == [1]


def test_what_was_drawn_and_what_the_sampler_noted_goes_on_with_the_trial(study):
    study.sampler = optuna.samplers.GridSampler({"a": [1, 2], "b": [3, 4]}, seed=0)
    trial = study.ask()
    drawn = trial.suggest_int("a", 1, 2)
    study.add_trial(take_up(cut_off(study, trial)))
    again = study.ask()
    assert again.suggest_int("a", 1, 2) == drawn
    assert again.suggest_int("b", 3, 4) in (3, 4)


def test_a_known_point_that_was_cut_off_halfway_keeps_all_its_values(study):
    study.enqueue_trial({"a": 0.5, "b": 0.25})
    trial = study.ask()
    trial.suggest_float("a", 0, 1)
    study.add_trial(take_up(cut_off(study, trial)))
    again = study.ask()
    assert [again.suggest_float(name, 0, 1) for name in ("a", "b")] == [0.5, 0.25]


def test_deaths_of_an_entry_are_counted_over_its_trials(study):
    trial = study.ask()
    trial.set_user_attr(stored.REACHED, ["seed-0/checkpoints/step-000005"])
    for deaths in (1, 2):
        study.add_trial(take_up(cut_off(study, trial)))
        trial = study.ask()
        assert trial.user_attrs[stored.DEATHS] == deaths
        assert trial.user_attrs[stored.REACHED] == ["seed-0/checkpoints/step-000005"]

"""The space of a study: what it draws, when it asks, and what it refuses."""

import optuna
import pytest

from safe_lab.section import ConfigError, check
from safe_lab.sweep.space import Parameter, ParameterSection, Space


def parameter(key, settings, *, is_integer=False):
    class Holder(ParameterSection):
        pass

    return Parameter(key, check(Holder, settings if isinstance(settings, dict) else {"choices": settings}), is_integer)


def ask(space, seed=0):
    return space.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask())


def test_a_range_of_whole_numbers_gives_whole_numbers():
    space = Space([parameter("a", {"low": 2, "high": 4}, is_integer=True)])
    drawn = {ask(space, seed)["a"] for seed in range(30)}
    assert drawn == {2, 3, 4}
    assert all(isinstance(value, int) for value in drawn)


def test_a_step_counts_from_the_lowest_value():
    space = Space([parameter("a", {"low": 0.1, "high": 0.5, "step": 0.2})])
    assert {round(ask(space, seed)["a"], 6) for seed in range(30)} == {0.1, 0.3, 0.5}


def test_a_logarithmic_range_is_as_likely_in_every_decade():
    space = Space([parameter("a", {"low": 1e-4, "high": 1.0, "log": True})])
    drawn = [ask(space, seed)["a"] for seed in range(200)]
    assert 70 < sum(value < 1e-2 for value in drawn) < 130


def test_a_list_can_be_a_choice_and_comes_out_as_one():
    space = Space([parameter("a", [["query"], ["query", "value"], None, 3])])
    drawn = [ask(space, seed)["a"] for seed in range(40)]
    assert all(value in drawn for value in (["query"], ["query", "value"], None, 3))


def test_a_key_is_asked_for_only_where_its_condition_holds():
    space = Space(
        [
            parameter("curve", {"choices": ["cubic", "linear"], "when": {"policy": ["safe", "prefix"]}}),
            parameter("policy", ["safe", "none", "prefix"]),
        ]
    )
    seen = set()
    for seed in range(30):
        values = ask(space, seed)
        assert ("curve" in values) == (values["policy"] != "none")
        seen.add(values["policy"])
    assert seen == {"safe", "none", "prefix"}


def test_what_optuna_keeps_reads_back_as_it_was_drawn():
    space = Space([parameter("a", [[1, 2], "x"]), parameter("b", {"low": 0.0, "high": 1.0})])
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    assert space.suggest(trial) == space.read(trial.params)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"low": 1}, "low and high are needed"),
        ({"low": 2, "high": 1}, "low is 2, above high, 1"),
        ({"low": 0, "high": 1, "log": True}, "a logarithmic range lies above 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "a logarithmic range has no step"),
        ({"low": 1, "high": 2, "step": -1}, "step is -1"),
        ({"choices": []}, "at least 1 item"),
        ({"choices": [1, 1]}, "a choice stands twice"),
        ({"choices": [1, True]}, "a choice stands twice"),
        ({"choices": [1], "low": 0}, "choices stand alone"),
        ({"low": float("nan"), "high": 1}, "finite"),
        ({"low": "1e-3x", "high": 1}, "low"),
        ({"lwo": 1, "high": 2}, "did you mean low?"),
    ],
)
def test_a_range_that_cannot_be_is_refused(settings, fault):
    with pytest.raises(ConfigError, match=fault):
        parameter("a", settings)


def test_conditions_are_checked_and_do_not_wait_for_each_other():
    policy = parameter("policy", ["safe", "none"])
    with pytest.raises(ConfigError, match="'polcy' is no key of the space; did you mean policy?"):
        Space([policy, parameter("a", {"choices": [1], "when": {"polcy": "safe"}})])
    with pytest.raises(ConfigError, match="'sage' is none of its choices"):
        Space([policy, parameter("a", {"choices": [1], "when": {"policy": "sage"}})])
    with pytest.raises(ConfigError, match="a, b wait for each other"):
        Space([parameter("a", {"choices": [1], "when": {"b": 1}}), parameter("b", {"choices": [1], "when": {"a": 1}})])


def test_a_known_point_must_lie_in_the_space():
    space = Space(
        [
            parameter("policy", ["safe", "none"]),
            parameter("a", {"low": 0.1, "high": 0.5, "step": 0.2, "when": {"policy": "safe"}}),
            parameter("n", {"low": 1, "high": 4}, is_integer=True),
        ]
    )
    assert space.check_point({"policy": "safe", "a": 0.3, "n": 2}) == ({"policy": "safe", "a": 0.3, "n": 2}, [])
    for point, fault in (
        ({"polcy": "safe"}, "polcy: no key of the space; did you mean policy?"),
        ({"policy": "sage"}, "policy: 'sage' is none of its choices, safe, none"),
        ({"a": 0.6}, "a: 0.6 is not between 0.1 and 0.5"),
        ({"a": 0.2}, "a: 0.2 is no whole number of steps of 0.2 from 0.1"),
        ({"n": 2.5}, "n: 2.5 is no whole number"),
        ({"n": True}, "n: True is no whole number"),
        ({"policy": "none", "a": 0.3}, "a: not asked for where policy: safe does not hold"),
    ):
        assert space.check_point(point)[1] == [fault]

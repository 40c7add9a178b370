"""Samplers and pruners by name; what a sampler proposes hangs on the study and the trial's number alone."""

import optuna
import pytest

from safe_lab.section import ConfigError
from safe_lab.sweep.roster import VOID
from safe_lab.sweep.search import PRUNERS, SAMPLERS, SamplerOfStudy, build_pruner
from safe_lab.sweep.space import Parameter, ParameterSection, Space

SPACE = Space(
    [
        Parameter("x", ParameterSection(low=0.0, high=1.0, step=0.1), False),
        Parameter("y", ParameterSection(choices=["a", "b"]), False),
    ]
)


def grow(sampler, study, count):
    """Trials of a study that goes on, each told a value that follows from its parameters."""
    study.sampler = sampler
    drawn = []
    for _ in range(count):
        trial = study.ask()
        values = SPACE.suggest(trial)
        study.tell(trial, values["x"] + (values["y"] == "a"))
        drawn.append(values)
    return drawn


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_that_is_taken_up_draws_what_it_would_have_drawn(name):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments = {"n_startup_trials": 3} if name in ("tpe", "gp", "cma_es") else {}
    arguments |= {"population_size": 4} if name.startswith("nsga") else {}

    def fresh():
        return SamplerOfStudy(name, arguments, SPACE, seed=5)

    straight = grow(fresh(), optuna.create_study(), 8)
    interrupted = optuna.create_study()
    assert grow(fresh(), interrupted, 5) + grow(fresh(), interrupted, 3) == straight
    assert len({values["x"] for values in straight}) > 1


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_two_workers_do_not_try_the_same_points(name):
    study = optuna.create_study()
    workers = [SamplerOfStudy(name, {}, SPACE, seed=5) for _ in range(2)]
    drawn = [grow(workers[i % 2], study, 1)[0] for i in range(10)]
    assert len({(values["x"], values["y"]) for values in drawn}) >= 6


def test_a_grid_is_walked_once_and_its_end_is_no_error():
    sampler = SamplerOfStudy("grid", {}, SPACE, seed=0)
    assert sampler.num_grid_points == 22
    drawn = grow(sampler, optuna.create_study(), 22)
    assert len({(round(values["x"], 6), values["y"]) for values in drawn}) == 22


def test_a_grid_needs_an_end():
    endless = Space([Parameter("x", ParameterSection(low=0.0, high=1.0), False)])
    with pytest.raises(ConfigError, match=r"there is no end to the values of x: give a \(longer\) step, or choices"):
        SamplerOfStudy("grid", {}, endless, seed=0)


def test_unknown_names_and_arguments_are_told_with_the_near_one():
    with pytest.raises(ConfigError, match="'tpee' is none; did you mean tpe?"):
        SamplerOfStudy("tpee", {}, SPACE, seed=0)
    with pytest.raises(ConfigError, match="no argument 'n_startup_trial'; did you mean n_startup_trials?"):
        SamplerOfStudy("tpe", {"n_startup_trial": 3}, SPACE, seed=0)
    with pytest.raises(ConfigError, match="pruner: 'medan' is none; did you mean median?"):
        build_pruner("medan", {})
    with pytest.raises(ConfigError, match="no argument 'p_treshold'; did you mean p_threshold?"):
        build_pruner("wilcoxon", {"p_treshold": 0.1})
    with pytest.raises(ConfigError, match="sampler nsga2: `population_size`"):
        SamplerOfStudy("nsga2", {"population_size": 1}, SPACE, seed=0)


@pytest.mark.parametrize("name", sorted(PRUNERS))
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_pruner_can_be_had(name):
    arguments = {"percentile": {"percentile": 25.0}, "threshold": {"lower": 0.5}, "patient": {"patience": 1}}.get(
        name, {}
    )
    build_pruner(name, arguments)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_patient_pruner_takes_another_by_name_and_arguments():
    pruner = build_pruner("patient", {"patience": 2, "wrapped": {"name": "percentile", "percentile": 10.0}})
    assert isinstance(pruner._wrapped_pruner, optuna.pruners.PercentilePruner)
    with pytest.raises(ConfigError, match="pruner: 'nono' is none"):
        build_pruner("patient", {"patience": 2, "wrapped": "nono"})


def test_a_grid_that_nobody_can_walk_is_refused():
    wide = Space([Parameter(key, ParameterSection(low=0, high=999), True) for key in "xyz"])
    with pytest.raises(ConfigError, match="1000000000 points are more than the 100000"):
        SamplerOfStudy("grid", {}, wide, seed=0)


def test_a_grid_is_covered_around_known_points_and_trials_that_were_never_begun():
    space = Space([Parameter("letter", ParameterSection(choices=list("abcdef")), False)])
    study = optuna.create_study(sampler=SamplerOfStudy("grid", {}, space, seed=0))
    study.enqueue_trial({"letter": "c"})
    found = []
    for number in range(7):
        trial = study.ask()
        if number == 3:
            trial.set_user_attr(VOID, True)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            found.append(space.suggest(trial)["letter"])
            study.tell(trial, 0.0)
    assert sorted(found) == list("abcdef")

"""The study file: everything that is wrong with it is told before the first trial."""

from pathlib import Path

import pytest

from safe_lab import yaml_core
from safe_lab.section import ConfigError
from safe_lab.sweep import load

SHIPPED = Path(__file__).parents[2] / "sweeps"
TREE = {
    "name": "study",
    "base": {"model": {"path": "somewhere"}, "data": {"task": "sst2"}, "training": {"epochs": 8}},
    "space": {
        "freezing.policy": ["safe", "none"],
        "freezing.final_threshold": {"low": 0.01, "high": 0.5, "log": True, "when": {"freezing.policy": "safe"}},
        "freezing.final": {"low": 2, "high": 6},
    },
    "objectives": {"validation/accuracy": "maximize", "resources/memory_mean_bytes": "minimize"},
    "num_trials": 4,
}


@pytest.fixture
def read(tmp_path):
    """Loads the tree with some keys changed."""

    def read(*overrides, **changes):
        (tmp_path / "study.yaml").write_text(yaml_core.write(TREE | changes))
        return load(tmp_path / "study.yaml", overrides)

    return read


def one(figure="validation/accuracy"):
    return {figure: "maximize"}


def test_a_study_is_its_base_and_what_is_searched(read):
    study = read("training.epochs=3", settings={"training.batch_size": 16})
    config = study.config_of(7, {"freezing.policy": "none", "freezing.final": 4}, seed=2)
    assert (config.name, config.variant, config.seed) == ("study", "trial-0007", 2)
    assert (config.training.epochs, config.training.batch_size, config.freezing.final) == (3, 16, 4)


def test_whole_numbers_are_drawn_where_the_schema_takes_no_others(read):
    study = read(space={"freezing.final": {"low": 2, "high": 6}, "freezing.final_threshold": {"low": 0, "high": 1}})
    assert [parameter.is_integer for parameter in study.space.parameters] == [True, False]


def test_the_base_may_be_a_file_beside_the_study(read, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml_core.write(TREE["base"] | {"name": "run"}))
    assert read(base="run.yaml").config_of(0, {}, 0).model.path == "somewhere"


def test_a_number_of_seeds_is_the_first_ones(read):
    assert read(seeds=3).settings.seeds == (0, 1, 2)
    assert read(seeds=[5, 7]).settings.seeds == (5, 7)


def test_what_is_written_for_the_workers_reads_back_as_the_same_study(read, tmp_path):
    study = read("training.epochs=3", settings={"training.batch_size": 16}, enqueue=[{"freezing.policy": "none"}])
    (tmp_path / "again.yaml").write_text(yaml_core.write(study.settings.model_dump(mode="json")))
    again = load(tmp_path / "again.yaml")
    assert again.definition() == study.definition()
    assert again.points == study.points
    assert again.config_of(1, {"freezing.final": 3}, 0) == study.config_of(1, {"freezing.final": 3}, 0)


def test_constraints_are_read_with_their_units(read):
    (memory, accuracy) = read(
        constraints=["resources/memory_peak_bytes <= 6GiB", "validation/accuracy>=0.8"]
    ).constraints
    assert (memory.figure, memory.bound) == ("resources/memory_peak_bytes", 6 * 2**30)
    assert memory.excess(6 * 2**30 + 1) > 0 >= memory.excess(6 * 2**30)
    assert accuracy.excess(0.79) > 0 >= accuracy.excess(0.8)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"space": {}}, "space: "),
        ({"space": {"freezing.metrik": ["cka"]}}, "space.freezing.metrik: unknown key; did you mean metric?"),
        ({"space": {"freezing.metric": ["cka", "fischer"]}}, "space.freezing.metric: .*did you mean fisher?"),
        (
            {"space": {"freezing.final": {"low": 0, "high": 3}}},
            "space.freezing.final: .*greater than or equal to 1, got 0",
        ),
        ({"space": {"freezing.final": {"low": 1, "high": 3.5}}}, "space.freezing.final: .*got 3.5"),
        ({"space": {"freezing": ["cka"]}}, "space.freezing"),
        ({"space": {"freezing.final.x": [1]}}, "freezing.final: input should be a valid integer"),
        ({"space": {"seed": [1, 2]}}, "space.seed: not for searching; what runs draw is set by `seeds`"),
        ({"space": {"tracking.wandb": ["offline"]}}, "space.tracking.wandb: not for searching"),
        ({"space": {"training.epochs": ["many"]}}, "space.training.epochs: .*got 'many'"),
        (
            {"base": {"model": {"path": "x"}, "data": {"task": "sst3"}}},
            "base or settings: data.task: 'sst3' is no task; did you mean sst2?",
        ),
        ({"base": "nowhere.yaml"}, "no such file"),
        ({"settings": {"training.epoch": 3}}, "base or settings: training.epoch: unknown key; did you mean epochs?"),
        ({"objectives": {}}, "objectives"),
        ({"objectives": one("validation/acuracy")}, "did you mean validation/accuracy?"),
        ({"objectives": one("test/accuracy")}, "'test/accuracy' is of a test split"),
        ({"objectives": one("sharpness/trace")}, "sharpness is measured with sharpness.when: end"),
        ({"objectives": {"validation/accuracy": "up"}}, "objectives.validation/accuracy"),
        ({"constraints": ["resources/memory_peak_bytes < 6GiB"]}, "it reads FIGURE <= BOUND"),
        ({"constraints": ["resources/memory_peak_bytes <= 6Gib2"]}, "there is no unit"),
        ({"constraints": ["resources/memory_peek_bytes <= 6GiB"]}, "did you mean resources/memory_peak_bytes?"),
        ({"constraints": ["test_matched/accuracy >= 0.5"]}, "of a test split"),
        ({"sampler": "tpee"}, "sampler: 'tpee' is none; did you mean tpe?"),
        ({"sampler": {"name": "tpe", "seeds": 1}}, "sampler tpe has no argument 'seeds'"),
        ({"sampler": {"name": "tpe", "n_startup_trials": "3"}}, "sampler tpe or pruner none: '<' not supported"),
        ({"space": {"freezing.final": {"low": 1, "high": 5, "step": 1.5}}}, "step is 1.5, between whole numbers"),
        ({"name": "a" * 95}, "no plain folder name"),
        ({"sampler": "cma_es"}, "sampler cma_es: there are 2 objectives"),
        ({"sampler": "grid"}, "no end to the values of freezing.final_threshold"),
        ({"pruner": "median"}, "pruner median: there are 2 objectives"),
        ({"pruner": "wilcoxon", "objectives": one()}, "there is one seed"),
        ({"pruner": "wilcoxon", "objectives": one(), "seeds": 3}, "the smallest p it can come to is 0.25"),
        ({"prefilter": True}, "prefilter: no constraint is on a figure that can be forecast"),
        (
            {"pruner": "median", "objectives": {"resources/flops": "minimize"}},
            "pruning needs a metric of the validation split",
        ),
        (
            {"pruner": "median", "objectives": one(), "settings": {"training.eval_every": "never"}},
            "nothing to prune by",
        ),
        ({"enqueue": [{"freezing.polcy": "safe"}]}, "enqueue, point 1: freezing.polcy: no key of the space"),
        ({"enqueue": [{"freezing.policy": "none", "freezing.final": 9}]}, "9 is not between 2 and 6"),
        ({"num_trials": 0}, "num_trials"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"seeds": 0}, "seeds"),
        ({"name": "../up"}, "no plain folder name"),
        ({"trials": 3}, "trials: unknown key; did you mean num_trials?"),
        ({"heartbeat": 0}, "heartbeat"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_trial(read, changes, fault):
    with pytest.raises(ConfigError, match=fault):
        read(**changes)


def test_points_that_no_trial_is_left_for_wait(read):
    assert read(enqueue=[{}] * 5).notes == ("5 points are to be tried first, and num_trials is 4: the others wait",)


def test_a_grid_has_no_more_trials_than_points(read):
    space = {"freezing.final": {"low": 2, "high": 4}, "freezing.curve": ["cubic", "linear"]}
    assert read(sampler="grid", space=space, num_trials=6).settings.num_trials == 6
    with pytest.raises(ConfigError, match="num_trials is 7, and the grid has 6 points"):
        read(sampler="grid", space=space, num_trials=7)


def test_a_grid_has_no_value_for_what_a_point_leaves_out(read):
    space = {"freezing.final": {"low": 2, "high": 4}, "freezing.curve": ["cubic", "linear"]}
    with pytest.raises(ConfigError, match="point 1: a grid has no value for what it leaves out"):
        read(sampler="grid", space=space, enqueue=[{"freezing.final": 3}])


def test_the_order_of_the_objectives_is_part_of_the_study(read):
    objectives = list(TREE["objectives"].items())
    assert read().definition() != read(objectives=dict(objectives[::-1])).definition()


def test_a_space_that_the_schema_refuses_in_part_is_told_and_one_it_refuses_whole_is_refused(read):
    space = {"freezing.warmup": {"low": 1, "high": 6}, "freezing.final": {"low": 1, "high": 6}}
    (note,) = read(space=space).notes
    assert "whose trials fail at once" in note
    assert "before warmup" in note
    with pytest.raises(ConfigError, match="the schema refuses every point of it"):
        read(space={"freezing.warmup": [5, 6], "freezing.final": [1, 2]})


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_load_and_none_of_their_trials_is_refused(path):
    assert load(path).notes == ()

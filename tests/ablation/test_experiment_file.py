"""Experiment files: what they come to, and what is wrong is told at once."""

from pathlib import Path

import pytest

from safe_lab import ablation, yaml_core
from safe_lab.config import warnings
from safe_lab.section import ConfigError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHIPPED = [
    EXPERIMENTS / "demo.yaml",
    *sorted(EXPERIMENTS.glob("ablations/*.yaml")),
    *sorted(EXPERIMENTS.glob("paper/*.yaml")),
]

CLAIM = {"variant": "cka", "figure": "resources/flops", "difference": -0.3, "source": "a paper"}


@pytest.fixture
def read(tiny_tree, tmp_path):
    """Read an experiment file with some keys changed."""
    base = {key: value for key, value in tiny_tree.items() if key != "name"}
    tree = {
        "name": "metrics",
        "base": base,
        "variants": {"none": {"freezing.policy": "none"}, "cka": {}, "fisher": {"freezing.metric": "fisher"}},
        "seeds": 2,
    }
    path = tmp_path / "experiment.yaml"

    def load(*overrides, **changes):
        path.write_text(yaml_core.write(tree | changes))
        return ablation.load(path, overrides)

    return load


def test_runs_are_variants_by_seeds_all_variants_of_a_seed_first(read):
    experiment = read()
    assert experiment.runs == [(variant, seed) for seed in (0, 1) for variant in ("none", "cka", "fisher")]
    config = experiment.config_of("fisher", 1)
    assert (config.freezing.metric, config.seed, config.variant, config.name) == ("fisher", 1, "fisher", "metrics")
    assert config.run_folder == experiment.folder / "fisher" / "seed-1"
    assert (experiment.baseline, experiment.metric) == ("none", "validation/accuracy")


def test_a_grid_makes_a_variant_of_each_combination(read):
    experiment = read(grid={"freezing.curve": ["linear", "step"], "freezing.final_threshold": [0.1, 0.5]})
    assert list(experiment.variants)[3:] == [
        f"{curve},final_threshold={value}" for curve in ("linear", "step") for value in (0.1, 0.5)
    ]
    config = experiment.config_of("step,final_threshold=0.5", 0)
    assert (config.freezing.curve, config.freezing.final_threshold) == ("step", 0.5)


def test_settings_and_overrides_are_for_all_variants(read):
    experiment = read("training.epochs=7", settings={"training.batch_size": 4})
    config = experiment.config_of("cka", 0)
    assert (config.training.epochs, config.training.batch_size) == (7, 4)


def test_an_experiment_may_be_given_another_name_and_baseline(read, tmp_path):
    experiment = read("name=again")
    assert experiment.folder.name == experiment.config_of("cka", 0).name == "again"
    read(claims=[CLAIM])
    assert ablation.load(tmp_path / "experiment.yaml").rules.claims
    # What is claimed is of differences to the file's own baseline.
    other = ablation.load(tmp_path / "experiment.yaml", baseline="cka")
    assert (other.baseline, other.rules.claims) == ("cka", ())
    assert ablation.load(tmp_path / "experiment.yaml", baseline="none").rules.claims
    # The file's own rules stay what is written down.
    again = ablation.check_experiment(other.to_dict())
    assert again.baseline == "none" and again.rules.claims
    with pytest.raises(ConfigError, match="'ckb' is no variant; did you mean cka"):
        ablation.load(tmp_path / "experiment.yaml", baseline="ckb")
    with pytest.raises(ConfigError, match="no plain folder name"):
        read("name=../up")


def test_the_base_may_be_the_yaml_of_a_run(read, tiny_tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml_core.write(tiny_tree | {"variant": "other", "seed": 5}))
    config = read(base="run.yaml").config_of("cka", 1)
    assert (config.name, config.variant, config.seed) == ("metrics", "cka", 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {}}, "variants: there is none"),
        (
            {"variants": {"a": {"freezing.metrik": "cka"}}},
            "variants.a: freezing.metrik: unknown key; did you mean metric?",
        ),
        ({"variants": {"a": {"freezing.metric": "fischer"}}}, "did you mean fisher"),
        ({"variants": {"a": {}, "b": {"freezing.metric": "cka"}}}, "a and b come to the same configuration"),
        ({"variants": {"a": {"seed": 3}}}, "variants.a: seed: not for variants"),
        ({"variants": {"../a": {}}}, "no plain folder name"),
        ({"grid": {"freezing.metric": ["none"]}}, "would be called 'none', as another is"),
        ({"grid": {"data.text_column": ["a/b", "ab"]}}, "would be called 'ab', as another is"),
        ({"grid": {"data.text_column": ["/"]}}, "would be called ''"),
        ({"metric": "resources/flops", "margin": 5}, "margin: of resources/flops it is a share"),
        ({"metric": "frozen_share"}, "frozen_share is neither good nor bad by itself"),
        ({"grid": {"freezing.curve": []}}, "grid"),
        ({"baseline": "nome"}, "baseline: 'nome' is no variant; did you mean none?"),
        ({"metric": "validation/acuracy"}, "did you mean validation/accuracy"),
        ({"metric": "test/accuracy"}, "is of a test split"),
        ({"figures": ["resources/flop"]}, "did you mean resources/flops"),
        ({"figures": ["frozen_share", "frozen_share"]}, "a figure stands twice"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"margin": 0}, "margin"),
        ({"confidence": 95}, "confidence"),
        ({"test": "t"}, "test"),
        ({"settings": {"training.epoch": 3}}, "did you mean epochs"),
        ({"variant": {}}, "variant: unknown key; did you mean variants?"),
        (
            {"claims": [CLAIM | {"variant": "ckb"}]},
            "claims: 'ckb' is no variant that is held against none; did you mean cka",
        ),
        ({"claims": [CLAIM | {"variant": "none"}]}, "claims: 'none' is no variant that is held against none"),
        ({"claims": [CLAIM | {"figure": "resources/flop"}]}, "claims: .*did you mean resources/flops"),
        ({"claims": [CLAIM | {"figure": "frozen_share"}]}, "claims: frozen_share is neither good nor bad by itself"),
        ({"claims": [CLAIM | {"difference": -34.59}]}, "claims: a cost falls by a share of itself"),
        ({"claims": [{"variant": "cka"}]}, "claims.*source"),
        (
            {"variants": {"a": {}, "b": {"data.task": "sst2"}}},
            "they are of different tasks, which nothing compares: classification, sst2",
        ),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run(read, changes, said):
    with pytest.raises(ConfigError, match=said):
        read(**changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_load_and_none_of_their_variants_is_warned_of(path):
    experiment = ablation.load(path)
    assert {variant: warnings(experiment.config_of(variant, 0)) for variant in experiment.variants} == {
        variant: [] for variant in experiment.variants
    }
    assert len(experiment.runs) >= (2 if path.stem == "demo" else 10)
    assert bool(experiment.rules.claims) == (path.parent.name == "paper")


def test_an_experiment_that_was_written_down_reads_as_it_was(read):
    experiment = read("training.epochs=7", grid={"freezing.curve": ["linear"]})
    again = ablation.check_experiment(experiment.to_dict())
    assert again.runs == experiment.runs
    assert all(again.config_of(*run) == experiment.config_of(*run) for run in experiment.runs)

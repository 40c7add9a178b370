"""Benches: what is compared, that it is the same work, and what is left when something fails."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forks import command
from tiny import FAMILIES, save_tiny_model, write_csv

from safe_lab import config as configuration
from safe_lab import yaml_core
from safe_lab.bench import baseline, claim_folder, load
from safe_lab.bench.compare import compare, difference_of_losses, take_difference
from safe_lab.bench.folder import run as run_bench
from safe_lab.bench.processes import FIGURES, Measurement, find_measured
from safe_lab.cli import main
from safe_lab.run import run
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError

SHIPPED = sorted((Path(__file__).parents[1] / "experiments" / "bench").glob("*.yaml"))
EXPLODES = {"training.learning_rate": 1e30, "training.max_grad_norm": None, "training.warmup_ratio": 0}


def bench_of(base):
    """A bench of two repetitions that takes a few seconds a training."""
    return {
        "name": "tiny",
        "repetitions": 2,
        "threads": 1,
        "device": "cpu",
        "base": {key: copy.deepcopy(value) for key, value in base.items() if key != "name"},
        "variants": {
            "trainer": {"trainer": "transformers"},
            "none": {"overrides": {"freezing.policy": "none"}},
            "safe": {},
        },
    }


@pytest.fixture
def tree(tiny_tree):
    return bench_of(tiny_tree)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bench.yaml"


def start(path, tree, *arguments):
    path.write_text(yaml_core.write(tree))
    words = [sys.executable, "-m", "safe_lab", "bench", str(path), "--output", str(path.parent / "out"), *arguments]
    # A suite started in the background of a shell ignores Ctrl-C, and its children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)


def run_forked(path, tree, *arguments, code=0):
    """What a bench prints, and what it says beside it; it and its trainings are forks of this process."""
    path.write_text(yaml_core.write(tree))
    printed, said = path.with_suffix(".printed"), path.with_suffix(".said")
    for file in (printed, said):
        file.write_text("")
    with command(["bench", path, "--output", path.parent / "out", *arguments], printed, said) as fork:
        fork.wait(timeout=280)
    assert fork.returncode == code, said.read_text()
    return printed.read_text(), said.read_text()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def children(process):
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def load_tree(path, tree, *overrides, **options):
    path.write_text(yaml_core.write(tree))
    return load(path, overrides, **options)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_every_bench_shipped_loads_and_compares_with_transformers(shipped):
    bench = load(shipped)
    assert bench.settings.name == shipped.stem
    assert bench.settings.variants[bench.baseline].trainer == "transformers"
    plain = [name for name in bench.configs if bench.repeats_baseline(name)]
    assert plain == [name for name in ("trainer", "none") if name in bench.configs]
    assert not any(configuration.warnings(config) for config in bench.configs.values())


def test_overrides_change_the_base_and_a_variant_goes_before_them(path, tree):
    tree["variants"]["none"]["overrides"]["training.epochs"] = 1
    bench = load_tree(path, tree, "training.epochs=7", repetitions=5)
    assert [config.training.epochs for config in bench.configs.values()] == [7, 1, 7]
    assert bench.settings.repetitions == 5
    assert not bench.repeats_baseline("none")


def test_a_base_may_be_the_yaml_of_a_run_beside_the_bench(path, tree, tiny_tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml_core.write(tiny_tree))
    assert load_tree(path, tree | {"base": "run.yaml"}).configs == {
        name: config.model_copy(update={"name": "tiny"}) for name, config in load_tree(path, tree).configs.items()
    }


def test_a_tracker_is_measured_only_where_it_is_asked_for(path, tree):
    del tree["base"]["tracking"]
    tree["variants"]["safe"]["overrides"] = {"tracking.wandb": "offline"}
    wandb = [config.tracking.wandb for config in load_tree(path, tree).configs.values()]
    assert wandb == ["disabled", "disabled", "offline"]


def test_each_repetition_has_its_own_seed_and_folder(path, tree, tmp_path):
    bench = load_tree(path, tree, "seed=3")
    configs = [bench.config_of("safe", repetition, tmp_path) for repetition in (0, 1)]
    assert [config.seed for config in configs] == [3, 4]
    assert configs[1].run_folder == tmp_path / "runs" / "safe" / "seed-4"


def test_all_faults_come_at_once_with_place_and_near_name(path, tree):
    del tree["base"]["model"]
    tree["base"]["training"]["epoch"] = 3
    tree["variants"]["safe"]["overrides"] = {"freezing.metric": "fischer"}
    tree["variants"]["trainer"]["overrides"] = {"freezing.policy": "none"}
    with pytest.raises(ConfigError) as error:
        load_tree(path, tree | {"baseline": "trainr"}, "data.max_length=long")
    lines = str(error.value).splitlines()
    for line, start, part in zip(
        lines,
        (
            "base.model:",
            "base.data.max_length:",
            "base.training.epoch:",
            "variants.trainer: overrides.freezing.policy:",
            "variants.safe: freezing.metric:",
            "baseline:",
        ),
        (
            "missing",
            "'long'",
            "did you mean epochs?",
            "has no freezing",
            "did you mean fisher?",
            "did you mean trainer?",
        ),
        strict=True,
    ):
        assert line.startswith(start)
        assert part in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetition": 3}, "repetition: unknown key; did you mean repetitions?"),
        ({"variants": {"a": {"overides": {}}}}, "variants.a.overides: unknown key; did you mean overrides?"),
        ({"variants": {"none": {"override": {}}}}, "variants.none.override: unknown key; did you mean overrides?"),
        ({"variants": {"a": {"trainer": "keras"}}}, "variants.a.trainer: input should be 'safe_lab' or 'transformers'"),
        ({"variants": {}}, "variants: "),
        ({"repetitions": 0}, "repetitions: "),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        (
            {"variants": {"a": {"overrides": {"data.task.now": 1}}}},
            "variants.a: overrides.data.task.now: task holds a value",
        ),
        ({"base": {"tracking": "wandb"}}, "base.tracking: "),
    ],
)
def test_a_bad_bench_file_is_refused_with_its_key(path, tree, change, message):
    with pytest.raises(ConfigError, match=r"^\S") as error:
        load_tree(path, tree | change)
    assert message in str(error.value)


def test_a_bad_bench_is_answered_without_torch(path, tree):
    path.write_text(yaml_core.write(tree | {"baseline": "nobody"}))
    program = (
        "import sys\nfrom safe_lab.cli import main\n"
        f"assert main(['bench', {str(path)!r}]) == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_baseline_and_policy_none_have_one_loss_curve(family, tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model", family)
    tiny_tree |= {"model": {"path": str(folder)}, "freezing": {"policy": "none"}}
    tiny_tree["adapter"] |= {"target_modules": FAMILIES[family][2], "dropout": 0.1}
    tiny_tree["data"]["path"] = str(write_csv(tmp_path / "rows.csv", rows=150))
    tiny_tree["training"] |= {"log_every": 1, "weight_decay": 0.1}
    config = configuration.build(tiny_tree)
    theirs, ours = baseline.train(config), run(config)
    rows = RunFolder(config.run_folder).rows("metrics.jsonl")
    curve = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(curve) == 51
    assert len({loss for _, loss in curve}) > 40
    assert difference_of_losses(theirs["losses"], curve) < 1e-5
    assert theirs["metric"] == ours.metrics[ours.main_metric]
    assert theirs["tokens"] == ours.tokens
    for phase in ("forward", "backward"):
        assert theirs["resources"]["flops_by_phase"][phase] == ours.resources["flops_by_phase"][phase]


def test_a_baseline_whose_loss_is_nan_fails_though_trainer_goes_on(tiny_tree):
    changes = {key.removeprefix("training."): value for key, value in EXPLODES.items()}
    tiny_tree["training"] |= changes
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        baseline.train(configuration.build(tiny_tree))


def measurement(variant, repetition, losses=(), failure="", **figures):
    return Measurement(variant, repetition, dict.fromkeys(FIGURES) | figures, losses, {}, {}, failure)


def test_ratios_are_taken_within_a_repetition(path, tree):
    bench = load_tree(path, tree, repetitions=3)
    comparison = compare(
        bench,
        [
            measurement("trainer", 0, wall_seconds=10.0, joules=None),
            measurement("none", 0, wall_seconds=5.0, joules=None),
            measurement("trainer", 1, wall_seconds=20.0),
            measurement("none", 1, wall_seconds=20.0),
            measurement("trainer", 2, wall_seconds=40.0),
            measurement("none", 2, failure="exit code 1"),
        ],
    )
    assert comparison.variants["none"]["wall_seconds"] == [5.0, 20.0, None]
    assert comparison.ratios["none"]["wall_seconds"] == {"median": 0.75, "min": 0.5, "max": 1.0}
    assert comparison.ratios["trainer"]["wall_seconds"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert comparison.ratios["safe"]["wall_seconds"] == {"median": None, "min": None, "max": None}
    assert comparison.ratios["none"]["joules"]["median"] is None
    assert [failure["failure"] for failure in comparison.failures] == ["exit code 1"]
    assert not comparison.complete


def test_loss_curves_are_compared_only_where_they_ought_to_be_the_same(path, tree):
    measurements = [
        measurement("trainer", 0, losses=((1, 0.5), (2, 0.25))),
        measurement("none", 0, losses=((1, 0.5), (2, 0.375))),
        measurement("safe", 0, losses=((1, 0.5), (2, 9.0))),
    ]
    assert compare(load_tree(path, tree), measurements).loss_curve_difference == 0.125
    assert compare(load_tree(path, tree | {"baseline": "safe"}), measurements).loss_curve_difference is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Standard output, error and folder of a bench of three variants and two repetitions."""
    place = tmp_path_factory.mktemp("bench")
    base = {
        "model": {"path": str(save_tiny_model(place / "model"))},
        "data": {"task": "classification", "path": str(write_csv(place / "data.csv")), "max_length": 16},
        "adapter": {"rank": 2, "target_modules": ["query", "value"]},
        "training": {"epochs": 9, "batch_size": 8, "learning_rate": 1e-2},
        "freezing": {"policy": "prefix", "interval": 2, "warmup": 0, "final": 1, "final_share": 1.0},
    }
    out, err = run_forked(place / "bench.yaml", bench_of(base), "--json", "training.epochs=3")
    return json.loads(out), err, place / "out"


def test_processes_take_turns(finished):
    _, err, folder = finished
    turns = [f"{repetition}-{variant}" for repetition in (0, 1) for variant in ("trainer", "none", "safe")]
    written = sorted((folder / "processes").glob("*.json"), key=lambda file: file.stat().st_mtime)
    assert [file.stem for file in written] == turns
    assert [line.split(":")[0] for line in err.splitlines()[:6]] == [
        f"{i + 1}/6 {turn[2:]}, repetition {turn[0]}" for i, turn in enumerate(turns)
    ]


def test_a_bench_leaves_figures_ratios_and_environment(finished):
    printed, _, folder = finished
    assert json.loads((folder / "result.json").read_text()) == printed
    for figures in printed["variants"].values():
        for figure in ("metric", "wall_seconds", "flops", "peak_bytes", "mean_bytes", "peak_rss_bytes"):
            assert len(figures[figure]) == 2
            assert all(value > 0 for value in figures[figure])
    seconds = [printed["variants"][name]["wall_seconds"] for name in ("none", "trainer")]
    ratios = sorted(ours / theirs for ours, theirs in zip(*seconds, strict=True))
    ratio = printed["ratios"]["none"]["wall_seconds"]
    assert (ratio["min"], ratio["median"], ratio["max"]) == pytest.approx((ratios[0], sum(ratios) / 2, ratios[1]))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["command"][:2] == ["safe-lab", "bench"]
    assert {"packages", "devices", "processor", "time"} <= environment.keys()


def test_a_bench_measures_the_same_training_and_what_freezing_saves(finished):
    printed, _, folder = finished
    assert printed["loss_curve_difference"] < 1e-5
    assert printed["variants"]["none"]["metric"] == printed["variants"]["trainer"]["metric"]
    # safe_lab keeps the probe and the units' start beside the model.
    assert printed["variants"]["none"]["peak_bytes"] == pytest.approx(
        printed["variants"]["trainer"]["peak_bytes"], rel=0.03
    )
    assert printed["ratios"]["safe"]["flops"]["max"] < printed["ratios"]["none"]["flops"]["min"]
    run_folder = folder / "runs" / "safe" / "seed-1"
    assert json.loads((run_folder / "result.json").read_text())["frozen_share"] == 1
    assert configuration.load(run_folder / "config.yaml").training.epochs == 3


def test_a_bench_folder_is_not_written_twice(finished):
    folder = finished[2]
    tree = yaml_core.parse((folder.parent / "bench.yaml").read_text())
    for changes, arguments, message in [
        ({}, (), "holds a bench already; --resume goes on with it"),
        ({"threads": 2}, ("--resume",), "its seconds are not comparable with these (threads: 1 there, 2 here)"),
    ]:
        assert message in run_forked(folder.parent / "bench.yaml", tree | changes, *arguments, code=2)[1]
    (folder.parent / "bench.yaml").write_text(yaml_core.write(tree))
    bench = load(folder.parent / "bench.yaml", ["training.epochs=3"])
    with (
        pytest.raises(ConfigError, match="holds no bench to go on with"),
        claim_folder(bench, str(folder.parent / "elsewhere"), resume=True),
    ):
        pass
    with (
        claim_folder(bench, str(folder), resume=True),
        pytest.raises(ConfigError, match="a live bench is writing"),
        claim_folder(bench, str(folder), resume=True),
    ):
        pass


def test_a_resumed_bench_trains_only_what_is_missing_damaged_or_changed(finished, tmp_path):
    printed, _, folder = finished
    tree = yaml_core.parse((folder.parent / "bench.yaml").read_text())
    shutil.copytree(folder, tmp_path / "out")
    processes = tmp_path / "out" / "processes"
    (processes / "1-safe.json").unlink()
    damaged = processes / "0-none.json"
    damaged.write_text(damaged.read_text()[:-30])
    tree["variants"]["more"] = {"overrides": {"training.epochs": 1}}
    # transformers.Trainer has no savings; each of the others would be another training with these.
    tree["base"]["savings"] = {"cache": False}
    tree["variants"]["safe"]["overrides"] = {"savings.cache": True}
    tree["variants"]["none"]["overrides"]["savings.cache"] = True
    arguments = ("--json", "--resume", "training.epochs=3", "--repetitions", "2")
    out, err = run_forked(tmp_path / "bench.yaml", tree, *arguments)
    trained = [line for line in err.splitlines() if "repetition" in line and "measured before" not in line]
    assert [line.split(":")[0][4:] for line in trained] == [
        "none, repetition 0",
        "more, repetition 0",
        "safe, repetition 1",
        "more, repetition 1",
    ]
    resumed = json.loads(out)
    assert resumed["complete"]
    assert resumed["variants"]["trainer"] == printed["variants"]["trainer"]
    assert resumed["variants"]["safe"]["wall_seconds"][0] == printed["variants"]["safe"]["wall_seconds"][0]
    assert resumed["variants"]["none"]["metric"] == printed["variants"]["none"]["metric"]
    assert resumed["loss_curve_difference"] < 1e-5
    assert set(resumed["metric_differences"]) == {"none", "safe", "more"}


def test_a_measured_variant_cannot_be_changed_and_nothing_is_lost(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished[2], folder)
    files = sorted(folder.rglob("*"))
    tree = yaml_core.parse((folder / "bench.yaml").read_text())
    assert tree["base"]["training"]["epochs"] == 3, "overrides are in it"
    for change, message in [
        ({"overrides": {"freezing.policy": "none", "seed": 5}}, "none, repetition 0: seed: 0 there, 5 here"),
        ({"trainer": "transformers"}, "none, repetition 1: trainer: safe_lab there, transformers here"),
    ]:
        tree["variants"]["none"] = change
        (tmp_path / "bench.yaml").write_text(yaml_core.write(tree))
        assert main(["bench", str(tmp_path / "bench.yaml"), "--output", str(folder), "--resume"]) == 2
        assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == files


@pytest.mark.parametrize("damage", [{"metric": None}, {"wall_seconds": "1.5"}, {"joules": "none"}, None])
def test_what_was_measured_is_found_but_not_what_was_altered(damage, finished, tmp_path):
    shutil.copytree(finished[2], tmp_path / "moved")
    bench = load(tmp_path / "moved" / "bench.yaml")
    everything = {(repetition, variant) for repetition in (0, 1) for variant in ("trainer", "none", "safe")}
    assert find_measured(bench, tmp_path / "moved").keys() == everything
    file = tmp_path / "moved" / "processes" / "1-none.json"
    answer = json.loads(file.read_text())
    answer["figures"] = None if damage is None else answer["figures"] | damage
    file.write_text(json.dumps(answer))
    assert find_measured(bench, tmp_path / "moved").keys() == everything - {(1, "none")}


def test_what_is_measured_stays_in_the_result_while_a_bench_is_gone_on_with(finished, tmp_path, monkeypatch):
    printed, _, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    tree = yaml_core.parse((folder / "bench.yaml").read_text())
    tree["variants"] = {"first": {}} | tree["variants"]
    bench = load_tree(tmp_path / "bench.yaml", tree | {"baseline": "trainer"})

    def interrupted(*_):
        yield measurement("first", 0, wall_seconds=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_lab.bench.folder.measure", interrupted)
    comparison = run_bench(bench, tmp_path / "out", command=[], show=lambda *_: None)
    assert comparison.variants["first"]["wall_seconds"] == [1.0, None]
    for written in (comparison.variants, json.loads((tmp_path / "out" / "result.json").read_text())["variants"]):
        assert list(written["none"]["metric"]) == printed["variants"]["none"]["metric"]


def test_other_machines_and_versions_are_told(path, tree):
    environments = [{"threads": 1, "packages": {"torch": version}, "time": version} for version in ("2.12", "2.13")]
    measurements = [
        replace(measurement("trainer", repetition), environment=environment)
        for repetition, environment in enumerate(environments)
    ]
    assert compare(load_tree(path, tree), measurements).environment_differences == ["torch: 2.12, 2.13"]


def test_metric_differences_come_with_the_interval_of_their_mean():
    difference = take_difference([0.84, 0.83, 0.85, None], [0.85, 0.85, 0.85, 0.9])
    # Student's t with two degrees of freedom: 4.303 standard errors of 0.01 / sqrt(3).
    assert difference["mean"] == pytest.approx(-0.01)
    assert difference["low"] == pytest.approx(-0.01 - 4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert difference["high"] == pytest.approx(-0.01 + 4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert take_difference([0.5], [0.25]) == {"mean": 0.25, "low": None, "high": None}
    assert take_difference([None], [0.25])["mean"] is None


def test_what_crashes_is_reported_and_the_others_go_on(path, tree):
    tree["variants"] = {
        "explodes": {"overrides": EXPLODES},
        "killed": {},
        "none": {"overrides": {"freezing.policy": "none"}},
    }
    process = start(path, tree | {"baseline": "none", "repetitions": 1}, "--json")
    wait_for((path.parent / "out" / "processes" / "0-killed.log").exists)
    os.kill(wait_for(lambda: children(process))[0], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    printed = json.loads(out)
    first, second = printed["failures"]
    assert (first["variant"], second["variant"]) == ("explodes", "killed")
    assert "exit code 1" in first["failure"]
    assert "stopped: the loss is" in first["failure"]
    assert "ended by SIGKILL" in second["failure"]
    assert printed["variants"]["explodes"]["wall_seconds"] == [None]
    assert printed["variants"]["none"]["metric"][0] > 0
    assert printed["ratios"]["none"]["metric"]["median"] == 1


def test_ctrl_c_ends_the_process_and_shows_what_there_is(path, tree):
    process = start(path, tree)
    wait_for((path.parent / "out" / "processes" / "0-none.log").exists)
    worker = wait_for(lambda: children(process))[0]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "trainer" in out
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    result = json.loads((path.parent / "out" / "result.json").read_text())
    assert result["variants"]["trainer"]["wall_seconds"][0] > 0
    assert not result["complete"]


def test_a_worker_ends_with_the_bench_that_was_killed(path, tree):
    process = start(path, tree)
    worker = wait_for(lambda: children(process))[0]
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())

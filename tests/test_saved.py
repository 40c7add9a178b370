"""Finished runs measured from their folders: to the same figures, between one another, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
from parallel import free_port
from safetensors.torch import load_file, save_file
from test_gauging import SMALL, sharpness_of, without_times
from test_run import config_of
from tiny import FAMILIES, save_tiny_model, tiny_tree_in

from safe_lab import config as configuration
from safe_lab.cli import main
from safe_lab.run import run
from safe_lab.run_folder import hold
from safe_lab.saved import load_run, measure_between, measure_runs
from safe_lab.section import ConfigError

SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """The runs of one training."""
    folder = tmp_path_factory.mktemp("trained")
    run(config_of(tiny_tree_in(folder, tiny_folder)))
    return folder / "runs"


@pytest.fixture
def finished(trained, tiny_tree):
    """A run that was not measured, in a folder of the test's own, with data of its own."""
    config = config_of(tiny_tree)
    shutil.copytree(trained, config.output_dir)
    (config.run_folder / "config.yaml").write_text(configuration.dump(config))
    return config


ADAPTERS = {
    "lora": {},
    "pissa": {"options": {"init_lora_weights": "pissa"}},
    "dora": {"options": {"use_dora": True}},
    "ia3": {"method": "ia3", "rank": None, "alpha": None, "options": {"feedforward_modules": []}},
    "loha": {"method": "loha"},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_folder_gives_the_figures_that_the_run_itself_gave(tiny_tree, adapter):
    config = config_of(tiny_tree, adapter=ADAPTERS[adapter], sharpness=SMALL | {"when": "end"})
    run(config)
    before = without_times(sharpness_of(config))
    # What attaching takes from the base is computed anew, and rounds.
    exact = adapter != "pissa"
    after = without_times(measure_runs([config.run_folder])["tiny/default/seed-0"])
    assert without_times(sharpness_of(config)) == after
    if exact:
        assert after == before
    else:
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
        assert after["trace"]["value"] == pytest.approx(before["trace"]["value"], rel=1e-3)
    assert (after["effective_weight_trace"] or 0) > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "deberta-v2"])
def test_other_families_and_regression_are_measured(tiny_tree, tmp_path, family):
    folder = save_tiny_model(tmp_path / "other", family)
    data = tmp_path / "scores.csv"
    data.write_text("text,label\n" + "".join(f"word{i} word{i + 1},{i / 7:.2f}\n" for i in range(24)))
    config = config_of(
        tiny_tree,
        model={"path": str(folder)},
        adapter={"target_modules": FAMILIES[family][2]},
        data={"task": "regression", "path": str(data)},
        training={"max_steps": 4},
        freezing={"policy": "none"},
        sharpness=SMALL | {"when": "end"},
    )
    run(config)
    figures = sharpness_of(config)
    assert figures["gauss_newton_trace"]["value"] > 0
    assert figures["effective_weight_trace"] > 0
    assert figures["left_out"] == []


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"attention": "eager"}},
        {"model": {"dtype": "bfloat16"}},
        {"training": {"mixed_precision": "bf16"}},
        {"model": {"gradient_checkpointing": True}},
        {"freezing": {"unit": "matrix"}},
    ],
    ids=["eager", "bfloat16 weights", "bf16 autocast", "gradient checkpointing", "matrix units"],
)
def test_the_run_and_its_folder_agree_whatever_it_trained_in(tiny_tree, sections):
    config = config_of(tiny_tree, **sections, sharpness=SMALL | {"when": "end"})
    run(config)
    before = without_times(sharpness_of(config))
    assert without_times(measure_runs([config.run_folder])["tiny/default/seed-0"]) == before
    assert before["space"]["dtype"] == "float32"


def test_overrides_are_of_this_measuring_alone(finished):
    before = (finished.run_folder / "config.yaml").read_text()
    figures = measure_runs(
        [finished.run_folder], [*SETTINGS, "sharpness.samples=5", "measures=[trace]", "validation_samples=0"]
    )["tiny/default/seed-0"]
    assert figures["examples"] == 5
    assert "spectrum" not in figures and "validation" not in figures
    assert (finished.run_folder / "config.yaml").read_text() == before


def test_json_is_what_the_result_holds_and_nothing_else_is_printed(finished, capsys):
    assert main(["sharpness", str(finished.run_folder), *SETTINGS, "measures=[trace]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sharpness_of(finished)


def test_between_two_runs_there_is_a_line_and_between_three_a_plane(tiny_tree, tmp_path, caplog):
    folders = []
    for seed in range(3):
        config = config_of(tiny_tree, seed=seed)
        run(config)
        folders.append(config.run_folder)
    quick = [*SETTINGS, "measures=[trace,spectrum]", "landscape_points=5"]
    measure_runs(folders[:1], quick)
    before = (folders[0] / "result.json").read_text()
    two = measure_between(folders[:2], quick, output=tmp_path / "two")
    assert two["marks"] == {"tiny/default/seed-0": 0.0, "tiny/default/seed-1": 1.0}
    assert min(two["barriers"].values()) >= 0
    three = measure_between(folders, quick, output=tmp_path / "three")
    assert (folders[0] / "result.json").read_text() == before
    assert len(three["sides"]) == 3
    assert json.loads((tmp_path / "three" / "between.json").read_text()) == three
    assert (tmp_path / "two" / "line.png").exists() and (tmp_path / "three" / "plane.html").exists()
    # The line begins with the first run itself.
    at_first = two["losses"]["training"][two["positions"].index(0.0)]
    assert at_first == pytest.approx(
        json.loads((folders[0] / "result.json").read_text())["sharpness"]["loss"], rel=1e-6
    )
    assert three["sides"][0]["losses"]["training"][-1] == pytest.approx(
        two["losses"]["training"][two["positions"].index(1.0)], rel=1e-6
    )
    # One file's rows are held out by the seed.
    assert (
        "would be measured on other rows: losses between the runs are over those of tiny/default/seed-0" in caplog.text
    )
    with pytest.raises(ConfigError, match="a line between two runs and a plane through three, got 1"):
        measure_between(folders[:1], quick)
    with pytest.raises(ConfigError, match="a run was named twice"):
        measure_between(folders[:1] * 2, quick)


def test_runs_that_share_no_model_have_no_line(tiny_tree, tmp_path, finished):
    other = config_of(tiny_tree, variant="rank-4", adapter={"rank": 4})
    run(other)
    with pytest.raises(
        ConfigError, match=r"rank-4.*has another adapter section than .*: there is no line between them"
    ):
        measure_between([finished.run_folder, other.run_folder], SETTINGS)


def damage(what):
    def change(config):
        folder = config.run_folder
        adapter = folder / "adapter" / "adapter_model.safetensors"
        if what == "unfinished":
            (folder / "result.json").unlink()
        elif what == "no run":
            (folder / "config.yaml").unlink()
        elif what == "no adapter":
            shutil.rmtree(folder / "adapter")
        elif what == "cut adapter":
            adapter.write_bytes(adapter.read_bytes()[:-100])
        elif what == "other adapter":
            weights = load_file(adapter)
            weights.pop(next(key for key in weights if "lora_A" in key))
            save_file(weights, adapter)
        elif what == "other rank":
            save_file({k: t[:1] if "lora_A" in k else t for k, t in load_file(adapter).items()}, adapter)
        elif what == "no data":
            (folder.parents[3] / "data.csv").unlink()
        elif what == "other labels":
            path = folder.parents[3] / "data.csv"
            path.write_text(path.read_text().replace(",1\n", ",7\n"))
        elif what == "damaged result":
            (folder / "result.json").write_text("{")
        elif what == "a list for a result":
            (folder / "result.json").write_text("[]")
        elif what == "other base":
            result = json.loads((folder / "result.json").read_text())
            result["fingerprints"]["base"] = "0" * len(result["fingerprints"]["base"])
            (folder / "result.json").write_text(json.dumps(result))

    return change


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("unfinished", "there is no result.json: the run has not finished"),
        ("no run", "there is no config.yaml: it is no run folder"),
        ("no adapter", "adapter_model.safetensors: there is no whole adapter"),
        ("cut adapter", "adapter_model.safetensors: there is no whole adapter"),
        ("other adapter", "the adapter has other weights than the configuration's model"),
        ("other rank", "has the shape (1, 16), and the configuration's model (2, 16)"),
        ("no data", "data.csv"),
        ("other labels", "the data has the labels ['0', '7'], and the run had ['0', '1']"),
        ("damaged result", "result.json"),
        ("a list for a result", "result.json is damaged (it holds no object)"),
        ("other base", "the weights behind model.path are not those that the run was trained on"),
    ],
)
def test_a_folder_that_cannot_be_measured_is_refused_in_one_line(finished, capsys, what, line):
    damage(what)(finished)
    assert main(["sharpness", str(finished.run_folder), *SETTINGS]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0] and str(finished.run_folder) in errors[0]


def test_rows_that_have_changed_are_told(finished, caplog):
    path = finished.run_folder.parents[3] / "data.csv"
    text, label = path.read_text().rstrip().rsplit(",", 1)
    path.write_text(f"{text} more,{label}\n")
    measure_runs([finished.run_folder], [*SETTINGS, "measures=[norms]"])
    assert "split does not hold what it held when the run was trained" in caplog.text


def test_measuring_again_leaves_nothing_of_the_time_before(finished):
    measure_runs([finished.run_folder], [*SETTINGS, "landscape=[random_line]", "landscape_points=3"])
    pictures = finished.run_folder / "sharpness"
    assert (pictures / "random_line.png").exists()
    measure_runs([finished.run_folder], [*SETTINGS, "measures=[norms]", "validation_samples=0"])
    assert list(pictures.iterdir()) == []
    figures = sharpness_of(finished)
    assert "trace" not in figures and "landscape_cost" not in figures
    assert figures["settings"]["measures"] == ["norms"]


def test_settings_of_trainings_alone_are_said_to_have_no_effect(finished, caplog):
    measure_runs([finished.run_folder], [*SETTINGS, "measures=[norms]", "validation_samples=0", "every=freeze"])
    assert "every=freeze has no effect here: it is for safe-lab train" in caplog.text


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("sampels=3", "sharpness.sampels: unknown key; did you mean samples?"),
        ("measures=[trase]", "'trase' is no measure; did you mean trace?"),
        ("samples=0", "sharpness.samples"),
        ("landscape_points=4", "an odd number is needed, with the solution in the middle"),
        ("training.epochs=3", "sharpness.training"),
    ],
)
def test_a_wrong_setting_is_named(finished, capsys, word, line):
    assert main(["sharpness", str(finished.run_folder), word]) == 2
    assert line in capsys.readouterr().err


def test_a_missing_folder_and_no_folder_are_refused(capsys):
    assert main(["sharpness", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere: there is no such folder\n"
    with pytest.raises(SystemExit):
        main(["sharpness", "samples=3"])
    assert "the folder of a finished run is needed" in capsys.readouterr().err


def test_a_folder_that_a_live_run_writes_to_is_left_alone(finished, capsys):
    with hold(finished.run_folder, "held"):
        assert main(["sharpness", str(finished.run_folder), *SETTINGS]) == 2
    assert "a live run is writing to this folder" in capsys.readouterr().err


def test_a_run_of_a_version_before_sharpness_is_measured(finished):
    path = finished.run_folder / "config.yaml"
    text = path.read_text()
    start, end = text.index("sharpness:"), text.index("tracking:")
    path.write_text(text[:start] + text[end:])
    result = json.loads((finished.run_folder / "result.json").read_text())
    result.pop("sharpness")
    (finished.run_folder / "result.json").write_text(json.dumps(result))
    measure_runs([finished.run_folder], [*SETTINGS, "measures=[trace]"])
    assert sharpness_of(finished)["trace"]["standard_error"] > 0


def test_a_loaded_run_has_the_weights_that_were_saved(finished):
    import torch

    from safe_lab.processes import ALONE

    saved = load_run(finished.run_folder, [], torch.device("cpu"), ALONE)
    weights = load_file(finished.run_folder / "adapter" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in saved.model.named_parameters() if "lora_" in name}
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.items())
    assert saved.space.num_dimensions == sum(p.numel() for p in loaded.values()) + sum(p.numel() for p in saved.head)


@pytest.mark.slow
def test_two_processes_share_the_examples_and_come_to_the_same(finished):
    words = [str(finished.run_folder), *SETTINGS, "dtype=float64", "--json"]
    alone = measure_runs([finished.run_folder], [*SETTINGS, "dtype=float64"])["tiny/default/seed-0"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"),
        *(f"--master_port={free_port()}", "-m", "safe_lab", "sharpness", *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["processes"] == 2
    for name in ("trace", "gauss_newton_trace"):
        assert together[name]["value"] == pytest.approx(alone[name]["value"], rel=1e-6)
    assert together["top_eigenvalues"] == pytest.approx(alone["top_eigenvalues"], rel=1e-6)
    assert together["effective_weight_trace"] == pytest.approx(alone["effective_weight_trace"], rel=1e-9)
    assert together["ball"] == pytest.approx(alone["ball"], rel=1e-6)

"""Sharpness of a run: during training, at its end, and what it must not touch."""

import json

import pytest
import torch
from parallel import assert_like_one, run_up_to
from safetensors.torch import load_file
from test_run import bits, config_of
from test_tracking import records

from safe_lab import gauging
from safe_lab import run as run_module
from safe_lab.build import build
from safe_lab.config import SharpnessSection
from safe_lab.console import Console
from safe_lab.gauging import plans_at_end
from safe_lab.job import build_accelerator
from safe_lab.run import run
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError
from safe_lab.sharpness import MEASURES, Plan
from safe_lab.sharpness.gauge import TRAINING

SMALL = {
    "samples": 16,
    "validation_samples": 4,
    "spectrum_starts": 2,
    "spectrum_steps": 4,
    "directions": 2,
    # A model that knows nothing yet has hardly any trace to be within a share of.
    "tolerance": 0.5,
    "budget_products": 60,
}


def sharpness_of(config):
    return json.loads((config.run_folder / "result.json").read_text())["sharpness"]


def without_times(figures):
    if isinstance(figures, dict):
        return {key: without_times(value) for key, value in figures.items() if not key.startswith("seconds")}
    return figures


@pytest.mark.parametrize("every", [1, "freeze"])
def test_measuring_during_training_changes_no_bit_of_the_run(tiny_tree, every):
    plain = config_of(tiny_tree)
    watched = config_of(tiny_tree, variant="watched", sharpness=SMALL | {"every": every})
    for config in (plain, watched):
        run(config)
    weights, rows, result = bits(plain.run_folder)
    weights_watched, rows_watched, result_watched = bits(watched.run_folder)
    assert weights_watched == weights
    assert rows_watched == rows
    assert result_watched | {"variant": "default"} == result
    # Frozen adapters were folded and layers skipped while it was measured.
    assert result["savings"]["folded_layers"] and result["savings"]["prefix_depth"]
    assert RunFolder(watched.run_folder).rows("sharpness.jsonl")


def test_a_row_is_written_after_each_freeze_event_or_every_so_many_epochs(tiny_tree):
    at_events = config_of(tiny_tree, sharpness=SMALL | {"every": "freeze"})
    run(at_events)
    events = [row["step"] for row in RunFolder(at_events.run_folder).rows("events.jsonl")]
    rows = RunFolder(at_events.run_folder).rows("sharpness.jsonl")
    assert [row["step"] for row in rows] == events != []
    assert all(row["sharpness/trace_standard_error"] >= 0 for row in rows)
    by_epoch = config_of(tiny_tree, variant="epochs", sharpness=SMALL | {"every": 2})
    run(by_epoch)
    assert [row["epoch"] for row in RunFolder(by_epoch.run_folder).rows("sharpness.jsonl")] == [2]


def test_a_resumed_run_measures_the_same_and_no_row_twice(tiny_tree):
    whole = config_of(tiny_tree, sharpness=SMALL | {"every": 1, "when": "end"})
    run(whole)
    parted = config_of(tiny_tree, variant="parted", sharpness=SMALL | {"every": 1, "when": "end"})
    run_up_to(12, parted)
    run(parted, resume=True)
    assert RunFolder(parted.run_folder).rows("sharpness.jsonl") == RunFolder(whole.run_folder).rows("sharpness.jsonl")
    assert without_times(sharpness_of(parted)) == without_times(sharpness_of(whole))


def test_the_result_holds_figures_of_both_samples_and_the_folder_pictures(tiny_tree):
    config = config_of(
        tiny_tree, sharpness=SMALL | {"when": "end", "landscape": ["random_line", "eigen_plane"], "landscape_points": 3}
    )
    result = run(config)
    figures = sharpness_of(config)
    assert without_times(figures) == without_times(json.loads(json.dumps(result.sharpness)))
    assert figures["trace"].keys() >= {"value", "standard_error", "products"}
    assert len(figures["top_eigenvalues"]) == 5
    assert figures["trace_by_unit"].keys() == {unit["unit"] for unit in result.adapters}
    total = sum(unit["value"] for unit in figures["trace_by_unit"].values())
    assert total == pytest.approx(figures["trace"]["value"], rel=1e-5)
    assert (figures["examples"], figures["validation"]["examples"]) == (16, 4)
    assert figures["left_out"] == [] and figures["cost"]["products"] > 0
    pictures = config.run_folder / "sharpness"
    assert {"spectrum.png", "random_line.html", "eigen_plane.png", "landscape.json"} <= {
        path.name for path in pictures.iterdir()
    }
    assert figures["landscape_cost"]["losses"] > 9
    assert figures["settings"] == config.sharpness.model_dump(mode="json")
    vectors = load_file(pictures / "eigenvectors.safetensors")["training"]
    assert torch.allclose(vectors.T @ vectors, torch.eye(5), atol=1e-4)


@pytest.mark.slow
def test_wandb_carries_the_figures_of_training_and_end(tiny_tree):
    config = config_of(tiny_tree, tracking={"wandb": "offline"}, sharpness=SMALL | {"every": "freeze", "when": "end"})
    run(config)
    found = records(config.run_folder)
    history = json.dumps([record for record in found if "history" in json.dumps(record)[:200]])
    assert "sharpness/trace" in history
    text = json.dumps(found)
    for key in (
        "sharpness/top_eigenvalue",
        "sharpness/validation_gauss_newton_trace",
        "sharpness/effective_weight_trace",
    ):
        assert key in text, key
    assert "sharpness/spectrum" in text


def test_what_goes_wrong_at_the_end_costs_the_figures_and_not_the_run(tiny_tree, monkeypatch, caplog):
    def fail(*_):
        raise FloatingPointError("a product with the curvature of the loss is not finite")

    monkeypatch.setattr(run_module, "take", fail)
    config = config_of(tiny_tree, sharpness=SMALL | {"when": "end"})
    run(config)
    why = "a product with the curvature of the loss is not finite"
    assert f"its sharpness was not measured: {why}; safe-lab sharpness {config.run_folder}" in caplog.text
    result = json.loads((config.run_folder / "result.json").read_text())
    assert result["metrics"] and result["sharpness"] is None


def test_what_cannot_be_measured_is_refused_before_training(tiny_tree):
    config = config_of(tiny_tree, sharpness=SMALL | {"when": "end", "units": ["encoder.layer.9"]})
    with pytest.raises(
        ConfigError, match=r"sharpness.units: there is no unit 'encoder.layer.9'; there are bert.encoder"
    ):
        run(config)
    assert not (config.run_folder / "result.json").exists()


def test_a_budget_ends_the_measuring_and_says_what_was_left_out(tiny_tree):
    config = config_of(tiny_tree, sharpness=SMALL | {"when": "end", "budget_products": 12})
    run(config)
    figures = sharpness_of(config)
    assert figures["spectrum"] and "trace" not in figures
    # The exact Gauss-Newton trace takes no products.
    assert figures["left_out"] == ["trace"] and figures["gauss_newton_trace"]["converged"]


def test_plan_is_by_default_what_the_section_is():
    assert plans_at_end(SharpnessSection())[TRAINING] == Plan(tuple(MEASURES))


def test_one_unit_alone_and_the_head_can_make_up_the_space(tiny_tree):
    unit = "bert.encoder.layer.1"
    config = config_of(
        tiny_tree, sharpness=SMALL | {"when": "end", "units": [unit], "head": True, "measures": ["trace", "norms"]}
    )
    run(config)
    figures = sharpness_of(config)
    assert figures["space"]["units"] == [unit]
    assert figures["trace_by_unit"].keys() == {unit, "head"}
    assert figures["norms"].keys() == {unit}


def test_the_same_rows_are_drawn_for_the_same_seed_the_longest_first(tiny_tree):
    def samples(seed):
        config = config_of(tiny_tree, variant=f"seed-{seed}", sharpness=SMALL | {"every": 1, "seed": seed})
        config.run_folder.mkdir(parents=True, exist_ok=True)
        parts = build(config, RunFolder(config.run_folder), Console(quiet=True), build_accelerator(config.training))
        return parts.gauge._samples["training"]

    one, again, other = samples(0), samples(0), samples(1)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.num_examples == sum(len(batch["labels"]) for batch in one.batches) == 16
    widths = [batch["input_ids"].shape[1] for batch in one.batches]
    assert widths == sorted(widths, reverse=True)


def test_flat_names_of_the_validation_sample_begin_with_it():
    figures = {"loss": 1.0, "validation": {"loss": 2.0}}
    assert gauging.summarize_all(figures) == {"loss": 1.0, "validation_loss": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_processes_measure_together_and_train_on_as_one(tree, dtype):
    together, alone = assert_like_one(tree, count=2, sharpness=SMALL | {"every": 1, "when": "end", "dtype": dtype})
    assert together.sharpness["processes"] == 2
    # After training that has rounded otherwise.
    assert together.sharpness["loss"] == pytest.approx(alone.sharpness["loss"], rel=1e-4)
    assert together.sharpness["fingerprint"] == alone.sharpness["fingerprint"]

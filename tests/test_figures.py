"""Every figure that a run reports has a name, and every name is of a figure that a run reports."""

import json

import pytest
from test_gauging import SMALL
from test_run import config_of

from safe_lab.figures import FIGURES, check_figure, known_figures, parse_amount, read_figure
from safe_lab.run import run

NO_METER = {"resources/joules", "resources/device_allocated_peak_bytes", "resources/device_reserved_peak_bytes"}


def numbers(tree, prefix=""):
    """Paths of the numbers in nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key


def test_names_and_reported_figures_are_the_same(tiny_tree):
    config = config_of(tiny_tree, sharpness=SMALL | {"when": "end"})
    run(config)
    result = json.loads((config.run_folder / "result.json").read_text())
    # What is about the run, of each process, or a forecast of another run.
    about = {"seed", "sharpness", "processes", "unfrozen_forecast", "examples", "truncated", "baselines", "metrics"}
    reported = set(numbers({key: value for key, value in result.items() if key not in about}))
    assert reported - set(FIGURES) <= NO_METER | {"resources/traced_micro_steps", "resources/scaled_micro_steps"}
    assert set(FIGURES) - reported <= NO_METER
    known = known_figures(config)
    assert set(result["metrics"]) <= set(known)
    for name in known:
        if name not in NO_METER:
            assert isinstance(read_figure(result, name), float)
    assert read_figure(result, "sharpness/trace") == result["sharpness"]["trace"]["value"]
    with pytest.raises(ValueError, match="has no figure 'resources/joules', or nothing on this machine"):
        read_figure(result | {"resources": result["resources"] | {"joules": None}}, "resources/joules")


@pytest.mark.parametrize("name", ["test/accuracy", "test_matched/f1"])
def test_figures_of_a_test_split_have_no_name(name, tiny_tree):
    with pytest.raises(ValueError, match="of a test split"):
        check_figure(name, config_of(tiny_tree))


def test_metrics_are_those_of_the_task(tiny_tree):
    config = config_of(tiny_tree, data={"task": "mnli"})
    check_figure("validation_mismatched/accuracy", config)
    with pytest.raises(ValueError, match="no figure"):
        check_figure("validation/accuracy", config)


def test_an_amount_is_a_number_or_a_size():
    assert [parse_amount("frozen_depth", text) for text in ("1e-3", "2")] == [1e-3, 2.0]
    assert [parse_amount("resources/memory_peak_bytes", text) for text in ("1.5KiB", "2e9", "1E+09")] == [
        1536.0,
        2e9,
        1e9,
    ]
    assert parse_amount("resources/memory_mean_by_kind/activations", "2GiB") == 2 * 1024**3
    assert [parse_amount("resources/flops", text) for text in ("1.5 TFLOP", "2e9")] == [1.5e12, 2e9]
    assert [parse_amount("resources/wall_seconds", text) for text in ("90", "90s", "1.5 min")] == [90.0] * 3
    with pytest.raises(ValueError, match="no unit 'apples'"):
        parse_amount("resources/memory_peak_bytes", "6 apples")
    with pytest.raises(
        ValueError, match="is no amount of resources/flops: a number and a unit, GFLOP or TFLOP or PFLOP"
    ):
        parse_amount("resources/flops", "1TB")

import numpy as np
import pytest

from safe_lab.data.metrics import METRICS, compute_metrics

PREDICTIONS = np.array([1, 1, 0, 1, 0, 0])
LABELS = np.array([1, 0, 0, 1, 1, 0])  # tp 2, fp 1, fn 1, tn 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("accuracy", 4 / 6), ("f1", 4 / 6), ("macro_f1", 4 / 6), ("matthews_correlation", (2 * 2 - 1 * 1) / 9)],
)
def test_classification_metric_worked_by_hand(name, expected):
    assert compute_metrics([name], PREDICTIONS, LABELS) == {name: pytest.approx(expected)}


def test_correlations_worked_by_hand():
    # Deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): 3 / sqrt(2 * 42/9); the ranks agree.
    values = compute_metrics(["pearson", "spearman"], np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 3.0]))
    assert values == {"pearson": pytest.approx(3 / np.sqrt(2 * 42 / 9)), "spearman": pytest.approx(1.0)}


@pytest.mark.parametrize("name", ["matthews_correlation", "pearson", "spearman"])
@pytest.mark.parametrize("constant_side", ["predictions", "labels"])
def test_undefined_coefficient_is_zero(name, constant_side):
    constant, other = np.zeros(4, dtype=int), np.array([0, 1, 1, 0])
    pair = (constant, other) if constant_side == "predictions" else (other, constant)
    assert compute_metrics([name], *pair) == {name: 0.0}


def test_f1_without_positives_is_zero():
    assert compute_metrics(["f1"], np.zeros(3, dtype=int), np.zeros(3, dtype=int)) == {"f1": 0.0}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_one_for_perfect_predictions(name):
    labels = np.array([0, 1, 1, 0, 1])
    assert compute_metrics([name], labels, labels)[name] == pytest.approx(1.0)


def test_predictions_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="finite"):
        compute_metrics(["pearson"], np.array([1.0, np.nan]), np.array([1.0, 2.0]))


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (0,)), ((2, 1), (2, 1))])
def test_shapes_that_do_not_fit_are_an_error(shapes):
    with pytest.raises(ValueError, match="shapes"):
        compute_metrics(["accuracy"], np.zeros(shapes[0]), np.zeros(shapes[1]))

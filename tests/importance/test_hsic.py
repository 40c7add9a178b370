"""HSIC in one pass against Gram matrices written out, and against the pytorch-cka package."""

from __future__ import annotations

import cka as pytorch_cka
import pytest
import torch

from safe_lab.importance.cka import Comparison
from safe_lab.importance.hsic import Moments
from safe_lab.units import Unit

UNIT = Unit("unit", 0, {})


def dense_hsic(x, y, estimator):
    """The textbook: n x n Gram matrices in float64."""
    k, l = (z.double() @ z.double().T for z in (x, y))  # noqa: E741
    n = len(k)
    one = torch.ones(n, dtype=torch.float64)
    if estimator == "biased":
        centring = torch.eye(n, dtype=torch.float64) - 1 / n
        return torch.trace(k @ centring @ l @ centring).item()
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    total = (
        torch.trace(k @ l) + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return (total / (n * (n - 3))).item()


def dense_importance(x, y, estimator):
    xy, xx, yy = (dense_hsic(a, b, estimator) for a, b in ((x, y), (x, x), (y, y)))
    return 1 - xy / (xx * yy) ** 0.5


def one_pass_importance(x, y, estimator, *, chunk=7):
    comparison = Comparison(estimator)
    for x_chunk, y_chunk in zip(x.split(chunk), y.split(chunk), strict=True):
        comparison.add(x_chunk, y_chunk)
    return comparison.importance(UNIT)


def pair(n=40, d=6, *, noise=0.3, offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + d)
    y = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = y + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (x + offset).to(dtype), (y + offset).to(dtype)


both = pytest.mark.parametrize("estimator", ["biased", "debiased"])


@both
@pytest.mark.parametrize(("n", "d"), [(40, 6), (9, 30)], ids=["many rows", "many features"])
def test_one_pass_equals_gram_matrices(estimator, n, d):
    x, y = pair(n, d)
    moments = Moments()
    for chunk in range(0, n, 7):
        moments.add(x[chunk : chunk + 7], y[chunk : chunk + 7])
    assert moments.hsic(estimator) == pytest.approx(dense_hsic(x, y, estimator), rel=1e-10)
    assert one_pass_importance(x, y, estimator) == pytest.approx(dense_importance(x, y, estimator), abs=1e-12)


@both
def test_features_may_differ_in_number(estimator):
    x, y = pair()
    moments = Moments()
    moments.add(x[:, :4], y)
    assert moments.hsic(estimator) == pytest.approx(dense_hsic(x[:, :4], y, estimator), rel=1e-10)


@both
def test_large_common_offset_costs_no_accuracy(estimator):
    plain, moved = pair(), pair(offset=1e6)
    assert one_pass_importance(*moved, estimator) == pytest.approx(one_pass_importance(*plain, estimator), abs=1e-9)


def test_debiased_equals_the_pytorch_cka_package():
    x, y = pair()
    oracle = 1 - pytorch_cka.cka_from_features(x, y).item()
    assert one_pass_importance(x, y, "debiased") == pytest.approx(oracle, abs=1e-12)


def test_worked_value():
    # Centred already: X = (1, -1, 1, -1), Y = (1, 1, -1, -1) + X, so CKA = (4)^2 / (4 * 8) in one feature each.
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]) + x
    assert one_pass_importance(x, y, "biased") == pytest.approx(1 - 16 / 32)


@both
def test_identical_rows_score_exactly_zero(estimator):
    x, _ = pair()
    assert one_pass_importance(x, x.clone(), estimator) == 0.0


@both
def test_rotation_and_scale_score_zero(estimator):
    x, _ = pair()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert one_pass_importance(3 * x @ rotation + 1, x, estimator) == pytest.approx(0, abs=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_rows_score_zero_if_equal_and_one_if_not(estimator, dtype):
    constant = torch.full((20, 3), 0.1, dtype=dtype)
    assert one_pass_importance(constant, constant.clone(), estimator) == 0
    assert one_pass_importance(constant + 1, constant, estimator) == 1
    assert one_pass_importance(pair(20, 3, dtype=dtype)[0], constant, estimator) == 1
    assert one_pass_importance(constant, pair(20, 3, dtype=dtype)[0], estimator) == 1


@both
def test_rows_that_differ_by_rounding_count_as_constant(estimator):
    constant = torch.full((20, 3), 100.0)
    rounded = constant.clone()
    rounded[::2] = torch.nextafter(rounded[::2], torch.tensor(200.0))
    assert one_pass_importance(rounded, pair(20, 3, dtype=torch.float32)[0], estimator) == 1


def test_biased_score_lies_between_zero_and_one_and_debiased_may_pass_one():
    generator = torch.Generator().manual_seed(5)
    draws = [(torch.randn(6, 20, generator=generator), torch.randn(6, 20, generator=generator)) for _ in range(20)]
    assert all(0 <= one_pass_importance(x, y, "biased") <= 1 for x, y in draws)
    debiased = [one_pass_importance(x, y, "debiased") for x, y in draws]
    assert max(debiased) > 1
    assert all(0 <= value <= 2 for value in debiased)


@both
def test_nan_stays_nan(estimator):
    x, y = pair()
    x[3, 2] = torch.nan
    assert one_pass_importance(x, y, estimator) != one_pass_importance(x, y, estimator)


@both
def test_half_precision_is_accumulated_in_float64(estimator):
    x, y = pair(n=200, offset=8.0, dtype=torch.bfloat16)
    assert one_pass_importance(x, y, estimator) == pytest.approx(dense_importance(x, y, estimator), abs=1e-9)


def test_debiased_refuses_fewer_than_four_rows():
    x, y = pair(n=3)
    with pytest.raises(ValueError, match=r"at least 4 rows, got 3.*biased"):
        one_pass_importance(x, y, "debiased")


def test_batch_without_rows_changes_nothing():
    x, y = pair()
    comparison = Comparison("biased")
    for rows in (slice(0, 0), slice(0, 20), slice(0, 0), slice(20, 40)):
        comparison.add(x[rows], y[rows])
    assert comparison.importance(UNIT) == pytest.approx(dense_importance(x, y, "biased"), abs=1e-12)


def test_rows_of_different_shape_are_refused():
    x, y = pair()
    with pytest.raises(RuntimeError, match="probe changed"):
        Comparison("biased").add(x, y[:3])

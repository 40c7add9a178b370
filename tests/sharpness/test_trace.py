"""Trace estimators on matrices of known spectrum: the mean, the spread, and how fast the error falls."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from problems import F64, Counted, matrix_of, seeded

from safe_lab.sharpness import xtrace as xtrace_module
from safe_lab.sharpness.estimate import Estimate
from safe_lab.sharpness.lanczos import lanczos
from safe_lab.sharpness.trace import ESTIMATORS, estimate_trace, hutchinson
from safe_lab.sharpness.xtrace import deflated, xtrace

SIZE = 120
INDEX = torch.arange(SIZE, dtype=F64)
SPECTRA = {
    "exponential": 0.8**INDEX,
    "algebraic": (INDEX + 1) ** -2,
    "flat": 1 + 0.5 * torch.cos(INDEX),
    "outliers": torch.where(INDEX < 3, 50 / (INDEX + 1), torch.rand(SIZE, generator=seeded(1), dtype=F64)),
    "indefinite": torch.randn(SIZE, generator=seeded(2), dtype=F64) + 0.3,
    "low rank": torch.where(INDEX < 4, 5 - INDEX, 0),
}
every_estimator = pytest.mark.parametrize("estimator", sorted(ESTIMATORS))


def read_trace(diagonals_Dm):
    return diagonals_Dm.sum(0, keepdim=True)


def estimate(matrix, *, estimator="xtrace", seed=0, read=read_trace, tolerance=0.0, products=None, seconds=None):
    counted = Counted(matrix)
    readings = ESTIMATORS[estimator](counted, matrix[0], read, seeded(seed))
    return estimate_trace(readings, tolerance=tolerance, budget=counted.budget(products, seconds))


def errors_of(matrix, estimator, *, seeds, read=read_trace, true=None, **limits):
    """Error of each reading and its reported standard error, (seeds, R) each."""
    true = matrix.trace()[None] if true is None else true
    found = [estimate(matrix, estimator=estimator, seed=seed, read=read, **limits).readings for seed in range(seeds)]
    values = torch.tensor([[reading.value for reading in readings] for readings in found], dtype=F64)
    reported = torch.tensor([[reading.standard_error for reading in readings] for readings in found], dtype=F64)
    return values - true, reported


def slope(x, y):
    """Of the straight line through logarithms."""
    x, y = (torch.tensor(values, dtype=F64).log() for values in (x, y))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# Mean and spread

# A jackknife errs on the safe side, and far where the spectrum falls steeply.
CAUTION = {"exponential": 0.15, "algebraic": 0.2}
CASES = [
    *(("hutchinson", name, 40) for name in SPECTRA),
    ("xtrace", "exponential", 80),
    ("xtrace", "algebraic", 80),
    ("xtrace", "flat", 24),
    ("xtrace", "outliers", 24),
    ("xtrace", "indefinite", 24),
]


@cache
def errors_of_case(estimator, name, products):
    return errors_of(matrix_of(SPECTRA[name]), estimator, seeds=100, products=products)


@pytest.mark.parametrize(("estimator", "name", "products"), CASES)
def test_estimates_are_unbiased(estimator, name, products):
    errors, _ = errors_of_case(estimator, name, products)
    assert abs(errors.mean()) < 4 * errors.std() / 10


@pytest.mark.parametrize(("estimator", "name", "products"), CASES)
def test_reported_error_is_the_error(estimator, name, products):
    """Of a normal estimate 99.7 % lie within three standard errors, of one from 12 samples 98.8 %."""
    errors, reported = errors_of_case(estimator, name, products)
    z = errors / reported
    assert (0.8 if estimator == "hutchinson" else CAUTION.get(name, 0.6)) < z.std() < 1.3
    assert (z.abs() <= 3).double().mean() >= 0.97


# How fast the error falls


def test_hutchinsons_error_falls_as_one_over_the_root_of_the_vectors():
    matrix, numbers = matrix_of(SPECTRA["algebraic"]), [8, 32, 128, 512]
    errors = [
        errors_of(matrix, "hutchinson", seeds=60, products=number)[0].square().mean() ** 0.5 for number in numbers
    ]
    assert -0.6 < slope(numbers, errors) < -0.4


@pytest.mark.parametrize("name", SPECTRA)
def test_hutchinsons_variance_is_twice_the_squares_off_the_diagonal(name):
    matrix = matrix_of(SPECTRA[name])
    (found,), _ = next(hutchinson(Counted(matrix), matrix[0], read_trace, seeded(), first=4000))
    off_diagonal = matrix - matrix.diag().diag()
    # A variance from 4000 numbers of such tails is known within some 4 %.
    assert 4000 * found.standard_error**2 == pytest.approx(2 * float(off_diagonal.square().sum()), rel=0.12)


def xtrace_rms(spectrum, number, *, seeds=40):
    matrix = matrix_of(spectrum)
    errors = [
        next(xtrace(Counted(matrix), matrix[0], read_trace, seeded(seed), first=number))[0][0].value
        - float(matrix.trace())
        for seed in range(seeds)
    ]
    return float(torch.tensor(errors).square().mean().sqrt())


def test_xtraces_error_falls_with_the_square_where_eigenvalues_fall_with_the_square():
    """What m vectors leave of 1 / k^2 has a Frobenius norm like m^-1.5, and the mean of m samples of that errs like m^-2."""
    numbers = [6, 10, 20, 40]
    assert -2.5 < slope(numbers, [xtrace_rms(SPECTRA["algebraic"], number) for number in numbers]) < -1.5


def test_xtraces_error_falls_exponentially_where_eigenvalues_do():
    errors = [xtrace_rms(SPECTRA["exponential"], number) for number in (10, 20, 30)]
    for before, after in itertools.pairwise(errors):
        assert before * 0.8**15 < after < before * 0.8**8


def test_xtraces_error_falls_as_hutchinsons_where_eigenvalues_are_noise():
    numbers = [6, 12, 24, 48]
    size = 400
    spectrum = torch.randn(size, generator=seeded(4), dtype=F64)
    assert -0.75 < slope(numbers, [xtrace_rms(spectrum, number, seeds=30) for number in numbers]) < -0.35


def test_xtraces_samples_beside_its_basis_are_unbiased(monkeypatch):
    """Where a basis is of no use, 50,000 vectors beside one of four directions know the trace within 0.2 %."""
    signs = torch.where(torch.arange(40) % 2 == 0, 1, -1)
    matrix = matrix_of(3 + 5 * signs)
    # With this seed the first samples tell that.
    monkeypatch.setattr(xtrace_module, "_REFUSALS", 1)
    readings = xtrace(Counted(matrix), matrix[0], read_trace, seeded(5), first=4, then=50_000)
    _, ((found,), num_products) = itertools.islice(readings, 2)
    assert num_products == 50_008
    assert abs(found.value - 120) < 3 * found.standard_error < 1


@pytest.mark.parametrize("name", ["indefinite decay", "outliers"])
def test_xtrace_does_not_stop_to_grow_while_directions_pay(name):
    """A few samples that happen to agree must not end it: then some seeds would be ten times as far off as others."""
    spectrum = {"indefinite decay": (-0.8) ** INDEX, "outliers": SPECTRA["outliers"]}[name]
    errors, _ = errors_of(matrix_of(spectrum), "xtrace", seeds=60, products=60)
    assert errors.abs().max() < 6 * errors.square().mean().sqrt()


@pytest.mark.parametrize("size", [8, 16, 64])
def test_float32_stays_exact_with_a_vector_for_every_dimension(size):
    for seed in range(40):
        matrix = matrix_of(torch.linspace(-1, 3, size)).float()
        readings = xtrace(Counted(matrix), matrix[0], read_trace, seeded(seed), first=size)
        assert next(readings)[0][0].value == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("definite", [True, False])
def test_xtrace_is_exact_with_a_vector_for_every_dimension(size, definite):
    spectrum = torch.randn(size, generator=seeded(5), dtype=F64)
    matrix = matrix_of(spectrum.abs() if definite else spectrum)
    found = estimate(matrix, products=200)
    assert found.readings[0].value == pytest.approx(float(matrix.trace()), abs=1e-10)
    assert found.readings[0].standard_error < 1e-10
    assert found.num_products == 2 * size
    assert found.converged


def test_xtrace_is_exact_once_it_has_grown_to_every_dimension():
    matrix = matrix_of(torch.logspace(0, -3, 12))
    found = estimate(matrix, products=200)
    assert found.readings[0].value == pytest.approx(float(matrix.trace()), abs=1e-10)
    assert found.converged


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_xtrace_is_exact_on_a_matrix_of_low_rank(dtype):
    matrix = matrix_of(SPECTRA["low rank"]).to(dtype)
    found = estimate(matrix, products=12)
    precision = 1e-10 if dtype == F64 else 1e-4
    assert found.readings[0].value == pytest.approx(14, abs=precision)
    assert found.readings[0].standard_error < precision


@pytest.mark.parametrize(("rank", "dtype"), [(1, torch.float32), (8, torch.float32), (8, F64)])
def test_xtrace_is_exact_where_most_weights_have_no_curvature_at_all(rank, dtype):
    """The products are then zero in all but a few entries, to the bit, and leave no rounding from which a basis could go on."""
    matrix = torch.diag(torch.where(torch.arange(40) < rank, 1.0, 0.0)).to(dtype)
    found = estimate(matrix, products=40)
    assert found.readings[0].value == pytest.approx(rank, abs=1e-4)


@every_estimator
def test_zero_matrix_has_trace_zero_without_error_at_once(estimator):
    found = estimate(torch.zeros(30, 30, dtype=F64), estimator=estimator, tolerance=0.05, products=200)
    assert found.readings == [Estimate(0, 0)]
    assert found.converged
    assert found.num_products <= 12


@every_estimator
def test_one_by_one_matrix_is_read_exactly(estimator):
    found = estimate(torch.tensor([[-3.0]], dtype=F64), estimator=estimator, products=200)
    assert found.readings[0].value == pytest.approx(-3, rel=1e-14)
    assert found.converged


def test_hutchinson_is_exact_on_a_diagonal_matrix():
    """Signs square to one: each entry of the diagonal is read as it is."""
    matrix = torch.diag(SPECTRA["indefinite"])
    readings, _ = next(hutchinson(Counted(matrix), matrix[0], lambda diagonals: diagonals, seeded()))
    assert [found.value for found in readings] == matrix.diag().tolist()
    assert {found.standard_error for found in readings} == {0}


# Entry by entry

GROUPS = [slice(0, 10), slice(10, 70), slice(70, SIZE)]
WEIGHTS = torch.rand(SIZE, generator=seeded(6), dtype=F64) ** 3


def read_all(diagonals_Dm):
    """The trace, a weighted trace, and that of each group."""
    groups = [diagonals_Dm[group].sum(0) for group in GROUPS]
    return torch.stack([diagonals_Dm.sum(0), WEIGHTS @ diagonals_Dm, *groups])


@pytest.mark.parametrize("name", ["outliers", "indefinite", "low rank"])
@every_estimator
def test_groups_add_up_to_the_trace(estimator, name):
    matrix = matrix_of(SPECTRA[name])
    readings = ESTIMATORS[estimator](Counted(matrix), matrix[0], read_all, seeded())
    for (trace, _, *groups), _ in itertools.islice(readings, 6):
        assert sum(group.value for group in groups) == pytest.approx(trace.value, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("name", ["exponential", "outliers", "indefinite"])
@every_estimator
def test_every_reading_is_unbiased_and_its_error_its_own(estimator, name):
    matrix = matrix_of(SPECTRA[name])
    true = read_all(matrix.diag()[:, None])[:, 0]
    errors, reported = errors_of(matrix, estimator, seeds=100, read=read_all, true=true, products=60)
    assert (errors.mean(0).abs() < 4 * errors.std(0) / 10).all()
    z = errors / reported
    lowest = 0.7 if estimator == "hutchinson" else CAUTION.get(name, 0.5)
    assert ((z.std(0) > lowest) & (z.std(0) < 1.5)).all()
    assert ((z.abs() <= 3).double().mean(0) >= 0.95).all()


@pytest.mark.parametrize("name", ["exponential", "outliers", "indefinite"])
def test_mean_and_jackknife_are_those_of_bases_made_anew_for_each_left_out(name):
    matrix, number = matrix_of(SPECTRA[name]), 7
    omega = torch.randn(SIZE, number, generator=seeded(3), dtype=F64)

    def sample(i, others):
        basis = torch.linalg.qr(matrix @ omega[:, others])[0]
        u = omega[:, i] - basis @ (basis.T @ omega[:, i])
        scale = (SIZE - len(others)) / u.square().sum()
        return read_all(((basis * (matrix @ basis)).sum(1) + scale * u * (matrix @ u))[:, None])[:, 0]

    def mean(of):
        return torch.stack([sample(i, [j for j in of if j != i]) for i in of]).mean(0)

    every = list(range(number))
    without = torch.stack([mean([i for i in every if i != j]) for j in every])
    error = ((number - 1) / number * (without - without.mean(0)).square().sum(0)).sqrt()
    readings, _ = next(xtrace(Counted(matrix), matrix[0], read_all, seeded(3), first=number))
    assert [found.value for found in readings] == pytest.approx(mean(every).tolist(), rel=1e-9)
    assert [found.standard_error for found in readings] == pytest.approx(error.tolist(), rel=1e-6)


# With a basis that is there already


@pytest.mark.parametrize("name", SPECTRA)
def test_deflated_trace_is_unbiased_and_its_error_its_own(name):
    matrix = matrix_of(SPECTRA[name])
    true = read_all(matrix.diag()[:, None])[:, 0]
    errors, reported = [], []
    for seed in range(100):
        counted = Counted(matrix)
        krylov = lanczos(
            counted, matrix[0], num_starts=2, num_steps=6, generator=seeded(seed), budget=counted.budget(None)
        )
        readings = deflated(counted, *krylov.union(), read_all, seeded(seed + 1000))
        found, num_products = next(itertools.islice(readings, 8, 9))
        assert num_products == 40
        assert name == "low rank" or counted.cost.products == 40 + 12
        errors.append([one.value for one in found])
        reported.append([one.standard_error for one in found])
    errors, reported = torch.tensor(errors, dtype=F64) - true, torch.tensor(reported, dtype=F64)
    if name == "low rank":
        assert errors.abs().max() < 1e-9
        return
    assert (errors.mean(0).abs() < 4 * errors.std(0) / 10).all()
    z = errors / reported
    assert ((z.std(0) > 0.7) & (z.std(0) < 1.4)).all()
    # Without the basis: 2 ||A||_F^2 off the diagonal, over as many vectors.
    assert errors[:, 0].std() < 1.2 * (2 * matrix.square().sum() / 40).sqrt()


def test_deflated_trace_is_exact_where_the_basis_has_everything():
    matrix = matrix_of(SPECTRA["indefinite"])
    ((found,), num_products), *rest = deflated(
        Counted(matrix), torch.eye(SIZE, dtype=F64), matrix, read_trace, seeded()
    )
    assert found == Estimate(pytest.approx(float(matrix.trace())), 0)
    assert num_products == 0 and rest == []


# When it ends


@pytest.mark.parametrize("name", ["exponential", "algebraic", "outliers", "low rank"])
def test_what_has_converged_is_within_three_standard_errors(name):
    """Though to end when the error looks small favours samples in which it looks too small."""
    errors, reported = errors_of(matrix_of(SPECTRA[name]), "xtrace", seeds=60, tolerance=0.05, products=200)
    # Rounding, where the matrix has fewer directions than vectors, is no error.
    within = errors.abs() <= 3 * reported + 1e-10
    assert within.double().mean() >= 0.97


@pytest.mark.parametrize("name", ["exponential", "algebraic", "flat", "outliers", "indefinite"])
def test_what_has_converged_beside_a_basis_is_within_three_standard_errors(name):
    matrix = matrix_of(SPECTRA[name])
    true, within, fewest = float(matrix.trace()), [], 1000
    for seed in range(100):
        counted = Counted(matrix)
        krylov = lanczos(
            counted, matrix[0], num_starts=2, num_steps=4, generator=seeded(seed), budget=counted.budget(None)
        )
        readings = deflated(counted, *krylov.union(), read_trace, seeded(seed + 1000))
        # So coarse a tolerance that the first reading may meet it.
        found = estimate_trace(readings, tolerance=0.1, budget=counted.budget(200))
        fewest = min(fewest, found.num_products)
        (estimate_of_trace,) = found.readings
        within.append(abs(estimate_of_trace.value - true) <= 3 * estimate_of_trace.standard_error + 1e-10)
    assert sum(within) >= 95
    assert fewest >= 12


@every_estimator
def test_it_ends_once_the_error_is_within_the_tolerance_and_not_before(estimator):
    matrix = matrix_of(SPECTRA["flat"])
    found = estimate(matrix, estimator=estimator, tolerance=0.004, products=1000)
    before = estimate(matrix, estimator=estimator, tolerance=0.004, products=found.num_products - 8)
    assert found.converged
    assert found.readings[0].standard_error <= 0.004 * found.readings[0].value
    assert before.num_products < found.num_products
    assert not before.converged


@every_estimator
def test_tighter_tolerance_takes_more_products_and_errs_less(estimator):
    matrix = matrix_of(SPECTRA["outliers"])
    coarse, fine = (
        estimate(matrix, estimator=estimator, tolerance=tolerance, products=5000) for tolerance in (0.1, 0.005)
    )
    assert fine.num_products > coarse.num_products
    assert fine.readings[0].standard_error < coarse.readings[0].standard_error


@every_estimator
def test_spent_products_end_it_unconverged(estimator):
    found = estimate(matrix_of(SPECTRA["indefinite"]), estimator=estimator, products=30)
    assert 30 <= found.num_products < 30 + 8
    assert not found.converged
    assert math.isfinite(found.readings[0].standard_error)


@every_estimator
def test_spent_seconds_end_it_after_the_first_reading(estimator):
    found = estimate(matrix_of(SPECTRA["indefinite"]), estimator=estimator, seconds=0)
    assert found.num_products in (8, 12)
    assert not found.converged


@every_estimator
def test_it_says_how_many_products_it_took(estimator):
    matrix = matrix_of(SPECTRA["indefinite"])
    counted = Counted(matrix)
    for _, number in itertools.islice(ESTIMATORS[estimator](counted, matrix[0], read_trace, seeded()), 10):
        assert number == counted.cost.products


@every_estimator
def test_same_seed_gives_the_same_bits_and_another_seed_others(estimator):
    matrix = matrix_of(SPECTRA["outliers"])
    first, again, other = (estimate(matrix, estimator=estimator, seed=seed, products=40) for seed in (7, 7, 8))
    assert first == again
    assert first.readings != other.readings


@every_estimator
def test_float32_products_are_summed_in_float64(estimator):
    """A large entry and many small ones: in float32 their sum would lose some."""
    matrix = torch.diag(torch.cat([torch.tensor([2.0**24]), torch.ones(39)]))
    found = estimate(matrix, estimator=estimator, read=lambda d: d.sum(0, keepdim=True, dtype=F64), products=16)
    assert found.readings[0].value == pytest.approx(2**24 + 39, abs=8)


@pytest.mark.parametrize("products", [40, 100])
@every_estimator
def test_trace_of_berts_hessian_is_within_three_standard_errors(bert_hessian, estimator, products):
    errors, reported = errors_of(bert_hessian, estimator, seeds=20, products=products)
    assert (errors.abs() <= 3 * reported).all()

"""Eigenvalues, moments and densities against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, Counted, matrix_of, seeded

from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.lanczos import density, lanczos, top_eigenpairs

SIZE = 60
SPECTRA = {
    "outliers": [30.0, 12, 7, 5, 4.5, *torch.linspace(-1, 1, SIZE - 5).tolist()],
    "indefinite": torch.randn(SIZE, generator=seeded(2), dtype=F64).tolist(),
    "negative": (-1 / torch.arange(1, SIZE + 1)).tolist(),
    "repeated": [5.0] * 3 + [2.0] * 2 + torch.linspace(0, 1, SIZE - 5).tolist(),
    "low rank": [4.0, 3.0] + [0.0] * (SIZE - 2),
}
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


def krylov_of(matrix, *, num_starts=4, num_steps=10, seed=0, products=None, dtype=F64):
    counted = Counted(matrix)
    return lanczos(
        counted,
        matrix[0].to(dtype),
        num_starts=num_starts,
        num_steps=num_steps,
        generator=seeded(seed),
        budget=counted.budget(products),
    )


def top_of(matrix, number, *, tolerance=0.0, start=None, products=None):
    counted = Counted(matrix)
    start_D = torch.randn(len(matrix), generator=seeded(), dtype=F64) if start is None else start
    return top_eigenpairs(
        counted, matrix[0], number, tolerance=tolerance, start_D=start_D, budget=counted.budget(products)
    )


def largest(matrix, number):
    return torch.linalg.eigvalsh(matrix).flip(0)[:number].tolist()


def assert_pairs(pairs, matrix, number, *, within=1e-6):
    """The values are the true ones, the vectors orthonormal, the residuals what they are said to be."""
    assert pairs.values == pytest.approx(largest(matrix, number), rel=within, abs=within)
    count = len(pairs.values)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(count, dtype=F64), rtol=0, atol=1e-8)
    values = torch.tensor(pairs.values, dtype=F64)
    residuals = (matrix @ pairs.vectors - pairs.vectors * values).norm(dim=0)
    assert pairs.residuals == pytest.approx(residuals.tolist(), abs=1e-9)
    assert max(pairs.residuals) < math.sqrt(within)


# Eigenpairs


@every_spectrum
def test_largest_eigenvalues_are_the_dense_ones(name):
    matrix = matrix_of(SPECTRA[name])
    assert_pairs(top_of(matrix, 5), matrix, 5)


@pytest.mark.parametrize("name", ["outliers", "indefinite", "negative"])
def test_ritz_pairs_of_one_long_chain_are_the_dense_ones(name):
    matrix = matrix_of(SPECTRA[name])
    assert_pairs(krylov_of(matrix, num_starts=1, num_steps=SIZE).top(5), matrix, 5)


def test_chains_together_see_repeated_eigenvalues():
    """Each chain sees one direction of an eigenspace; three starts see three."""
    matrix = matrix_of([5.0] * 3 + [2.0] * 2 + [0.0] * (SIZE - 5))
    assert_pairs(krylov_of(matrix, num_starts=3).top(5), matrix, 5)
    assert krylov_of(matrix, num_starts=1).top(3).values == pytest.approx([5, 2, 0], abs=1e-9)


def test_eigenvalues_of_berts_hessian_are_the_dense_ones(bert, bert_hessian):
    with twice_differentiable(bert.model, F64):
        surface = bert.surface()
        pairs = top_eigenpairs(
            surface.hessian_products,
            surface.space.position(),
            3,
            tolerance=0.0,
            start_D=surface.space.position(),
            budget=Counted(bert_hessian).budget(),
        )
    assert_pairs(pairs, bert_hessian, 3)


def test_eigenvalues_in_float32_are_as_exact_as_that():
    counted = Counted(matrix_of(SPECTRA["outliers"]))
    like_D, start_D = torch.zeros(SIZE), torch.randn(SIZE, generator=seeded())
    pairs = top_eigenpairs(counted, like_D, 3, tolerance=0.0, start_D=start_D, budget=counted.budget())
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values == pytest.approx([30, 12, 7], rel=1e-5)


def test_residual_bounds_the_distance_to_an_eigenvalue():
    matrix = matrix_of(SPECTRA["indefinite"])
    eigenvalues = torch.linalg.eigvalsh(matrix)
    for pairs in (krylov_of(matrix).top(5), top_of(matrix, 5, tolerance=0.2)):
        for value, residual in zip(pairs.values, pairs.residuals, strict=True):
            assert (eigenvalues - value).abs().min() <= residual + 1e-12


def test_coarser_tolerance_takes_fewer_products():
    matrix = matrix_of(SPECTRA["indefinite"])
    taken = []
    for tolerance in (0.0, 0.1):
        counted = Counted(matrix)
        start_D = torch.randn(SIZE, generator=seeded(), dtype=F64)
        top_eigenpairs(counted, matrix[0], 3, tolerance=tolerance, start_D=start_D, budget=counted.budget())
        taken.append(counted.cost.products)
    assert taken[1] < taken[0]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_small_matrices_too(size, number):
    """ARPACK does not take them."""
    matrix = matrix_of(torch.randn(size, generator=seeded(size), dtype=F64))
    assert_pairs(top_of(matrix, number), matrix, number)


@pytest.mark.parametrize("number", [28, 29, 30, 31, 59, 60])
def test_many_eigenvalues_too(number):
    matrix = matrix_of(SPECTRA["indefinite"])
    assert_pairs(top_of(matrix, number), matrix, number)


def test_identity_has_ones():
    matrix = torch.eye(SIZE, dtype=F64)
    assert_pairs(top_of(matrix, 3), matrix, 3)


def test_zero_matrix_has_zeros():
    pairs = top_of(torch.zeros(SIZE, SIZE, dtype=F64), 3)
    assert pairs.values == [0, 0, 0]


def test_start_without_curvature_is_no_obstacle():
    matrix = torch.diag(torch.tensor([3.0, 2.0, *[0.0] * (SIZE - 2)], dtype=F64))
    pairs = top_of(matrix, 2, start=torch.tensor([0.0, 0.0, *[1.0] * (SIZE - 2)], dtype=F64))
    assert pairs.values == pytest.approx([3, 2])


def test_ritz_values_lie_within_the_true_ones():
    matrix = matrix_of(SPECTRA["indefinite"])
    true = torch.linalg.eigvalsh(matrix)
    for num_steps in (1, 3, 10):
        krylov = krylov_of(matrix, num_steps=num_steps)
        smallest, highest = krylov.extremes()
        assert true[0] <= smallest <= highest <= true[-1]
        found = krylov.top(4).values
        assert all(value <= limit + 1e-12 for value, limit in zip(found, largest(matrix, 4), strict=True))


def test_ritz_values_rise_with_the_steps():
    matrix = matrix_of(SPECTRA["indefinite"])
    firsts = [krylov_of(matrix, num_steps=num_steps).top(1).values[0] for num_steps in (2, 5, 10, 20)]
    assert firsts == sorted(firsts)
    assert firsts[-1] - firsts[0] > 0.1


def test_chains_together_find_more_than_the_best_alone():
    krylov = krylov_of(matrix_of(SPECTRA["indefinite"]), num_steps=5)
    assert krylov.top(1).values[0] > krylov.extremes()[1]


def test_fewer_eigenvalues_come_where_the_spaces_have_fewer_dimensions():
    assert len(krylov_of(matrix_of(SPECTRA["indefinite"]), num_starts=2, num_steps=2).top(10).values) == 4


# Spaces that are whole before their time


def test_identity_is_exhausted_after_one_step():
    krylov = krylov_of(torch.eye(SIZE, dtype=F64))
    assert krylov.num_steps == 1
    assert [values for values, _ in krylov.nodes()] == [pytest.approx([1.0])] * 4


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_is_exhausted_with_one_step_for_the_rest(rank):
    matrix = matrix_of([float(i) for i in range(rank, 0, -1)] + [0.0] * (SIZE - rank))
    krylov = krylov_of(matrix, num_steps=20)
    assert krylov.num_steps == rank + 1
    assert_pairs(krylov.top(rank), matrix, rank)


def test_zero_matrix_has_a_spectrum_of_zeros():
    krylov = krylov_of(torch.zeros(SIZE, SIZE, dtype=F64))
    assert krylov.extremes() == (0, 0)
    assert krylov.moment(1).value == 0
    assert krylov.top(2).values == [0, 0]


def test_more_steps_than_dimensions_are_not_taken():
    matrix = matrix_of([3.0, 1.0, -2.0])
    krylov = krylov_of(matrix, num_steps=20)
    assert krylov.num_steps == 3
    assert krylov.nodes()[0][0] == pytest.approx([-2, 1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_eigenvalue_comes_up_twice(dtype):
    """Two outliers converge in a few steps; without all of the reorthogonalisation they, or rounding, come up again."""
    matrix = matrix_of([100.0, 50.0, *torch.rand(198, generator=seeded(1), dtype=F64).tolist()])
    (values, _), *_ = krylov_of(matrix, num_starts=1, num_steps=60, dtype=dtype).nodes()
    assert [value for value in values if value > 1.01] == pytest.approx([50, 100], rel=1e-4)


# Moments and density


@every_spectrum
def test_quadrature_is_exact_for_each_start(name):
    r"""Of S steps up to the power 2 S - 1: the sum is :math:`v^\top A^p v`, whose mean over all v is the moment."""
    matrix = matrix_of(SPECTRA[name])
    krylov = krylov_of(matrix, num_starts=2, num_steps=3)
    starts_DV = torch.randn(SIZE, 2, generator=seeded(), dtype=F64)
    starts_DV = starts_DV / starts_DV.norm(dim=0)
    for (values, weights), v_D in zip(krylov.nodes(), starts_DV.T, strict=True):
        for power in range(6):
            ours = sum(w * x**power for x, w in zip(values, weights, strict=True))
            assert ours == pytest.approx(
                float(v_D @ torch.linalg.matrix_power(matrix, power) @ v_D), rel=1e-9, abs=1e-9
            )


@every_spectrum
def test_weights_sum_to_one(name):
    for _, weights in krylov_of(matrix_of(SPECTRA[name])).nodes():
        assert sum(weights) == pytest.approx(1, rel=1e-12)
        assert min(weights) >= 0


@pytest.mark.parametrize("power", [1, 2, 3])
@every_spectrum
def test_moments_are_within_three_standard_errors(name, power):
    """From 40 starts the error itself is known within a tenth, so that three of it miss a moment in some 500."""
    spectrum = torch.tensor(SPECTRA[name], dtype=F64)
    krylov = krylov_of(matrix_of(spectrum), num_starts=40, num_steps=4)
    moment = krylov.moment(power)
    assert abs(moment.value - float((spectrum**power).mean())) <= 3 * moment.standard_error
    assert 0 < moment.standard_error < 3 * float((spectrum**power).std()) / math.sqrt(40)


def test_moments_of_berts_hessian_are_within_three_standard_errors(bert_hessian):
    krylov = krylov_of(bert_hessian, num_starts=40, num_steps=4)
    eigenvalues = torch.linalg.eigvalsh(bert_hessian)
    for power in (1, 2, 3):
        moment = krylov.moment(power)
        assert abs(moment.value - float((eigenvalues**power).mean())) <= 3 * moment.standard_error


def test_moments_error_falls_with_the_root_of_the_starts():
    matrix = matrix_of(SPECTRA["indefinite"])
    true = float(matrix.trace()) / SIZE

    def rms(num_starts):
        errors = [
            krylov_of(matrix, num_starts=num_starts, num_steps=1, seed=seed).moment(1).value - true
            for seed in range(60)
        ]
        return float(np.sqrt(np.mean(np.square(errors))))

    assert rms(4) / rms(64) == pytest.approx(4, rel=0.3)


def test_one_start_knows_no_error():
    assert math.isnan(krylov_of(matrix_of(SPECTRA["outliers"]), num_starts=1).moment(1).standard_error)


@every_spectrum
def test_density_integrates_to_one(name):
    grid, values = density(krylov_of(matrix_of(SPECTRA[name])).nodes())
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-3)
    assert min(values) >= 0


def test_density_places_outliers_by_their_share():
    """One eigenvalue of 60 at 30: a bump there of about 1/60, and nothing between it and the next at 12."""
    krylov = krylov_of(matrix_of(SPECTRA["outliers"]), num_starts=40, num_steps=15)
    grid, values = map(np.asarray, density(krylov.nodes(), num_points=4096))

    def share(low, high):
        inside = (grid >= low) & (grid <= high)
        return np.trapezoid(values[inside], grid[inside])

    assert grid[grid > 20][np.argmax(values[grid > 20])] == pytest.approx(30, abs=0.1)
    assert share(25, 35) == pytest.approx(1 / SIZE, rel=0.5)
    assert share(14, 25) < 1e-6
    assert share(-3, 2) == pytest.approx(1 - 5 / SIZE, rel=0.1)


def test_density_of_one_node_is_one_bump_as_wide_as_asked():
    grid, values = density([([2.0], [1.0])], num_points=1001, width=0.05)
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-3)
    assert max(values) == pytest.approx(1 / (0.05 * 2 * math.sqrt(2 * math.pi)), rel=1e-3)
    assert grid[int(np.argmax(values))] == pytest.approx(2, abs=0.01)


def test_density_of_zeros_is_finite():
    grid, values = density([([0.0], [1.0])])
    assert np.isfinite(values).all()
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-3)


# Budget


def test_spent_budget_ends_the_eigenvalues_without_a_result():
    matrix = matrix_of(SPECTRA["indefinite"])
    assert top_of(matrix, 3, products=0) is None
    assert top_of(matrix, 3, products=10) is None


def test_spent_budget_ends_the_chains_early():
    matrix = matrix_of(SPECTRA["indefinite"])
    assert krylov_of(matrix, products=0).num_steps == 1
    short = krylov_of(matrix, products=12)
    assert short.num_steps == 3
    assert len(short.top(5).values) == 5


def test_same_seed_gives_the_same_bits():
    matrix = matrix_of(SPECTRA["indefinite"])
    assert krylov_of(matrix, seed=3).nodes() == krylov_of(matrix, seed=3).nodes() != krylov_of(matrix, seed=4).nodes()

"""Rise of the loss in balls and under noise, on losses whose rise is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from problems import F64, matrix_of, seeded, transformer
from torch import nn

from safe_lab.sharpness.ball import average_sharpness, ball_sharpness
from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Surface

SIZE = 12
CONVEX = torch.linspace(0.1, 5, SIZE, dtype=F64)
INDEFINITE = torch.randn(SIZE, generator=seeded(2), dtype=F64) + 0.5
START = torch.randn(SIZE, generator=seeded(3), dtype=F64)
SLOPE = torch.randn(SIZE, generator=seeded(4), dtype=F64)


def surface_of(loss, start=START) -> Surface:
    """``loss(theta)`` of one vector of weights."""
    model = nn.Module()
    model.theta = nn.Parameter(start.clone())
    space = Space({"all": [model.theta]})
    return Surface(model, [{"x": torch.ones(2, 1)}], lambda model, batch: loss(model.theta), space)


def quadratic(hessian_DD, slope_D=SLOPE) -> Surface:
    def loss(theta):
        e_D = theta - START
        return slope_D @ e_D + e_D @ hessian_DD @ e_D / 2

    return surface_of(loss)


def largest_rise(hessian_DD, slope_D, radius):
    """The true maximum over the ball: e = (lambda - H)^-1 g with the lambda for which e is as long as the radius."""
    values_D, vectors_DD = torch.linalg.eigh(hessian_DD)
    along_D = vectors_DD.T @ slope_D
    low, high = float(values_D[-1]), float(values_D[-1] + slope_D.norm() / radius)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (along_D / (middle - values_D)).norm() > radius else (low, middle)
    e_D = along_D / (high - values_D)
    return float(along_D @ e_D + (values_D * e_D**2).sum() / 2)


def rescaled(factor):
    """BERT with LoRA whose factors are B c and A / c: the same function."""
    problem = transformer()
    with torch.no_grad():
        for name, parameter in problem.model.named_parameters():
            if "lora_A" in name:
                parameter.div_(factor)
            elif "lora_B" in name:
                parameter.mul_(factor)
    return problem


# The largest rise


def test_first_step_is_sams():
    r"""Along the gradient as far as the radius: :math:`\rho \|g\| + \rho^2 g^\top H g / (2 \|g\|^2)`."""
    H, radius = matrix_of(INDEFINITE), 0.1
    expected = radius * SLOPE.norm() + radius**2 / 2 * SLOPE @ H @ SLOPE / SLOPE.square().sum()
    assert ball_sharpness(quadratic(H), radius, num_steps=1) == pytest.approx(float(expected), rel=1e-12)


def test_first_step_of_the_adaptive_one_is_asams():
    r"""To :math:`\rho\, T^2 g / \|T g\|`."""
    H, radius = matrix_of(INDEFINITE), 0.1
    e_D = radius * START**2 * SLOPE / (START.abs() * SLOPE).norm()
    expected = SLOPE @ e_D + e_D @ H @ e_D / 2
    found = ball_sharpness(quadratic(H), radius, adaptive=True, num_steps=1)
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("radius", "num_steps"), [(0.05, 5), (0.5, 5), (3.0, 30)])
def test_rise_is_nearly_the_largest_of_a_convex_quadratic_and_never_more(radius, num_steps, seed):
    """Where the slope counts for little the steps are a power iteration, which takes some more."""
    H, slope_D = matrix_of(CONVEX, seed=seed), torch.randn(SIZE, generator=seeded(seed), dtype=F64)
    highest = largest_rise(H, slope_D, radius)
    found = ball_sharpness(quadratic(H, slope_D), radius, num_steps=num_steps)
    assert 0.95 * highest <= found <= highest * (1 + 1e-9)


@pytest.mark.parametrize("radius", [0.05, 0.5, 3.0])
def test_rise_is_never_more_than_the_largest_of_any_quadratic(radius):
    H = matrix_of(INDEFINITE)
    assert 0 < ball_sharpness(quadratic(H), radius) <= largest_rise(H, SLOPE, radius) * (1 + 1e-9)


def test_further_steps_never_lower_the_rise():
    rises = [ball_sharpness(quadratic(matrix_of(INDEFINITE)), 1.0, num_steps=n) for n in (1, 2, 3, 5, 10)]
    assert rises == sorted(rises)
    assert rises[-1] > rises[0]


@pytest.mark.parametrize("adaptive", [False, True])
def test_larger_ball_has_a_larger_rise(adaptive):
    rises = [ball_sharpness(quadratic(matrix_of(CONVEX)), r, adaptive=adaptive) for r in (0.01, 0.1, 0.5, 1.0, 3.0)]
    assert all(before < after for before, after in pairwise(rises))


def test_the_highest_of_the_places_counts_and_not_the_last():
    """From 0 up the sine to 2, past its crest, whence the slope leads back to -2."""
    wave = surface_of(lambda theta: theta.sin().sum(), start=torch.zeros(1, dtype=F64))
    assert ball_sharpness(wave, 2.0, num_steps=2) == pytest.approx(math.sin(2))


def test_loss_that_only_falls_has_no_rise():
    """Along a gradient that overshoots into a valley."""
    valley = surface_of(lambda theta: 1 - (theta**2).sum(), start=torch.full((2,), 1e-3, dtype=F64))
    assert ball_sharpness(valley, 1.0) == 0


def test_vanishing_gradient_has_no_rise():
    assert ball_sharpness(quadratic(matrix_of(CONVEX), torch.zeros(SIZE, dtype=F64)), 0.1) == 0


# The mean rise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", [CONVEX, INDEFINITE], ids=["convex", "indefinite"])
def test_mean_rise_of_a_quadratic_is_half_its_trace(spectrum, seed):
    H, deviation = matrix_of(spectrum), 0.3
    found = average_sharpness(quadratic(H), deviation, generator=seeded(seed), num_directions=100)
    assert abs(found.value - deviation**2 / 2 * float(H.trace())) <= 3 * found.standard_error


def test_standard_error_of_the_mean_rise_is_its_spread():
    r"""The variance of :math:`\sigma^2/2\, z^\top H z` is :math:`\sigma^4/2\, \|H\|_F^2`."""
    H, deviation = matrix_of(INDEFINITE), 0.3
    found = average_sharpness(quadratic(H), deviation, generator=seeded(), num_directions=2000)
    assert found.standard_error == pytest.approx(deviation**2 * float(H.norm()) / math.sqrt(2 * 2000), rel=0.1)


def test_adaptive_mean_rise_is_half_the_stretched_trace():
    H, deviation = matrix_of(CONVEX), 0.3
    expected = deviation**2 / 2 * float((START**2 * H.diag()).sum())
    found = average_sharpness(quadratic(H), deviation, generator=seeded(), adaptive=True, num_directions=100)
    assert abs(found.value - expected) <= 3 * found.standard_error < expected


def test_slope_cancels():
    H = matrix_of(CONVEX)
    flat, steep = (
        average_sharpness(quadratic(H, slope_D), 0.3, generator=seeded()) for slope_D in (0 * SLOPE, 1000 * SLOPE)
    )
    assert steep.value == pytest.approx(flat.value, rel=1e-9)
    assert steep.standard_error == pytest.approx(flat.standard_error, rel=1e-9)


def test_same_seed_gives_the_same_mean_rise():
    first, again, other = (average_sharpness(quadratic(matrix_of(CONVEX)), 0.3, generator=seeded(s)) for s in (5, 5, 6))
    assert first == again != other


def test_mean_rise_of_berts_loss_is_that_of_its_hessian(bert, bert_hessian):
    """With little noise; the error of 12 pairs stands beside it."""
    with twice_differentiable(bert.model, F64):
        found = average_sharpness(bert.surface(), 1e-3, generator=seeded(), num_directions=12)
    assert abs(found.value - 1e-6 / 2 * float(bert_hessian.trace())) <= 3 * found.standard_error


# What rescaling changes


def measured(problem, adaptive):
    with twice_differentiable(problem.model, F64):
        surface = problem.surface()
        return (
            surface.loss(),
            ball_sharpness(surface, 0.1, adaptive=adaptive),
            average_sharpness(surface, 0.1, adaptive=adaptive, generator=seeded(), num_directions=3).value,
        )


def test_adaptive_ones_do_not_change_when_lora_is_rescaled():
    assert measured(rescaled(1.0), adaptive=True) == pytest.approx(measured(rescaled(3.0), adaptive=True), rel=1e-8)


def test_plain_ones_change_when_lora_is_rescaled():
    (loss, *plain), (same_loss, *rescaled_ones) = (measured(rescaled(factor), adaptive=False) for factor in (1.0, 3.0))
    assert same_loss == pytest.approx(loss, rel=1e-12)
    for before, after in zip(plain, rescaled_ones, strict=True):
        assert after != pytest.approx(before, rel=0.1)


# Far out, and what is left behind


def cliff(theta):
    """Not a number where the weights are longer than 2."""
    return 1 - (4 - theta @ theta).sqrt()


@pytest.mark.parametrize("adaptive", [False, True])
def test_loss_that_is_not_a_number_far_out_is_an_infinite_rise(adaptive):
    surface = surface_of(cliff, start=torch.full((3,), 0.5, dtype=F64))
    assert ball_sharpness(surface, 100.0, adaptive=adaptive) == math.inf
    assert average_sharpness(surface, 100.0, adaptive=adaptive, generator=seeded()).value == math.inf
    assert math.isfinite(ball_sharpness(surface, 0.1, adaptive=adaptive))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_are_as_they_were_to_the_bit(adaptive, dtype):
    problem = transformer(dtype=dtype)
    before = [parameter.detach().clone() for parameter in problem.model.parameters()]
    with twice_differentiable(problem.model):
        ball_sharpness(problem.surface(), 0.1, adaptive=adaptive)
        average_sharpness(problem.surface(), 0.1, adaptive=adaptive, generator=seeded(), num_directions=2)
    assert all(map(torch.equal, problem.model.parameters(), before))


def test_cost_is_as_many_passes_as_asked():
    surface = quadratic(matrix_of(CONVEX))
    ball_sharpness(surface, 0.1, num_steps=3)
    average_sharpness(surface, 0.1, generator=seeded(), num_directions=4)
    assert (surface.cost.gradients, surface.cost.losses) == (3, 1 + 3 + 1 + 2 * 4)

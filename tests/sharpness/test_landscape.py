"""Slices, lines and planes against losses that are known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from safe_lab.run_folder import to_json
from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.landscape import (
    Slice1D,
    Slice2D,
    barrier,
    eigenvector_direction,
    filter_normalised,
    measure_line,
    measure_plane,
    measure_slice_1d,
    measure_slice_2d,
    random_direction,
)
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Surface

F64 = torch.float64


def vector(*numbers):
    return torch.tensor(numbers, dtype=F64)


class Weights(nn.Module):
    def __init__(self, *tensors, dtype=F64):
        super().__init__()
        self.tensors = nn.ParameterList(torch.as_tensor(tensor, dtype=dtype) for tensor in tensors)

    def space(self):
        return Space({"all": list(self.tensors)})


def surfaces_of(function, *tensors, samples=None):
    """The loss ``function`` of the weights as one vector, times a factor for each sample."""
    model = Weights(*tensors)
    space = model.space()

    def loss(model, batch):
        return batch["factor"].mean() * function(torch.cat([tensor.reshape(-1) for tensor in model.tensors]))

    return {
        sample: Surface(model, [{"factor": torch.full((2, 1), factor, dtype=F64)}], loss, space)
        for sample, factor in (samples or {"training": 1.0}).items()
    }


def bowl(w):
    return (w * w).sum() / 2


def double_well(w):
    return ((w[0] ** 2 - 1) ** 2) + (w[1:] ** 2).sum()


class SpentAfter:
    """A budget for so many points."""

    def __init__(self, points):
        self.left = points

    def is_spent(self):
        self.left -= 1
        return self.left < 0


# Directions


def test_each_filter_of_a_direction_is_as_long_as_that_of_the_weights():
    space = Weights([[3.0, 4.0], [0.0, 2.0]], [0.6, 0.8], 7.0).space()
    direction = filter_normalised(vector(1, 0, 1, 1, 2, 0, -0.5), space)
    assert torch.allclose(direction, vector(5, 0, 2**0.5, 2**0.5, 1, 0, -7))


def test_filter_of_a_convolution_is_all_of_one_output_channel():
    space = Weights(torch.ones(2, 1, 2, 2)).space()
    direction = filter_normalised(vector(1, 0, 0, 0, 3, 3, 3, 3), space)
    assert torch.allclose(direction, vector(2, 0, 0, 0, 1, 1, 1, 1))


def test_filter_of_zeros_stays_where_it_is():
    space = Weights([[0.0, 0.0], [3.0, 4.0]]).space()
    assert torch.equal(filter_normalised(vector(1, 2, 0, 0), space), vector(0, 0, 0, 0))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_normalised_direction_is_finite_whatever_comes_in(number):
    space = Weights([[1.0, 1.0], [number, 1.0]]).space()
    assert filter_normalised(vector(number, 1, 1, 1), space).isfinite().all()


def test_filters_whose_squares_vanish_in_float32_keep_their_length():
    space = Weights([[3e-30, 4e-30]], dtype=torch.float32).space()
    direction = filter_normalised(torch.tensor([1e-35, 0.0]), space)
    assert direction.dtype == torch.float32
    assert torch.allclose(direction * 1e30, torch.tensor([5.0, 0.0]))


def test_random_direction_is_as_long_as_the_weights():
    space = Weights(torch.randn(5, 7), torch.randn(5)).space()
    direction = random_direction(space, torch.Generator().manual_seed(0))
    assert direction.norm() == pytest.approx(space.position().norm())


def test_random_direction_draws_from_its_generator_alone():
    space = Weights(torch.randn(5, 7)).space()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = random_direction(space, torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, random_direction(space, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, random_direction(space, torch.Generator().manual_seed(4)))


def test_eigenvector_goes_as_far_as_a_random_direction_and_has_a_sign():
    space = Weights([3.0, 0.0, 4.0]).space()
    for sign in (1, -1):
        direction = eigenvector_direction(sign * vector(0.6, -0.8, 0), space)
        assert torch.allclose(direction, vector(-3, 4, 0))


def relu_net(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].weight *= scale
        model[0].bias *= scale
        model[2].weight /= scale
    return model


class LowRank(nn.Module):
    """x W + x A B, as LoRA has it."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.randn(3, 2, dtype=F64)
        self.a = nn.Parameter(torch.randn(2, 3, dtype=F64) / scale)
        self.b = nn.Parameter(torch.randn(2, 2, dtype=F64) * scale)

    def forward(self, x):
        return x @ self.base + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("build", [relu_net, LowRank])
def test_slice_along_a_normalised_direction_does_not_see_a_rescaling_of_layers(build):
    torch.manual_seed(1)
    batch = {"x": torch.randn(16, 3, dtype=F64), "labels": torch.randint(0, 2, (16,))}

    def losses(scale, direct):
        model = build(scale)
        space = Space({"all": list(model.parameters())})
        surface = Surface(
            model, [batch], lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["labels"]), space
        )
        direction = direct(space, torch.Generator().manual_seed(5))
        found = measure_slice_1d({"training": surface}, space.position(), direction, name="random")
        return found.losses["training"]

    def plain(space, generator):
        return torch.randn(space.num_dimensions, generator=generator, dtype=F64)

    assert losses(1.0, random_direction) == pytest.approx(losses(8.0, random_direction), rel=1e-9)
    assert losses(1.0, plain) != pytest.approx(losses(8.0, plain), rel=0.1)


# Slices


def test_slice_of_a_bowl_is_a_parabola():
    surfaces = surfaces_of(bowl, [1.0, 0.0])
    found = measure_slice_1d(surfaces, vector(1, 0), vector(2, 1), name="random", positions=[1, -1, 0, 0.5])
    assert found.positions == [-1, 0, 0.5, 1]
    assert found.losses["training"] == pytest.approx([(1 + 2 * t) ** 2 / 2 + t**2 / 2 for t in found.positions])
    assert found.length == pytest.approx(5**0.5)
    assert found.complete


def test_samples_are_measured_in_the_same_places():
    surfaces = surfaces_of(bowl, [1.0], samples={"training": 1.0, "validation": 3.0})
    found = measure_slice_1d(surfaces, vector(1), vector(1), name="random", positions=[0, 1])
    assert found.losses == {"training": pytest.approx([0.5, 2.0]), "validation": pytest.approx([1.5, 6.0])}


def test_measuring_leaves_the_weights_as_they_were():
    surfaces = surfaces_of(bowl, torch.randn(3, 4))
    space = surfaces["training"].space
    before = space.position()
    runs = {name: torch.randn(12, dtype=F64) for name in "abc"}
    measure_slice_2d(surfaces, runs["a"], (runs["b"], runs["c"]), name="random", x=[0, 1], y=[0, 1])
    measure_plane(surfaces, runs, num_points=3)
    assert torch.equal(space.position(), before)


def test_what_a_spent_budget_leaves_out_of_a_slice_lies_farthest_out():
    surfaces = surfaces_of(bowl, [0.0])
    found = measure_slice_1d(
        surfaces, vector(0), vector(1), name="random", positions=range(-3, 4), budget=SpentAfter(3)
    )
    assert found.losses["training"] == [None, None, 0.5, 0.0, 0.5, None, None]
    assert not found.complete


def test_budget_that_is_spent_before_leaves_a_slice_without_losses():
    surfaces = surfaces_of(bowl, [0.0, 0.0])
    spent = Budget(surfaces["training"].cost, seconds=0.0)
    one = measure_slice_1d(surfaces, vector(0, 0), vector(1, 0), name="random", positions=[0, 1], budget=spent)
    two = measure_slice_2d(
        surfaces, vector(0, 0), (vector(1, 0), vector(0, 1)), name="random", x=[0, 1], y=[0, 1], budget=spent
    )
    line = measure_line(surfaces, {"a": vector(0, 0), "b": vector(1, 0)}, budget=spent)
    assert one.losses == {"training": [None, None]}
    assert two.losses == {"training": [[None, None], [None, None]]}
    assert two.stride is None
    assert two.whole_grid("training") == ([], [], [])
    assert line.barriers == {"training": None}
    assert surfaces["training"].cost.losses == 0


def test_loss_that_is_not_finite_is_no_number_and_no_error():
    surfaces = surfaces_of(lambda w: w.log().sum(), [1.0])
    found = measure_slice_1d(surfaces, vector(1), vector(1), name="random", positions=[-2, -1, 0])
    assert [math.isnan(loss) for loss in found.losses["training"]] == [True, True, False]
    assert found.complete
    assert json.loads(to_json(asdict(found)))["losses"] == {"training": [None, None, 0.0]}


def test_plane_of_two_directions_has_a_row_for_each_y():
    surfaces = surfaces_of(lambda w: w[0] + 10 * w[1], [1.0, 0.0])
    found = measure_slice_2d(
        surfaces, vector(1, 0), (vector(1, 0), vector(0, 2)), name="random", x=[0, 1, 2], y=[-1, 0]
    )
    assert found.losses["training"] == [[-19, -18, -17], [1, 2, 3]]
    assert found.stride == 1
    assert found.whole_grid("training") == ([0, 1, 2], [-1, 0], found.losses["training"])


@pytest.mark.parametrize(("points", "stride"), [(8, None), (9, 4), (24, 4), (25, 2), (80, 2), (81, 1)])
def test_plane_is_measured_coarse_before_fine(points, stride):
    surfaces = surfaces_of(bowl, [0.0, 0.0])
    grid = range(-4, 5)
    found = measure_slice_2d(
        surfaces, vector(0, 0), (vector(1, 0), vector(0, 1)), name="random", x=grid, y=grid, budget=SpentAfter(points)
    )
    assert found.stride == stride
    assert sum(loss is not None for row in found.losses["training"] for loss in row) == points
    if stride:
        x, y, losses = found.whole_grid("training")
        assert x == y == list(range(-4, 5, stride))
        assert losses == [[(a * a + b * b) / 2 for a in x] for b in y]


# Between runs


def test_barrier_is_the_highest_rise_above_the_line_between_the_ends():
    assert barrier([0, 0.25, 0.5, 1], [1, 2.5, 2, 3]) == (1, 0.25)
    assert barrier([-1, 0, 0.5, 1, 2], [9, 1, 0.5, 1, 9]) == (0, 0)


def test_barrier_does_not_count_a_loss_that_just_rises_from_one_end_to_the_other():
    # The error barrier height of Frankle et al. is 1 here.
    assert barrier([0, 0.5, 1], [0, 1, 2]) == (0, 0)


def test_barrier_is_infinite_where_a_loss_between_the_ends_is_not_finite():
    assert barrier([0, 0.5, 1], [1, math.nan, 1]) == (math.inf, 0.5)
    assert barrier([0, 0.5, 1, 2], [1, 1, 1, math.nan]) == (0, 0)


@pytest.mark.parametrize("end", [None, math.nan, math.inf])
def test_there_is_no_barrier_without_both_ends(end):
    assert barrier([0, 0.5, 1], [1, 5, end]) is None
    assert barrier([0, 0.5, 1], [end, 5, 1]) is None


def test_line_between_two_wells_has_the_barrier_between_them():
    surfaces = surfaces_of(double_well, [0.0, 0.0], samples={"training": 1.0, "validation": 2.0})
    line = measure_line(surfaces, {"left": vector(-1, 0), "right": vector(1, 0)})
    assert line.barriers == {"training": pytest.approx(1.0), "validation": pytest.approx(2.0)}
    assert line.marks == {"left": 0.0, "right": 1.0}
    assert (line.name, line.length) == ("left → right", 2.0)
    assert line.losses["training"] == pytest.approx([((2 * t - 1) ** 2 - 1) ** 2 for t in line.positions])
    assert min(line.positions) == -0.25
    assert max(line.positions) == 1.25


def test_line_through_a_bowl_has_no_barrier():
    line = measure_line(surfaces_of(bowl, [0.0, 0.0]), {"a": vector(-1, 2), "b": vector(3, 1)})
    assert line.barriers == {"training": 0.0}


def test_ends_of_a_line_are_the_runs_to_the_bit():
    a, b = (torch.randn(6, dtype=F64) for _ in range(2))
    surfaces = surfaces_of(bowl, torch.zeros(6))
    line = measure_line(surfaces, {"a": a, "b": b}, positions=[0.3])
    assert line.positions == [0.0, 0.3, 1.0]
    assert line.losses["training"][0] == surfaces["training"].loss_at(a)
    assert line.losses["training"][2] == surfaces["training"].loss_at(b)


def test_spent_budget_leaves_the_ends_of_a_line_and_a_lower_bound_of_its_barrier():
    surfaces = surfaces_of(double_well, [0.0])
    runs = {"a": vector(-1), "b": vector(1)}
    for points, between in [(2, []), (5, [0.1, 0.5, 0.9]), (12, [i / 10 for i in range(1, 10)])]:
        line = measure_line(surfaces, runs, budget=SpentAfter(points))
        taken = [t for t, loss in zip(line.positions, line.losses["training"], strict=True) if loss is not None]
        assert taken[:1] + taken[-1:] == [0.0, 1.0]
        assert len(taken) == points
        assert set(between) <= set(taken)
        assert line.barriers["training"] == pytest.approx(1.0 if between else 0.0)


def test_plane_keeps_the_distances_between_runs():
    torch.manual_seed(0)
    runs = {name: torch.randn(5, dtype=F64) for name in "abc"}
    plane = measure_plane(surfaces_of(bowl, torch.zeros(5)), runs, num_points=5)
    for one in "abc":
        for other in "abc":
            distance = math.dist(plane.marks[one], plane.marks[other])
            assert distance == pytest.approx(float((runs[one] - runs[other]).norm()), abs=1e-12)
    assert plane.marks["a"] == [0.0, 0.0]
    assert plane.marks["b"][1] == 0.0
    assert plane.name == "a, b, c"


def test_plane_has_the_loss_of_the_weights_it_stands_for():
    # In the plane z = 1 of three dimensions, which c leaves at a right angle to the line from a to b.
    runs = {"a": vector(1, 0, 1), "b": vector(1, 2, 1), "c": vector(4, 1, 1)}
    plane = measure_plane(surfaces_of(bowl, [0.0, 0.0, 0.0]), runs, num_points=7, margin=0.5)
    assert plane.marks == {"a": [0, 0], "b": [2, 0], "c": [pytest.approx(1), pytest.approx(3)]}
    for y, row in zip(plane.y, plane.losses["training"], strict=True):
        assert row == pytest.approx([((1 + y) ** 2 + x**2 + 1) / 2 for x in plane.x])


def test_grid_of_a_plane_has_equal_spacing_and_a_margin():
    runs = {"a": vector(0, 0), "b": vector(10, 0), "c": vector(5, 3)}
    plane = measure_plane(surfaces_of(bowl, [0.0, 0.0]), runs, num_points=15, margin=0.2)
    assert len(plane.x) == 15
    assert len(plane.y) == 8
    steps = {round(b - a, 9) for axis in (plane.x, plane.y) for a, b in pairwise(axis)}
    assert steps == {1.0}
    assert (plane.x[0], plane.x[-1]) == pytest.approx((-2, 12))
    assert (plane.y[0], plane.y[-1]) == pytest.approx((-2, 5))


def test_plane_has_the_barriers_on_its_three_sides():
    surfaces = surfaces_of(double_well, [0.0, 0.0])
    plane = measure_plane(surfaces, {"a": vector(-1, 0), "b": vector(1, 0), "c": vector(-1, 1)}, num_points=3)
    assert [list(side.marks) for side in plane.sides] == [["a", "b"], ["a", "c"], ["b", "c"]]
    # On the third 16 p^2 - p with p = t (1 - t).
    assert [side.barriers["training"] for side in plane.sides] == pytest.approx([1.0, 0.0, 0.75])


@pytest.mark.parametrize(
    "c", [vector(2.5, 0, 0), vector(0, 0, 0), vector(0.2, 0, 1e-16)], ids=["beyond", "equal", "up to rounding"]
)
def test_runs_on_one_line_have_no_plane(c):
    runs = {"first": vector(0, 0, 0), "second": vector(1, 0, 0), "third": c}
    with pytest.raises(ValueError, match=r"^[^\n]*first[^\n]*third[^\n]*$"):
        measure_plane(surfaces_of(bowl, [0.0, 0.0, 0.0]), runs)


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (vector(1, 0), "a and b have the same weights"),
        (vector(1, 0, 0), "b has 3 weights where 2 are looked at"),
        (vector(math.nan, 0), "b has weights that are not finite"),
    ],
)
def test_runs_without_a_line_between_them_are_named(b, message):
    with pytest.raises(ValueError, match=message):
        measure_line(surfaces_of(bowl, [0.0, 0.0]), {"a": vector(1, 0), "b": b})


def test_line_needs_two_runs_and_plane_three():
    surfaces = surfaces_of(bowl, [0.0])
    with pytest.raises(ValueError, match="2 runs are needed"):
        measure_line(surfaces, {"a": vector(1)})
    with pytest.raises(ValueError, match="3 runs are needed"):
        measure_plane(surfaces, {"a": vector(1), "b": vector(2)})


# Data


def test_slices_come_back_from_json():
    surfaces = surfaces_of(bowl, [0.0, 0.0])
    plane = measure_plane(surfaces, {"a": vector(0, 0), "b": vector(1, 0), "c": vector(0, 1)}, num_points=4)
    assert Slice2D.from_json(json.loads(to_json(asdict(plane)))) == plane
    assert Slice1D.from_json(json.loads(to_json(asdict(plane.sides[0])))) == plane.sides[0]


def test_no_more_than_a_few_vectors_are_held():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            sizes = [entry.numel() for entry in tree_iter(out) if isinstance(entry, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return out

    size = 1000
    surfaces = surfaces_of(bowl, torch.zeros(20, 50))
    runs = {name: torch.randn(size, dtype=F64) for name in "abc"}
    with Watch():
        direction = random_direction(surfaces["training"].space, torch.Generator().manual_seed(0))
        measure_slice_1d(surfaces, runs["a"], direction, name="random")
        measure_plane(surfaces, runs, num_points=5)
    assert largest == size

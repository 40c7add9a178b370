"""What every measure promises, whatever it computes; and the budget, the plan and the gauge around them."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from parallel import in_processes
from problems import F64, dense_hessian, mlp, seeded, transformer
from tiny import tiny_batch
from torch.autograd.function import once_differentiable

from safe_lab.adapters import affine_layers
from safe_lab.sharpness import ESTIMATORS, MEASURES, measuring
from safe_lab.sharpness.ball import average_sharpness, ball_sharpness
from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.gauge import HEAD, TRAINING, Gauge, Sample
from safe_lab.sharpness.measuring import Plan, measure, summarize
from safe_lab.sharpness.sample import batch_by_tokens, draw_rows
from safe_lab.sharpness.surface import Cost
from safe_lab.sharpness.xtrace import deflated

every_measure = pytest.mark.parametrize("name", MEASURES)
# Coarse, so that it takes a moment.
QUICK = Plan(
    measures=(),
    num_eigenvalues=2,
    eigenvalue_tolerance=0.05,
    num_starts=2,
    num_steps=4,
    num_directions=2,
    tolerance=0.5,
)


def sample_of(batches, fingerprint="f"):
    return Sample(batches, sum(len(batch["labels"]) for batch in batches), fingerprint)


def gauge_of(problem, **changes) -> Gauge:
    samples = {TRAINING: sample_of(problem.batches), "validation": sample_of([tiny_batch(examples=2, seed=8)], "g")}
    arguments = {"kind": problem.kind, "layers": affine_layers(problem.model), "dtype": problem.space.dtype} | changes
    return Gauge(problem.model, problem.units, samples, problem.loss_function, **arguments)


def take(problem, *names, plan=QUICK, **changes):
    """Figures of these measures, without the seconds."""
    return timeless(gauge_of(problem, **changes).take({TRAINING: replace(plan, measures=names)}).figures)


def timeless(figures):
    return figures | {"cost": {key: value for key, value in figures["cost"].items() if "seconds" not in key}}


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for one in value for number in numbers_in(one)]
    return [value] if isinstance(value, float) else []


ALWAYS = {"loss", "gradient_norm", "left_out", "cost", "space", "seed", "processes", "examples", "fingerprint"}


def own(figures):
    """Those that are of the measures, without what is always told."""
    return {key: value for key, value in figures.items() if key not in ALWAYS}


# Every measure


def build_case(**changes):
    """Three examples at once."""
    return transformer(batches=[tiny_batch(examples=3)], **changes)


@pytest.fixture
def case():
    return build_case()


@pytest.fixture(scope="module")
def everything():
    """Figures of all measures at once."""
    return take(build_case(), *MEASURES)


@every_measure
def test_figures_are_there_and_finite(case, name):
    figures = own(take(case, name))
    assert figures
    assert numbers_in(figures)
    assert all(map(math.isfinite, numbers_in(figures)))


@every_measure
def test_same_state_gives_the_same_bits(case, name):
    assert take(case, name) == take(case, name)


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("eigenvalues", "trace")])
def test_figures_do_not_depend_on_what_else_is_measured(case, name, everything):
    alone = own(take(case, name))
    assert alone == {key: everything[key] for key in alone}


def test_eigenvalues_go_on_from_the_spectrum_and_end_at_the_same_tolerance(case, everything):
    alone = take(case, "eigenvalues")
    assert alone["top_eigenvalues"] == pytest.approx(everything["top_eigenvalues"], rel=2 * QUICK.eigenvalue_tolerance)
    for figures in (alone, everything):
        for value, residual in zip(figures["top_eigenvalues"], figures["eigenvalue_residuals"], strict=True):
            assert residual <= QUICK.eigenvalue_tolerance * value


@every_measure
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_model_is_as_it_was(name, dtype):
    problem = build_case(dtype=dtype)
    model = problem.model
    for parameter in problem.units[0].parameters.values():
        parameter.requires_grad_(False)
    for parameter in problem.units[1].parameters.values():
        parameter.grad = torch.ones_like(parameter)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = [(p.requires_grad, id(p.grad), p.dtype) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    streams = random.getstate(), str(np.random.get_state()), torch.get_rng_state()

    take(problem, name, dtype=F64 if dtype == F64 else torch.float32)

    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(p.requires_grad, id(p.grad), p.dtype) for p in model.parameters()] == before
    assert all((p.grad == 1).all() for p in problem.units[1].parameters.values())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (random.getstate(), str(np.random.get_state())) == streams[:2]
    assert torch.equal(torch.get_rng_state(), streams[2])


@every_measure
def test_frozen_unit_measures_as_a_live_one(case, name):
    live = take(case, name)
    for parameter in case.units[0].parameters.values():
        parameter.requires_grad_(False)
    assert take(case, name) == live


@every_measure
def test_processes_together_measure_what_one_does(name):
    problem = transformer(batches=[tiny_batch(examples=3), tiny_batch(examples=1, seed=5)])
    first, second = in_processes(lambda processes: take(problem, name, processes=processes))
    assert first == second
    together, alone = (numbers_in({**found, "processes": 0}) for found in (first, take(problem, name)))
    assert together == pytest.approx(alone, rel=1e-6, abs=1e-9)


# Against the dense Hessian

FINE = Plan(
    measures=("trace", "spectrum", "eigenvalues", "average", "gauss_newton"),
    tolerance=0.04,
    num_eigenvalues=3,
    eigenvalue_tolerance=0.0,
    num_starts=16,
    deviation=1e-3,
    num_directions=20,
)


def within_three_errors(estimate, true):
    assert abs(estimate["value"] - float(true)) <= 3 * estimate["standard_error"] + 1e-10 * abs(float(true))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_traces_of_bert_are_within_three_standard_errors_of_the_dense_ones(bert, bert_hessian, estimator):
    figures = take(bert, "trace", plan=replace(FINE, estimator=estimator, tolerance=0.0, budget_products=48))
    diagonal_D = bert_hessian.diag()
    within_three_errors(figures["trace"], diagonal_D.sum())
    within_three_errors(figures["adaptive_trace"], (bert.space.position() ** 2 * diagonal_D).sum())
    for group, lies in bert.space.groups.items():
        within_three_errors(figures["trace_by_unit"][group], diagonal_D[lies].sum())
    assert figures["trace"]["products"] == 48
    assert not figures["trace"]["converged"]


@pytest.fixture
def most_columns(request, monkeypatch):
    monkeypatch.setattr(measuring, "MOST_COLUMNS", request.param)


exact_or_estimated = pytest.mark.parametrize("most_columns", [0, 20], indirect=True, ids=["estimated", "exact"])


@pytest.mark.usefixtures("most_columns")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["trace", "gauss_newton_trace"])
@exact_or_estimated
def test_units_add_up_to_the_trace(bert, kind, estimator):
    figures = take(bert, kind.removesuffix("_trace"), plan=replace(FINE, estimator=estimator, budget_products=16))
    units = figures[f"{kind}_by_unit"]
    assert list(units) == [unit.name for unit in bert.units]
    assert sum(unit["value"] for unit in units.values()) == pytest.approx(figures[kind]["value"], rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_trace_goes_on_from_the_spectrum_with_fewer_products(bert, bert_hessian, seed):
    """To the error that the estimate from scratch comes to."""
    true = float(bert_hessian.trace())
    plan = replace(QUICK, tolerance=3 / abs(true), num_starts=4, num_steps=8, seed=seed)
    alone = take(bert, "trace", plan=plan)["trace"]
    together = take(bert, "spectrum", "trace", plan=plan)["trace"]
    for found in (alone, together):
        assert found["converged"] and abs(found["value"] - true) < 3 * found["standard_error"]
    assert together["products"] < alone["products"]


def test_the_traces_vectors_are_not_those_in_the_spectrums_basis(bert, monkeypatch):
    """The same stream would give Lanczos's starts once more, of which nothing but rounding lies beside the basis."""
    shares = []

    def look(products, basis_DM, *others):
        def looked_at(vectors_DK):
            shares.append(float((basis_DM.T @ vectors_DK).norm() / vectors_DK.norm()))
            return products(vectors_DK)

        return deflated(looked_at, basis_DM, *others)

    monkeypatch.setattr(measuring, "deflated", look)
    take(bert, "spectrum", "trace", plan=replace(QUICK, num_starts=4, num_steps=4))
    # 16 of 256 directions are in the basis, and of a random vector's length a quarter.
    assert shares and max(shares) < 0.5


def test_summary_tells_what_has_not_converged():
    flat = summarize({"trace": {"value": 1.0, "standard_error": 0.5, "converged": False}})
    assert flat == {"trace": 1.0, "trace_standard_error": 0.5, "trace_converged": False}


def test_gauss_newton_trace_is_exact_where_there_are_few_classes(small):
    G = small.products(torch.eye(small.space.num_dimensions, dtype=F64), gauss_newton=True)
    figures = figures_of_small(small, measures=("gauss_newton",)).figures
    assert figures["gauss_newton_trace"] == {
        "value": pytest.approx(float(G.trace()), rel=1e-12),
        "standard_error": 0,
        "products": 0,
        "converged": True,
    }
    assert figures["cost"]["products"] == 0


def figures_of_small(small, **changes):
    """Of a network so small that a hundred products make everything exact or sure."""
    with twice_differentiable(small.model, F64):
        surface = small.surface()
        return measure(surface, replace(FINE, **changes), budget=Budget(surface.cost, products=5000))


@pytest.mark.usefixtures("most_columns")
# XTrace comes to be exact with so few weights; Hutchinson goes on as the root of the products.
@pytest.mark.parametrize(("estimator", "tolerance"), [("xtrace", 1e-6), ("hutchinson", 0.05)])
@exact_or_estimated
def test_all_figures_of_a_small_network_are_those_of_the_dense_hessian(small, estimator, tolerance):
    H = dense_hessian(small)
    G = small.products(torch.eye(len(H), dtype=F64), gauss_newton=True)
    figures = figures_of_small(small, estimator=estimator, tolerance=tolerance).figures
    for name, matrix in (("trace", H), ("gauss_newton_trace", G)):
        within_three_errors(figures[name], matrix.trace())
        assert figures[name]["converged"]
        assert figures[name]["standard_error"] <= tolerance * abs(figures[name]["value"])
        within_three_errors(figures[f"adaptive_{name}"], (small.space.position() ** 2 * matrix.diag()).sum())
        for group, lies in small.space.groups.items():
            within_three_errors(figures[f"{name}_by_unit"][group], matrix.diag()[lies].sum())
    eigenvalues = torch.linalg.eigvalsh(H)
    assert figures["top_eigenvalues"] == pytest.approx(eigenvalues.flip(0)[:3].tolist(), rel=1e-6)
    assert figures["spectrum"]["largest"] <= float(eigenvalues[-1]) + 1e-12
    assert figures["spectrum"]["smallest"] >= float(eigenvalues[0]) - 1e-12
    for power, moment in figures["spectrum"]["moments"].items():
        within_three_errors(moment, (eigenvalues ** int(power)).mean())
    # Beyond the quadratic the loss adds a share of the order of the squared deviation.
    rise = figures["average"]["rise"]
    assert abs(rise["value"] - 1e-6 / 2 * float(H.trace())) <= 3 * rise["standard_error"] + 1e-9


def test_loss_and_gradient_are_always_told(small):
    figures = figures_of_small(small, measures=()).figures
    with twice_differentiable(small.model, F64):
        surface = small.surface()
        assert figures["loss"] == surface.loss()
        assert figures["gradient_norm"] == float(surface.gradient().norm())


def test_rises_are_those_of_the_plans_radii_and_deviations(small):
    plan = replace(FINE, measures=("ball", "average"), radius=0.1, adaptive_radius=0.2, adaptive_deviation=0.3, seed=4)
    with twice_differentiable(small.model, F64):
        surface = small.surface()
        figures = measure(surface, plan, budget=Budget(surface.cost)).figures
        assert figures["ball"] == {
            "radius": 0.1,
            "rise": ball_sharpness(surface, 0.1),
            "adaptive_radius": 0.2,
            "adaptive_rise": ball_sharpness(surface, 0.2, adaptive=True),
        }
        for name, adaptive, deviation in (("rise", False, 1e-3), ("adaptive_rise", True, 0.3)):
            expected = average_sharpness(
                surface, deviation, adaptive=adaptive, generator=seeded(4), num_directions=plan.num_directions
            )
            assert figures["average"][name] == asdict(expected)


def test_eigenpairs_are_handed_out_with_their_vectors(small):
    measured = figures_of_small(small, measures=("eigenvalues",))
    vectors_Dk = measured.eigenpairs.vectors
    H = dense_hessian(small)
    values = torch.tensor(measured.figures["top_eigenvalues"], dtype=F64)
    torch.testing.assert_close(H @ vectors_Dk, vectors_Dk * values, rtol=0, atol=1e-6)
    assert figures_of_small(small, measures=("trace",)).eigenpairs is None


def test_eigenvalues_that_the_spectrum_has_found_cost_nothing_more(small):
    costs = [
        figures_of_small(small, measures=measures, num_starts=1, num_steps=40, eigenvalue_tolerance=1e-6).figures[
            "cost"
        ]["products"]
        for measures in (("spectrum",), ("spectrum", "eigenvalues"))
    ]
    assert costs[0] == costs[1]


def test_more_eigenvalues_than_dimensions_are_not_asked_for(small):
    figures = figures_of_small(small, measures=("eigenvalues",), num_eigenvalues=100).figures
    assert figures["top_eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(dense_hessian(small)).flip(0).tolist())


def test_loss_without_curvature_measures_zero():
    """As where every example is sure, to the last bit: a run must not end with an error then."""
    problem = mlp()
    problem.loss_function = lambda model, batch: 0 * model(batch["x"]).square().sum() + 1
    figures = figures_of_small(problem, measures=("trace", "spectrum", "eigenvalues"), num_starts=2).figures
    assert figures["trace"]["value"] == 0
    assert figures["top_eigenvalues"] == pytest.approx([0] * 3)


def test_loss_that_is_nan_is_an_error(bert):
    with torch.no_grad():
        next(iter(bert.units[0].parameters.values())).fill_(math.nan)
    with pytest.raises(FloatingPointError):
        take(bert, "trace")


# Budget


def test_what_the_budget_does_not_reach_is_left_out_by_name(bert):
    figures = take(bert, *MEASURES, plan=replace(QUICK, budget_products=1))
    assert figures["left_out"] == ["trace"]
    assert [len(nodes) for nodes in figures["spectrum"]["nodes"]] == [1, 1]
    # Read off the spectrum's vectors, as far as those go.
    assert len(figures["top_eigenvalues"]) == 2 and max(figures["eigenvalue_residuals"]) > 0
    # One step is exact for the first power alone; and what takes no products is taken all the same.
    assert list(figures["spectrum"]["moments"]) == ["1"]
    assert not figures["eigenvalues_converged"]
    assert "trace" not in figures and figures["gauss_newton_trace"]["converged"]


def test_trace_ends_with_the_error_it_has_reached(bert):
    found = take(bert, "trace", plan=replace(QUICK, tolerance=1e-9, budget_products=13))["trace"]
    assert not found["converged"]
    assert 13 <= found["products"] <= 20
    assert found["standard_error"] > 0


def test_no_time_leaves_everything_out(bert):
    figures = take(bert, *MEASURES, plan=replace(QUICK, budget_seconds=0))
    assert figures["left_out"] == list(MEASURES)
    assert math.isfinite(figures["loss"])


def test_enough_budget_leaves_nothing_out(everything):
    assert everything["left_out"] == []
    assert own(everything)


def test_budget_is_spent_amid_the_eigenvalues_without_an_error(bert):
    figures = take(bert, "eigenvalues", plan=replace(QUICK, budget_products=5))
    assert figures["top_eigenvalues"] == figures["eigenvalue_residuals"] == []
    spectrum_too = take(bert, "spectrum", "eigenvalues", plan=replace(QUICK, budget_products=9))
    assert len(spectrum_too["top_eigenvalues"]) == 2


def test_products_before_the_budget_do_not_count():
    cost = Cost(products=7)
    budget = Budget(cost, products=3)
    cost.products = 9
    assert not budget.is_spent()
    assert not budget.was_spent
    cost.products = 10
    assert budget.is_spent()
    assert budget.was_spent


def test_budget_without_limits_is_never_spent():
    cost = Cost()
    budget = Budget(cost)
    cost.products = 10**9
    assert not budget.is_spent()


def test_seconds_count_from_when_it_is_made():
    budget = Budget(Cost(), seconds=0.02)
    assert not budget.is_spent()
    time.sleep(0.03)
    assert budget.is_spent()
    assert budget.seconds >= 0.03


def test_processes_stop_together():
    """The one whose time is up tells the other."""

    def ask(processes):
        return Budget(Cost(), seconds=0 if processes.rank else 1000, processes=processes).is_spent()

    assert in_processes(ask) == [True, True]


def test_each_sample_has_a_budget_of_its_own(bert):
    plan = replace(QUICK, measures=("trace",), budget_products=1)
    figures = gauge_of(bert).take({TRAINING: plan, "validation": plan}).figures
    assert figures["left_out"] == figures["validation"]["left_out"] == []


# Gauge


def test_space_is_told(bert):
    figures = take(bert)
    assert figures["space"] == {
        "dimensions": bert.space.num_dimensions,
        "units": [unit.name for unit in bert.units],
        "head": False,
        "dtype": "float64",
    }
    assert (figures["seed"], figures["processes"]) == (0, 1)


def test_only_some_units_make_up_the_space(bert, bert_hessian):
    name = bert.units[1].name
    figures = take(bert, "trace", "effective_weights", "norms", only=[name], plan=replace(FINE, budget_products=40))
    lies = bert.space.groups[name]
    assert figures["space"]["units"] == list(figures["norms"]) == list(figures["trace_by_unit"]) == [name]
    assert figures["space"]["dimensions"] == lies.stop - lies.start
    within_three_errors(figures["trace"], bert_hessian.diag()[lies].sum())
    assert all(name in layer for layer in figures["effective_weight_trace_by_layer"])


def test_unknown_unit_is_refused(bert):
    with pytest.raises(
        ValueError, match=r"sharpness\.units: there is no unit 'layer\.9'; there are .*layer\.0.*layer\.1"
    ):
        gauge_of(bert, only=["layer.9"])


def test_no_units_are_refused_before_anything_is_measured(bert):
    with pytest.raises(ValueError, match="no weights"):
        gauge_of(bert, only=[])


def test_head_can_be_part_of_the_space(bert):
    head = list(bert.model.base_model.model.classifier.parameters())
    figures = take(bert, "trace", head=head)
    assert list(figures["trace_by_unit"])[-1] == HEAD
    assert figures["space"]["head"]
    assert figures["space"]["dimensions"] == bert.space.num_dimensions + sum(p.numel() for p in head)


def test_validation_sample_stands_below_its_name(bert):
    gauge = gauge_of(bert)
    plan = replace(QUICK, measures=("effective_weights",))
    both = gauge.take({TRAINING: plan, "validation": plan}).figures
    alone = take(transformer(batches=[tiny_batch(examples=2, seed=8)]), "effective_weights")
    assert both["examples"] == 7
    assert (both["validation"]["examples"], both["validation"]["fingerprint"]) == (2, "g")
    assert both["validation"]["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert both["validation"]["loss"] != both["loss"]
    assert both["validation"]["effective_weight_trace"] == pytest.approx(alone["effective_weight_trace"], rel=1e-9)


def test_effective_weights_add_up_over_the_layers(bert):
    figures = take(bert, "effective_weights")
    by_layer = figures["effective_weight_trace_by_layer"]
    assert list(by_layer) == list(affine_layers(bert.model))
    assert figures["effective_weight_trace"] == pytest.approx(sum(by_layer.values()), rel=1e-12)


def test_without_affine_layers_there_is_no_trace_by_effective_weights(bert):
    assert take(bert, "effective_weights", layers={})["effective_weight_trace"] is None


def test_eigenvectors_come_for_each_sample(bert):
    plan = replace(QUICK, measures=("eigenvalues",))
    reading = gauge_of(bert).take({TRAINING: plan, "validation": replace(plan, measures=())})
    assert set(reading.eigenpairs) == {TRAINING}
    assert reading.eigenpairs[TRAINING].vectors.shape == (bert.space.num_dimensions, 2)


def test_model_is_whole_while_it_is_measured(bert):
    """Folded adapters have no weights by which to differentiate."""
    inside = []

    class Whole:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.append(False)

    gauge = gauge_of(bert, whole=Whole)
    gauge.check(MEASURES)
    gauge.take({TRAINING: QUICK})
    assert inside == [True, False, True, False]


def test_check_passes_what_can_be_measured_and_names_what_cannot(bert):
    gauge = gauge_of(bert)
    gauge.check(MEASURES)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            context.save_for_backward(loss)
            return loss**2

        @staticmethod
        @once_differentiable
        def backward(context, gradient):
            return 2 * gradient * context.saved_tensors[0]

    once = gauge_of(
        replace(bert, loss_function=lambda model, batch: Once.apply(bert.loss_function(model, batch)).exp())
    )
    once.check(["norms", "ball", "average"])
    for name in ("trace", "spectrum", "eigenvalues"):
        with pytest.raises(ValueError, match="once_differentiable"):
            once.check([name])


# Flat numbers


def test_summary_has_the_single_numbers(everything):
    flat = summarize(everything)
    assert set(flat) == {
        *("loss", "gradient_norm", "effective_weight_trace", "top_eigenvalue", "smallest_eigenvalue"),
        *("ball_rise", "ball_adaptive_rise"),
        *(
            f"{name}{end}"
            for name in (
                *("trace", "adaptive_trace", "gauss_newton_trace", "adaptive_gauss_newton_trace"),
                *("average_rise", "average_adaptive_rise"),
            )
            for end in ("", "_standard_error")
        ),
    }
    assert all(type(value) is float for value in flat.values())


def test_summary_of_little_is_little():
    assert summarize({"loss": 1.0, "top_eigenvalues": [], "effective_weight_trace": None}) == {"loss": 1.0}


def test_summary_carries_the_prefix():
    found = summarize(
        {"loss": 1.0, "ball": {"rise": 2.0, "radius": 3.0}, "spectrum": {"smallest": -1.0}}, "validation_"
    )
    assert found == {"validation_loss": 1.0, "validation_ball_rise": 2.0, "validation_smallest_eigenvalue": -1.0}


# Sample


class Rows(list):
    """As much of a data set as is asked for."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def select(self, indices):
        return Rows(self[i] for i in indices)


def rows(lengths):
    return Rows({"length": length, "id": i} for i, length in enumerate(lengths))


def test_rows_are_the_same_for_the_same_seed_and_the_longest_first():
    dataset = rows([3, 9, 4, 9, 1, 7, 2, 8])
    drawn = draw_rows(dataset, 5, seed=0)
    assert drawn == draw_rows(dataset, 5, seed=0)
    assert len({row["id"] for row in drawn}) == 5
    assert drawn["length"] == sorted(drawn["length"], reverse=True)
    assert any(draw_rows(dataset, 5, seed=seed) != drawn for seed in range(1, 4))


def test_more_rows_than_there_are_are_all_of_them():
    assert {row["id"] for row in draw_rows(rows([1, 2, 3]), 10, seed=0)} == {0, 1, 2}


def test_batches_hold_as_many_tokens_as_allowed_and_one_row_at_least():
    batches = list(batch_by_tokens(rows([20, 5, 5, 4, 2, 2]), partial(map, lambda row: row["id"]), max_tokens=10))
    assert list(map(list, batches)) == [[0], [1, 2], [3, 4], [5]]


def test_no_batch_exceeds_the_tokens():
    lengths = sorted(torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist(), reverse=True)
    batches = list(batch_by_tokens(rows(lengths), list, max_tokens=64))
    assert sum(map(len, batches)) == 50
    assert all(len(batch) * max(row["length"] for row in batch) <= 64 for batch in batches)


# The package's face


def test_public_names_are_what_they_say():
    import safe_lab.sharpness as sharpness

    for _ in range(2):
        assert all(getattr(sharpness, name) is not None for name in sharpness.__all__)
        assert callable(sharpness.measure)
        assert callable(sharpness.summarize)


def test_unknown_public_name_is_an_attribute_error():
    import safe_lab.sharpness as sharpness

    with pytest.raises(AttributeError, match="no attribute 'sharpnes'"):
        _ = sharpness.sharpnes

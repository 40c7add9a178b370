"""Loss, gradient and curvature products against dense matrices that were computed another way; and what is left behind."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from parallel import in_processes
from problems import F64, Problem, dense_hessian, seeded, transformer
from tiny import tiny_batch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from safe_lab.adapters import base_weights
from safe_lab.model import loss_function
from safe_lab.sharding import shard
from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.output_curvature import OUTPUT_CURVATURES, cross_entropy_product
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Cost, Surface


def identity(problem):
    return torch.eye(problem.space.num_dimensions, dtype=F64)


def vectors(problem, number=3, seed=3):
    return torch.randn(problem.space.num_dimensions, number, generator=seeded(seed), dtype=F64)


def one_weight(function, *, num_weights=2, **changes) -> Surface:
    """A loss of one vector of weights, 1, 2, ..., over two examples."""
    model = nn.Module()
    model.theta = nn.Parameter(torch.arange(1.0, num_weights + 1))
    return Surface(
        model,
        [{"x": torch.ones(2, 1)}],
        lambda model, batch: function(model.theta),
        Space({"all": [model.theta]}),
        **changes,
    )


# What is computed


def test_hessian_of_a_small_network_is_torchs_own(small):
    torch.testing.assert_close(small.products(identity(small)), dense_hessian(small), rtol=1e-10, atol=1e-12)


def test_hessian_of_bert_is_torchs_own(bert, bert_hessian):
    products = bert.products(vectors(bert))
    torch.testing.assert_close(products, bert_hessian @ vectors(bert), rtol=1e-10, atol=1e-11)


def test_gradient_and_loss_are_those_of_all_examples_at_once(small):
    together = {name: torch.cat([batch[name] for batch in small.batches]) for name in small.batches[0]}
    loss = small.loss_function(small.model, together)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, small.space.parameters)])
    surface = small.surface()
    assert surface.loss() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(surface.gradient(), expected)


def test_worked_values():
    """L = a^2 b at a = 1, b = 2: gradient (4, 1), Hessian ((4, 2), (2, 0))."""
    surface = one_weight(lambda theta: theta[0] ** 2 * theta[1])
    assert surface.loss() == 2
    assert surface.gradient().tolist() == [4, 1]
    assert surface.hessian_products(torch.eye(2)).tolist() == [[4, 2], [2, 0]]
    assert surface.loss_at(torch.tensor([3.0, 4.0])) == 36
    assert surface.loss() == 2


def test_gauss_newton_is_jacobian_curvature_jacobian(small):
    names = list(dict(small.model.named_parameters()))

    def outputs(parameters, x):
        return functional_call(small.model, dict(zip(names, parameters, strict=True)), (x[None],))[0]

    total, number = 0, 0
    for batch in small.batches:
        rows = vmap(jacrev(outputs), (None, 0))(tuple(small.space.parameters), batch["x"])
        J_nCD = torch.cat([row.flatten(2) for row in rows], 2)
        p_nC = small.model(batch["x"]).softmax(-1)
        if small.kind == "classification":
            H_nCC = torch.diag_embed(p_nC) - p_nC[:, :, None] * p_nC[:, None, :]
        else:
            H_nCC = 2 * torch.eye(3, dtype=F64).expand(len(p_nC), 3, 3)
        total, number = total + (J_nCD.mT @ H_nCC @ J_nCD).sum(0), number + len(J_nCD)
    G = small.products(identity(small), gauss_newton=True)
    torch.testing.assert_close(G, (total / number).detach())


def test_hessian_and_gauss_newton_differ_where_the_model_curves(small):
    G, H = small.products(identity(small), gauss_newton=True), dense_hessian(small)
    assert (G - H).norm() > 0.1 * H.norm()


def test_gauss_newton_is_the_hessian_of_a_linear_model(small):
    """Of the last layer's weights, in which the outputs are linear."""
    last = Problem(small.model, small.units[1:], small.batches, small.loss_function, small.kind, small.outputs)
    torch.testing.assert_close(last.products(identity(last), gauss_newton=True), dense_hessian(last))


@pytest.mark.parametrize("matrix", ["HessianLinearOperator", "GGNLinearOperator"])
def test_matrices_are_those_of_curvlinops(small, matrix):
    curvlinops = pytest.importorskip("curvlinops")
    # Its mean over a batch is over all numbers, and ours over the examples.
    loss = nn.CrossEntropyLoss() if small.kind == "classification" else nn.MSELoss()
    scale = 1 if small.kind == "classification" else 3
    data = [(batch["x"], batch["y"]) for batch in small.batches]
    theirs = getattr(curvlinops, matrix)(small.model, loss, list(small.model.parameters()), data) @ identity(small)
    ours = small.products(identity(small), gauss_newton=matrix.startswith("GGN"))
    torch.testing.assert_close(ours, scale * theirs.detach())


def test_curvature_of_cross_entropy_is_torchs_own():
    outputs_C, direction_C = torch.randn(2, 4, dtype=F64, generator=seeded())
    H_CC = torch.autograd.functional.hessian(lambda f: nn.functional.cross_entropy(f, torch.tensor(1)), outputs_C)
    product_1C = cross_entropy_product(outputs_C[None], direction_C[None])
    torch.testing.assert_close(product_1C[0], H_CC @ direction_C)


@pytest.mark.parametrize("kind", OUTPUT_CURVATURES)
def test_roots_are_those_of_the_losss_curvature(kind):
    curvature = OUTPUT_CURVATURES[kind]
    outputs_nC = torch.randn(5, 4, generator=seeded(), dtype=F64)
    S_nCK = curvature.roots(outputs_nC).permute(1, 2, 0)
    columns = [curvature.product(outputs_nC, torch.eye(4, dtype=F64)[c].expand(5, 4)) for c in range(4)]
    torch.testing.assert_close(S_nCK @ S_nCK.mT, torch.stack(columns, 2))


def test_gauss_newton_diagonal_is_that_of_the_products(small):
    surface = small.surface()
    diagonal = surface.gauss_newton_diagonal()
    assert surface.cost == Cost(gradients=3)
    torch.testing.assert_close(diagonal, small.products(identity(small), gauss_newton=True).diagonal())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_has_finite_and_symmetric_products(family, attention):
    if (family, attention) == ("deberta-v2", "sdpa"):
        pytest.skip("transformers has none for it")
    problem = transformer(family, attn_implementation=attention, initializer_range=0.1)
    v_D2 = vectors(problem, 2)
    (_, one_way), (other_way, _) = (v_D2.T @ problem.products(v_D2)).tolist()
    assert math.isfinite(one_way)
    assert abs(one_way) > 0.01
    # Some families normalise in float32 whatever the weights are.
    assert one_way == pytest.approx(other_way, rel=1e-6)


def test_both_ways_of_attention_have_the_same_products():
    sdpa, eager = (transformer(attn_implementation=name) for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa.products(vectors(sdpa)), eager.products(vectors(sdpa)))


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_uneven_batches_are_one_large_batch(gauss_newton):
    batch = tiny_batch(examples=5)
    halves = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 4), slice(4, 5))]
    large, uneven = transformer(batches=[batch]), transformer(batches=halves)
    ours = uneven.products(vectors(uneven), gauss_newton=gauss_newton)
    torch.testing.assert_close(ours, large.products(vectors(large), gauss_newton=gauss_newton), rtol=1e-9, atol=1e-11)


def test_frozen_weights_are_in_the_space(bert, bert_hessian):
    for unit in bert.units[:1]:
        for parameter in unit.parameters.values():
            parameter.requires_grad_(False)
    torch.testing.assert_close(bert.products(vectors(bert)), bert_hessian @ vectors(bert), rtol=1e-10, atol=1e-11)


def test_only_the_spaces_weights_are_differentiated(bert):
    """A head that trains costs nothing where it is not looked at; it trains as before."""
    seen = []
    before = [parameter.requires_grad for parameter in bert.model.parameters()]

    def loss(model, batch):
        seen.append({id(parameter) for parameter in model.parameters() if parameter.requires_grad})
        return loss_function(model, batch)

    Surface(bert.model, bert.batches, loss, bert.space).gradient()
    assert seen == [set(map(id, bert.space.parameters))] * len(bert.batches)
    assert [parameter.requires_grad for parameter in bert.model.parameters()] == before


def test_weights_in_which_the_loss_is_linear_have_no_curvature():
    assert one_weight(lambda theta: theta.sum()).hessian_products(torch.eye(2)).tolist() == [[0, 0], [0, 0]]
    half = one_weight(lambda theta: theta[0] + theta[1] ** 2)
    assert half.hessian_products(torch.eye(2)).tolist() == [[0, 0], [0, 2]]


def test_weights_that_the_loss_does_not_see_have_none_either():
    model = nn.ParameterList([torch.tensor(3.0), torch.tensor(4.0)])
    surface = Surface(model, [{"x": torch.ones(1)}], lambda m, b: m[1] ** 2, Space({"all": list(model)}))
    assert surface.gradient().tolist() == [0, 8]
    assert surface.hessian_products(torch.eye(2)).tolist() == [[0, 0], [0, 2]]


def test_cost_counts_passes_over_all_examples():
    surface = one_weight(lambda theta: theta.square().sum())
    surface.loss()
    surface.loss_at(torch.zeros(2))
    surface.gradient()
    surface.hessian_products(torch.ones(2, 3))
    assert surface.cost == Cost(products=3, gradients=1, losses=2)


# Precision


def test_float64_can_be_had_of_a_float32_model():
    single, double = transformer(dtype=torch.float32), transformer()
    with twice_differentiable(single.model, F64):
        products = single.surface().hessian_products(vectors(single))
    torch.testing.assert_close(products, double.products(vectors(double)), rtol=1e-12, atol=1e-12)


def test_bfloat16_weights_are_computed_on_in_float32():
    narrow = transformer(dtype=torch.bfloat16)
    copy = transformer(dtype=torch.bfloat16)
    copy.model.to(F64)
    with twice_differentiable(narrow.model):
        products = narrow.surface().hessian_products(vectors(narrow))
    expected = copy.products(vectors(copy))
    assert products.dtype == torch.float32
    assert (products - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_autocast_does_not_lower_the_precision(accelerator):
    plain, wrapped = transformer(dtype=torch.float32), transformer(dtype=torch.float32)
    accelerator.prepare_model(wrapped.model)
    with torch.no_grad():
        coarse, fine = (problem.model.eval()(**plain.batches[0]).loss.item() for problem in (wrapped, plain))
    assert coarse != pytest.approx(fine, rel=1e-5)
    expected = plain.products(vectors(plain))
    assert (wrapped.products(vectors(plain)) - expected).norm() < 1e-5 * expected.norm()


def test_accelerates_autocast_is_back_afterwards(accelerator):
    problem = transformer(dtype=torch.float32)
    forward = accelerator.prepare_model(problem.model).forward
    with twice_differentiable(problem.model):
        assert problem.model.forward is not forward
    assert problem.model.forward is forward


def test_an_outer_autocast_does_not_lower_the_precision():
    problem = transformer(dtype=torch.float32)
    expected = problem.products(vectors(problem))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.products(vectors(problem)), expected)
        assert torch.is_autocast_enabled("cpu")


# What is left behind


def bits(tensor):
    return tensor.dtype, tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


ASPECTS = {
    "weights": lambda model: [bits(p) for p in model.parameters()],
    "buffers": lambda model: [bits(b) for b in model.buffers()],
    "where they lie": lambda model: [t.data_ptr() for t in (*model.parameters(), *model.buffers())],
    "grad": lambda model: [(id(p.grad), None if p.grad is None else bits(p.grad)) for p in model.parameters()],
    "requires_grad": lambda model: [p.requires_grad for p in model.parameters()],
    "train mode": lambda model: [module.training for module in model.modules()],
    "attention": lambda model: [
        module.config._attn_implementation for module in model.modules() if hasattr(module, "config")
    ],
    "hooks": lambda model: [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ],
    "attributes": lambda model: [sorted(vars(module)) for module in model.modules()],
    "Python's stream": lambda model: random.getstate(),
    "NumPy's stream": lambda model: str(np.random.get_state()),
    "torch's stream": lambda model: bits(torch.get_rng_state()),
    "autocast": lambda model: (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
    "kernels": lambda model: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
}


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_nothing_is_disturbed(aspect, raises):
    # bfloat16 is widened, and this attention exchanged.
    problem = transformer(dtype=torch.bfloat16)
    model = problem.model
    model.config._attn_implementation = "flash_attention_2"
    for p in problem.units[0].parameters.values():
        p.requires_grad_(False)
    for p in problem.units[1].parameters.values():
        p.grad = torch.ones_like(p)
    model.base_model.model.classifier.eval()
    look = ASPECTS[aspect]

    def loss(model, batch):
        random.random(), np.random.rand(), torch.rand(1)
        if raises and surface.cost.products:
            raise KeyboardInterrupt
        return loss_function(model, batch)

    before = look(model)
    try:
        with twice_differentiable(model):
            surface = Surface(model, problem.batches, loss, problem.space)
            surface.loss_at(surface.space.position() + 1)
            surface.gradient()
            surface.hessian_products(surface.space.position()[:, None])
    except KeyboardInterrupt:
        assert raises
    assert look(model) == before


def test_attention_without_second_derivative_is_exchanged(bert, bert_hessian):
    bert.model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(bert.products(vectors(bert)), bert_hessian @ vectors(bert), rtol=1e-10, atol=1e-11)


def test_dropout_is_off(bert):
    with twice_differentiable(bert.model, F64):
        assert bert.surface().loss() == bert.surface().loss()


# What is refused


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_operation_that_can_be_differentiated_once_is_told():
    surface = one_weight(lambda theta: Once.apply(theta).square().sum())
    assert surface.gradient().tolist() == [6, 192]
    with pytest.raises(ValueError, match="no second derivative.*once_differentiable"):
        surface.hessian_products(torch.eye(2))


def test_operation_whose_backward_has_no_derivative_is_named():
    def attention(theta):
        return nn.functional.scaled_dot_product_attention(*[theta.view(1, 1, 4, 4)] * 3).square().sum()

    surface = one_weight(attention, num_weights=16)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(ValueError, match="no second derivative.*flash_attention.*eager"),
    ):
        surface.hessian_products(torch.eye(16))


def test_quantised_base_is_refused_by_name():
    problem = transformer()
    layer = problem.model.base_model.model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with (
        pytest.raises(ValueError, match=r"quantised \(.*layer\.0\.output\.dense\.weight\)"),
        twice_differentiable(problem.model),
    ):
        pass


def test_weights_spread_over_processes_are_refused():
    def try_it(processes):
        model = transformer(dtype=torch.float32).model
        shard(model, base_weights(model), processes, torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP.*safe-lab sharpness"), twice_differentiable(model):
            pass

    in_processes(try_it)


def test_no_examples_are_refused():
    for batches in ([], [{"x": torch.ones(0, 1)}]):
        with pytest.raises(ValueError, match="no examples"):
            Surface(nn.Linear(1, 1), batches, loss_function, Space({"a": [nn.Parameter(torch.ones(1))]}))


@pytest.mark.parametrize("method", ["gradient", "hessian_products"])
def test_loss_without_graph_is_refused(method):
    surface = one_weight(lambda theta: theta.detach().sum())
    with pytest.raises(ValueError, match="does not depend on these weights"):
        getattr(surface, method)(*([torch.eye(2)] if method == "hessian_products" else []))


def test_adapters_that_are_switched_off_are_told(bert):
    with bert.model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        bert.products(vectors(bert))


def test_gauss_newton_needs_the_losss_own_curvature():
    with pytest.raises(ValueError, match="output_curvature="):
        one_weight(lambda theta: theta.sum()).gauss_newton_products(torch.eye(2))
    with pytest.raises(ValueError, match="output_curvature="):
        one_weight(lambda theta: theta.sum()).gauss_newton_diagonal()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_an_error(value):
    with pytest.raises(FloatingPointError, match=f"the loss is {value}"):
        one_weight(lambda theta: theta.sum() * value).loss()


def test_loss_far_out_may_be_nan():
    surface = one_weight(lambda theta: theta.log().sum())
    assert math.isnan(surface.loss_at(torch.tensor([-1.0, 1.0])))


def test_product_that_is_not_finite_is_an_error():
    """The square root's curvature at 0 is infinite."""
    surface = one_weight(lambda theta: (theta - 1).sqrt().sum())
    with pytest.raises(FloatingPointError, match="not finite"):
        surface.hessian_products(torch.eye(2))


# Several processes


@pytest.mark.parametrize("sizes", [(3, 1), (1,)], ids=["one has no share of a batch", "one has no share at all"])
def test_processes_together_find_what_one_does(sizes):
    batches = [tiny_batch(examples=size, seed=i) for i, size in enumerate(sizes)]
    problem = transformer(batches=batches)

    def look(processes):
        with twice_differentiable(problem.model, F64):
            surface = problem.surface(processes=processes)
            return (
                torch.tensor(surface.loss(), dtype=F64),
                surface.gradient(),
                surface.hessian_products(vectors(problem)),
                surface.gauss_newton_products(vectors(problem)),
                surface.gauss_newton_diagonal(),
            )

    first, second = in_processes(look)
    assert all(map(torch.equal, first, second))
    with twice_differentiable(problem.model, F64):
        surface = problem.surface()
        assert first[0].item() == pytest.approx(surface.loss(), rel=1e-10)
        for ours, alone in (
            (first[1], surface.gradient()),
            (first[2], surface.hessian_products(vectors(problem))),
            (first[3], surface.gauss_newton_products(vectors(problem))),
            (first[4], surface.gauss_newton_diagonal()),
        ):
            torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)

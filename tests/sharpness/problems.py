"""Small problems with real curvature, each with the dense matrix to which estimators are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.importance.probe import Batch, LossFunction, count_examples
from safe_lab.model import loss_function
from safe_lab.processes import ALONE
from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.differentiable import twice_differentiable
from safe_lab.sharpness.output_curvature import OUTPUT_CURVATURES
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Cost, Surface, logits
from safe_lab.units import Unit

F64 = torch.float64


@dataclass
class Problem:
    """A model, its units, and the loss over some batches."""

    model: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Batch]
    loss_function: LossFunction
    kind: str = "classification"
    outputs: Callable[[nn.Module, Batch], Tensor] = logits
    space: Space = field(init=False)

    def __post_init__(self) -> None:
        self.space = Space.of_units(self.units)

    def surface(self, batches=None, processes=ALONE) -> Surface:
        return Surface(
            self.model,
            self.batches if batches is None else batches,
            self.loss_function,
            self.space,
            outputs=self.outputs,
            output_curvature=OUTPUT_CURVATURES[self.kind],
            processes=processes,
        )

    def products(self, vectors_DK, *, gauss_newton=False, **changes):
        """Products inside the context, whose precision is that of the weights."""
        with twice_differentiable(self.model, self.space.dtype):
            surface = self.surface(**changes)
            return (surface.gauss_newton_products if gauss_newton else surface.hessian_products)(vectors_DK)


def mlp(kind="classification", *, seed=0) -> Problem:
    """Two layers, each a unit; 5 and 2 examples; in float64, and large enough weights to be far from linear."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    batches = [{"x": torch.randn(n, 3, generator=generator, dtype=F64)} for n in (5, 2)]
    for batch in batches:
        n = len(batch["x"])
        if kind == "classification":
            batch["y"] = torch.randint(3, (n,), generator=generator)
        else:
            batch["y"] = torch.randn(n, 3, generator=generator, dtype=F64)
    units = [Unit(name, i, dict(model[int(name)].named_parameters())) for i, name in enumerate("02")]
    return Problem(model, units, batches, _mean_error[kind], kind, lambda model, batch: model(batch["x"]))


def _cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def _squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(-1).mean()


_mean_error = {"classification": _cross_entropy, "regression": _squared_error}


def transformer(family="bert", *, num_labels=2, dtype=F64, batches=None, noise=0.6, **changes) -> Problem:
    """A tiny model with LoRA that was moved far off its start, with dropout, in train mode; 4 and 3 padded examples."""
    if family == "bert":
        changes = {"num_hidden_layers": 2, "initializer_range": 0.1} | changes
    base = tiny_model(family, num_labels=num_labels, **changes)
    options = {"fan_in_fan_out": family == "gpt2"}
    targets = FAMILIES[family][2]
    config = build_peft_config("lora", rank=2, alpha=4, dropout=0.1, target_modules=targets, options=options)
    model = attach(base, config).model
    stir(model, noise)
    if batches is None:
        batches = [tiny_batch(examples=4), tiny_batch(examples=3, seed=5)]
    if num_labels == 1:
        generator = torch.Generator().manual_seed(2)
        batches = [b | {"labels": torch.randn(count_examples(b), generator=generator).to(dtype)} for b in batches]
    units = find_units(model, lambda: model(**batches[0]))
    kind = "regression" if num_labels == 1 else "classification"
    return Problem(model.to(dtype).train(), units, batches, loss_function, kind)


def stir(model, noise=0.6):
    """Move what trains by random numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=noise)


def dense_hessian(problem: Problem) -> Tensor:
    """By another way than the products: torch's own Hessian of the loss as a function of one vector."""
    names = {id(parameter): name for name, parameter in problem.model.named_parameters()}
    shapes = {names[id(parameter)]: parameter.shape for parameter in problem.space.parameters}
    total = sum(map(count_examples, problem.batches))

    def loss(vector_D):
        parts = vector_D.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

        def model(*args, **kwargs):
            return functional_call(problem.model, weights, args, kwargs)

        return sum(problem.loss_function(model, b) * count_examples(b) for b in problem.batches) / total

    with twice_differentiable(problem.model, problem.space.dtype):
        return torch.autograd.functional.hessian(loss, problem.space.position())


def matrix_of(spectrum, *, seed=0) -> Tensor:
    """A symmetric matrix of these eigenvalues with random eigenvectors."""
    spectrum = torch.as_tensor(spectrum, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=F64))[0]
    return (vectors * spectrum) @ vectors.T


class Counted:
    """Products with a dense matrix, counted as a surface counts them."""

    def __init__(self, matrix_DD: Tensor) -> None:
        self.matrix_DD = matrix_DD
        self.cost = Cost()

    def __call__(self, vectors_DK: Tensor) -> Tensor:
        self.cost.products += vectors_DK.shape[1]
        return self.matrix_DD.to(vectors_DK.dtype) @ vectors_DK

    def budget(self, products=None, seconds=None) -> Budget:
        return Budget(self.cost, products=products, seconds=seconds)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

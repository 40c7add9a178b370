"""A mean loss over fixed examples as a function of weights: its value, gradient, and products with its curvature.

Legend: D numbers in the vector of weights, K vectors, n examples in a batch, C outputs of the model for an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_lab.importance.probe import Batch, LossFunction, count_examples, share_of
from safe_lab.processes import ALONE, Processes
from safe_lab.sharpness.output_curvature import OutputCurvature
from safe_lab.sharpness.space import Space

Products = Callable[[Tensor], Tensor]


@dataclass
class Cost:
    """Passes over all examples that were made.

    Attributes:
        products: With a curvature matrix; each some two gradients' work, or one where several are made at once.
        gradients: Forward and backward.
        losses: Forward alone.
    """

    products: int = 0
    gradients: int = 0
    losses: int = 0


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What a ``transformers`` model puts out for each example (n, C)."""
    outputs: Tensor = model(**batch).logits
    return outputs


class Surface:
    r"""The mean loss of a model over fixed examples, as a function of the weights of a space.

    .. math:: L(\theta) = \frac{1}{N} \sum_b n_b L_b(\theta)

    with :math:`n_b` the examples of batch b and :math:`L_b` the loss as trained. Of several processes each computes its share
    of the examples, and all get the same sums.

    Use it inside :func:`~safe_lab.sharpness.differentiable.twice_differentiable`.

    Attributes:
        space: The weights.
        num_examples: N.
        batches: This process's share of the examples.
        cost: What was computed so far.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_function: LossFunction,
        space: Space,
        *,
        outputs: Callable[[nn.Module, Batch], Tensor] = logits,
        output_curvature: OutputCurvature | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Look at the loss of ``model`` over ``batches``.

        Args:
            model: The model.
            batches: Mappings of tensors whose first dimension is the example; the same on all processes.
            loss_function: ``loss_function(model, batch)`` gives the mean loss over the batch's examples.
            space: The weights by which it is differentiated.
            outputs: What of the model the loss is a function of, (n, C): for the Gauss-Newton matrix.
            output_curvature: The loss's own curvature by those: one of
                :data:`~safe_lab.sharpness.output_curvature.OUTPUT_CURVATURES`.
            processes: Who computes it together.

        Raises:
            ValueError: There are no examples.
        """
        self.space = space
        self.cost = Cost()
        self.num_examples = sum(map(count_examples, batches))
        if not self.num_examples:
            raise ValueError("there are no examples over which to take the loss")
        self._model = model
        self._first = _example(batches[0], 0)
        self.batches = [share for batch in batches if count_examples(share := share_of(batch, processes))]
        self._loss_function = loss_function
        self._outputs = outputs
        self._output_curvature = output_curvature
        self._processes = processes
        self._was_checked = False

    def loss(self) -> float:
        """L where the weights stand.

        Raises:
            FloatingPointError: It is not finite.
        """
        self.cost.losses += 1
        total = 0.0
        with torch.no_grad():
            for batch in self.batches:
                total += self._loss_function(self._model, batch).item() * self._share(batch)
        return self._finite(float(self._sum(torch.tensor(total, dtype=torch.float64))))

    def loss_at(self, position_D: Tensor) -> float:
        """L at other weights; infinite or NaN where it is so far out."""
        with self.space.moved_to(position_D):
            with suppress(FloatingPointError):
                return self.loss()
            return math.nan

    def gradient(self) -> Tensor:
        """Gradient of L where the weights stand (D)."""
        self.cost.gradients += 1
        total_D = self._zeros(1).squeeze(1)
        with self._differentiable() as parameters:
            for batch in self.batches:
                gradients = torch.autograd.grad(
                    self._loss(batch), parameters, allow_unused=True, materialize_grads=True
                )
                total_D.add_(self.space.join(gradients), alpha=self._share(batch))
        return self._sum(total_D)

    def hessian_products(self, vectors_DK: Tensor) -> Tensor:
        r"""Products of the Hessian :math:`\nabla^2 L` with vectors, exact: by differentiating the gradient once more.

        The first derivative's graph is made once a batch for all of the vectors (Pearlmutter, 1994).

        Args:
            vectors_DK: The vectors, as columns.

        Returns:
            The products (D, K).

        Raises:
            ValueError: An operation of the model has no second derivative.
            FloatingPointError: A product is not finite.
        """

        def of_batch(batch: Batch, parameters: list[nn.Parameter]) -> Products:
            gradients = torch.autograd.grad(
                self._loss(batch), parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            # What the loss is linear in has a gradient without a graph, and no curvature.
            curved = [i for i in range(len(gradients)) if gradients[i].requires_grad]
            self._check_graph([gradients[i] for i in curved])

            def product(vector_D: Tensor) -> Tensor:
                if not curved:
                    return torch.zeros_like(vector_D)
                parts = self.space.split(vector_D)
                return self.space.join(
                    torch.autograd.grad(
                        [gradients[i] for i in curved],
                        parameters,
                        [parts[i] for i in curved],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )

            return product

        return self._products(of_batch, vectors_DK)

    def gauss_newton_products(self, vectors_DK: Tensor) -> Tensor:
        r"""Products of the Gauss-Newton matrix with vectors, exact.

        .. math:: G = \frac{1}{N} \sum_x J_x^\top H_x J_x

        with :math:`J_x` the Jacobian of the model's output for example x and :math:`H_x` the Hessian of its loss by that. For
        cross entropy it is the Fisher information. It has no negative eigenvalue; what it leaves of the Hessian is the
        model's own curvature, weighted by the loss's gradient. Source: Schraudolph (Neural Computation 2002); Martens (JMLR
        2020).

        Args:
            vectors_DK: The vectors, as columns.

        Returns:
            The products (D, K).

        Raises:
            ValueError: ``output_curvature`` was not given, or an operation has no second derivative.
            FloatingPointError: A product is not finite.
        """
        curvature = self._needed_curvature()

        def of_batch(batch: Batch, parameters: list[nn.Parameter]) -> Products:
            outputs_nC = self._outputs(self._model, batch)
            # Linear in u, so that differentiating by u once more gives J v.
            u_nC = torch.zeros_like(outputs_nC, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs_nC, parameters, u_nC, create_graph=True, allow_unused=True, materialize_grads=True
            )
            reached = [i for i in range(len(pulled)) if pulled[i].requires_grad]
            self._check_graph([pulled[i] for i in reached])

            def product(vector_D: Tensor) -> Tensor:
                if not reached:
                    return torch.zeros_like(vector_D)
                parts = self.space.split(vector_D)
                (pushed_nC,) = torch.autograd.grad(
                    [pulled[i] for i in reached], u_nC, [parts[i] for i in reached], retain_graph=True
                )
                with torch.no_grad():
                    curved_nC = curvature.product(outputs_nC, pushed_nC) / len(outputs_nC)
                return self.space.join(
                    torch.autograd.grad(
                        outputs_nC, parameters, curved_nC, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                )

            return product

        return self._products(of_batch, vectors_DK)

    def gauss_newton_diagonal(self) -> Tensor:
        r"""Diagonal of the Gauss-Newton matrix (D), exact.

        .. math:: \mathrm{diag}\, G = \frac{1}{N} \sum_x \sum_c (J_x^\top s_{xc})^2

        with :math:`s_{xc}` column c of a root of :math:`H_x`, squared entry by entry. One example at a time, and as many
        backward passes for it as there are columns (:meth:`count_columns`): for a few classes a small part of what an estimate
        from products takes.

        Raises:
            ValueError: ``output_curvature`` was not given.
            FloatingPointError: It is not finite.
        """
        curvature = self._needed_curvature()
        self.cost.gradients += self.count_columns()
        total_D = self._zeros(1).squeeze(1).double()
        with self._differentiable() as parameters:
            for batch in self.batches:
                for i in range(count_examples(batch)):
                    outputs_1C = self._outputs(self._model, _example(batch, i))
                    for column_1C in curvature.roots(outputs_1C.detach()):
                        gradients = torch.autograd.grad(
                            outputs_1C,
                            parameters,
                            column_1C,
                            retain_graph=True,
                            allow_unused=True,
                            materialize_grads=True,
                        )
                        total_D += self.space.join(gradients).double().square()
        total_D = self._sum(total_D) / self.num_examples
        if not total_D.isfinite().all():
            raise FloatingPointError("the diagonal of the Gauss-Newton matrix is not finite")
        return total_D

    def count_columns(self) -> int:
        """Columns of a root of the loss's curvature by the outputs: for classification the classes.

        Raises:
            ValueError: ``output_curvature`` was not given.
        """
        with torch.no_grad():
            return len(self._needed_curvature().roots(self._outputs(self._model, self._first)))

    def _needed_curvature(self) -> OutputCurvature:
        if self._output_curvature is None:
            raise ValueError("the Gauss-Newton matrix needs output_curvature=, the loss's own curvature by the outputs")
        return self._output_curvature

    def _products(self, of_batch: Callable[[Batch, list[nn.Parameter]], Products], vectors_DK: Tensor) -> Tensor:
        vectors_DK = vectors_DK.to(self.space.device, self.space.dtype)
        self.cost.products += vectors_DK.shape[1]
        total_DK = self._zeros(vectors_DK.shape[1])
        with self._differentiable() as parameters, _named_second_derivative():
            for batch in self.batches:
                product = of_batch(batch, parameters)
                for k in range(vectors_DK.shape[1]):
                    total_DK[:, k].add_(product(vectors_DK[:, k]), alpha=self._share(batch))
        total_DK = self._sum(total_DK)
        if not total_DK.isfinite().all():
            raise FloatingPointError("a product with the curvature of the loss is not finite")
        return total_DK

    def _check_graph(self, gradients: Sequence[Tensor]) -> None:
        """Look, once, for operations whose share in a second derivative autograd would leave out without a word.

        Raises:
            ValueError: There is one: a backward pass of one's own that is marked with ``once_differentiable``.
        """
        if self._was_checked:
            return
        waiting = [gradient.grad_fn for gradient in gradients]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise ValueError(
                    "an operation of the model has no second derivative: its backward pass is marked with once_differentiable"
                )
            waiting += [before for before, _ in node.next_functions]
        self._was_checked = True

    def _loss(self, batch: Batch) -> Tensor:
        loss = self._loss_function(self._model, batch)
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on these weights: its function gives no graph, or the adapters do not run (they may be "
                "folded, switched off or merged)"
            )
        return loss

    @contextmanager
    def _differentiable(self) -> Iterator[list[nn.Parameter]]:
        """Let gradients reach the space's weights and no others."""
        parameters = self.space.parameters
        wanted = {id(parameter) for parameter in parameters}
        before = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in wanted)
            with torch.enable_grad():
                yield parameters
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)

    def _zeros(self, num_vectors: int) -> Tensor:
        return torch.zeros(self.space.num_dimensions, num_vectors, dtype=self.space.dtype, device=self.space.device)

    def _share(self, batch: Batch) -> float:
        return count_examples(batch) / self.num_examples

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._processes.sum(tensor)

    @staticmethod
    def _finite(loss: float) -> float:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss


def _example(batch: Batch, i: int) -> Batch:
    return {name: tensor[i : i + 1] for name, tensor in batch.items()}


@contextmanager
def _named_second_derivative() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "derivative for" in str(error) or "differentiate twice" in str(error):
            raise ValueError(
                f"an operation of the model has no second derivative ({str(error).splitlines()[0]}); if it is attention, "
                "model.attention: eager has one"
            ) from error
        raise

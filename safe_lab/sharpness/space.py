"""The weights in which a loss is looked at, as one vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from safe_lab.units import Unit


class Space:
    """Weights of a model as one vector of D numbers, in groups that follow one another.

    Attributes:
        parameters: The weights, each once.
        groups: Where in the vector each group lies, by name. A weight of several groups lies in the first of them.
        num_dimensions: D.
        dtype: Of vectors of this space: that of the weights, and float32 at least.
        device: Where they lie.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Put weights together.

        Args:
            groups: Weights by name of the group, such as a unit's.

        Raises:
            ValueError: There are none, or they are not floating-point numbers.
        """
        taken: dict[int, nn.Parameter] = {}
        self.groups: dict[str, slice] = {}
        end = 0
        for name, parameters in groups.items():
            start = end
            for parameter in parameters:
                if id(parameter) not in taken:
                    taken[id(parameter)] = parameter
                    end += parameter.numel()
            self.groups[name] = slice(start, end)
        self.parameters = list(taken.values())
        self.num_dimensions = end
        if not end:
            raise ValueError(
                "there are no weights in which to look at the loss: the model has no adapters, or none was named"
            )
        for parameter in self.parameters:
            if not parameter.is_floating_point():
                raise ValueError(
                    f"the loss cannot be differentiated twice by weights of dtype {parameter.dtype}: they are quantised"
                )

    @classmethod
    def of_units(cls, units: Sequence[Unit], others: Mapping[str, Sequence[nn.Parameter]] | None = None) -> Space:
        """The weights of adapters, each unit a group, and perhaps others (the task head's)."""
        return cls({unit.name: list(unit.parameters.values()) for unit in units} | dict(others or {}))

    @property
    def dtype(self) -> torch.dtype:
        """See the class."""
        return reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters), torch.float32)

    @property
    def device(self) -> torch.device:
        """See the class."""
        return self.parameters[0].device

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped as the parameters, as one vector (D)."""
        return torch.cat([tensor.reshape(-1).to(self.dtype) for tensor in tensors])

    def split(self, vector_D: Tensor) -> list[Tensor]:
        """A vector as tensors shaped as the parameters, and of their dtype."""
        parts = torch.split(vector_D, [parameter.numel() for parameter in self.parameters])
        return [
            part.view_as(parameter).to(parameter.dtype) for part, parameter in zip(parts, self.parameters, strict=True)
        ]

    def position(self) -> Tensor:
        """A copy of the weights as they are (D)."""
        return self.join([parameter.detach() for parameter in self.parameters])

    def sum_by_group(self, values_DK: Tensor) -> Tensor:
        """Sum of the rows of each group, in float64: (D, K) -> (number of groups, K)."""
        return torch.stack([values_DK[group].sum(0, dtype=torch.float64) for group in self.groups.values()])

    @contextmanager
    def moved_to(self, position_D: Tensor) -> Iterator[None]:
        """Inside, the weights are those of ``position_D``; on leaving, what they were, to the bit."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._set(self.split(position_D))
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)

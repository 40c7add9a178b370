"""The weights that train: adapters and task head, as they are and as they were at the best evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safe_lab.units import Unit


class TrainedWeights:
    """What of a model trains when a training begins; what freezes later is still among it.

    Attributes:
        number: How many weights.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Take what requires a gradient now.

        Args:
            model: The model.
            units: Its adapters, to name a weight's by.
        """
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._units = {id(p): f"unit {unit.name}" for unit in units for p in unit.parameters.values()}
        self._best: dict[str, Tensor] = {}
        self.number = sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def live(self) -> list[nn.Parameter]:
        """Those that still train."""
        return [parameter for parameter in self._parameters.values() if parameter.requires_grad]

    @property
    def kept(self) -> list[Tensor]:
        """Copies beside the model."""
        return list(self._best.values())

    def check(self, step: int) -> None:
        """Before they are measured or kept.

        Raises:
            FloatingPointError: One is NaN or infinite; the message names step and unit.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters.values()):
            raise FloatingPointError(f"weights are not finite after step {step}: {self.explain_not_finite()}")

    def explain_not_finite(self) -> str:
        """Which is the first that is NaN or infinite, in a clause."""
        for name, parameter in self._parameters.items():
            if not parameter.isfinite().all():
                owner = self._units.get(id(parameter), "the task head")
                return f"{owner} is the first with weights that are not finite ({name})"
        return "the weights of every unit and the head are finite, so look at the learning rate, the dtype or the data"

    def keep_best(self) -> None:
        """Copy them as they are."""
        self._best.update((name, parameter.detach().clone()) for name, parameter in self._parameters.items())

    def restore_best(self) -> None:
        """Take the copies."""
        self._load(self._best)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        last: dict[str, Tensor] = {f"last.{name}": parameter for name, parameter in self._parameters.items()}
        return last | {f"best.{name}": tensor for name, tensor in self._best.items()}

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take :meth:`tensors` of a checkpoint.

        Raises:
            ValueError: They are of other weights.
        """
        self._load({key.removeprefix("last."): t for key, t in tensors.items() if key.startswith("last.")})
        self._best.update((key.removeprefix("best."), t) for key, t in tensors.items() if key.startswith("best."))

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self._parameters.keys():
            raise ValueError("the checkpoint holds other weights than the model trains; start anew with --overwrite")
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

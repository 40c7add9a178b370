"""What freezes as one: a unit, its parameters, where its activations are read, how it is switched off.

A unit is plain data about a live model. :func:`safe_lab.adapters.find_units` lists the units of a PEFT model; for any
other module build them by hand, as ``Unit(name="layers.0", depth=0, parameters={...})``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Unit:
    """One adapter in the paper's sense: the weights that freeze together.

    Attributes:
        name: Qualified name, unique among the units of a model.
        depth: Position in the order of execution, 0 at the input.
        parameters: The adapter weights of the unit by qualified name. A parameter may belong to several units (VB-LoRA's
            vector bank); it then freezes with the last of them.
        site: The module at whose output the unit's activations are read (CKA); None if they cannot be read.
        switch_off: Returns a context manager in which the model runs as if the unit were absent; None if there is no such
            way. It must leave ``requires_grad`` alone.
        delta_weights: Yields the effective update of each weight the unit adapts (for LoRA, ``scaling * B @ A``), shaped as
            that weight; None if the method has no such form.
    """

    name: str
    depth: int
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    site: nn.Module | None = field(default=None, repr=False)
    switch_off: Callable[[], AbstractContextManager[None]] | None = field(default=None, repr=False)
    delta_weights: Callable[[], Iterator[Tensor]] | None = field(default=None, repr=False)

    @property
    def num_parameters(self) -> int:
        """Number of scalar weights in the unit."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@contextmanager
def switched_off(units: Sequence[Unit]) -> Iterator[None]:
    """Run the model as if ``units`` were absent.

    Raises:
        ValueError: A unit has no ``switch_off``.
    """
    with ExitStack() as stack:
        for unit in units:
            if unit.switch_off is None:
                raise ValueError(
                    f"unit {unit.name} cannot be switched off: build it with switch_off=, or use a metric that need not"
                )
            stack.enter_context(unit.switch_off())
        yield

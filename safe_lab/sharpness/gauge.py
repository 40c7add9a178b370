"""Sharpness of one model over its samples: what a run, and whoever looks at it later, measures with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from safe_lab.importance.probe import Batch, LossFunction
from safe_lab.processes import ALONE, Processes
from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.differentiable import is_widened, twice_differentiable
from safe_lab.sharpness.effective_weights import effective_weight_traces
from safe_lab.sharpness.lanczos import Eigenpairs
from safe_lab.sharpness.measuring import Plan, measure
from safe_lab.sharpness.norms import unit_norms
from safe_lab.sharpness.output_curvature import OUTPUT_CURVATURES
from safe_lab.sharpness.space import Space
from safe_lab.sharpness.surface import Surface
from safe_lab.units import Unit

# The sample whose figures stand at the top of the result; others stand below it under their names.
TRAINING = "training"
HEAD = "head"


@dataclass(frozen=True)
class Sample:
    """Fixed examples over which the loss is looked at.

    Attributes:
        batches: Mappings of tensors whose first dimension is the example, on the model's device.
        num_examples: In all of them.
        fingerprint: Hash of what they hold, by which two measurements know that they are of the same examples.
    """

    batches: Sequence[Batch]
    num_examples: int
    fingerprint: str


@dataclass(frozen=True)
class Reading:
    """What :meth:`Gauge.take` came to.

    Attributes:
        figures: Plain values: ``sharpness`` of result.json, which docs/run_folder.md explains.
        eigenpairs: The largest eigenvalues with their vectors on each sample on which they were measured.
    """

    figures: dict[str, Any]
    eigenpairs: dict[str, Eigenpairs]


class Gauge:
    """Measures where the model stands, and leaves no trace in it.

    Attributes:
        processes: Who computes it together.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        samples: Mapping[str, Sample],
        loss_function: LossFunction,
        *,
        kind: str,
        layers: Mapping[str, nn.Module],
        head: Sequence[nn.Parameter] = (),
        only: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
        processes: Processes = ALONE,
    ) -> None:
        """Look at a model.

        Args:
            model: The model.
            units: Its adapters, frozen ones too.
            samples: Examples by name; :data:`TRAINING` is one of them.
            loss_function: ``loss_function(model, batch)`` gives the mean loss.
            kind: Of task: a key of :data:`~safe_lab.sharpness.output_curvature.OUTPUT_CURVATURES`.
            layers: The adapted layers that compute an affine function, by name.
            head: Weights of the task head, to be part of the space; none: the head stays fixed.
            only: Names of the units that make up the space; None: all.
            dtype: float32 or float64.
            whole: A context in which every adapter runs beside its base weight (folded ones do not).
            processes: Who computes it together.

        Raises:
            ValueError: No such unit, or no weights.
        """
        names = [unit.name for unit in units]
        unknown = sorted(set(only or ()) - set(names))
        if unknown:
            raise ValueError(f"sharpness.units: there is no unit {unknown[0]!r}; there are {', '.join(names)}")
        self._units = [unit for unit in units if only is None or unit.name in only]
        self._model = model
        self._samples = dict(samples)
        self._loss_function = loss_function
        self._kind = kind
        self._layers = {
            name: layer
            for name, layer in layers.items()
            if {id(p) for p in layer.parameters()} & {id(p) for u in self._units for p in u.parameters.values()}
        }
        self._head = {HEAD: list(head)} if head else {}
        self._dtype = dtype
        self._whole = whole
        self.processes = processes
        # Whether there are weights at all, before a training and not after it.
        self._space()

    @property
    def fingerprint(self) -> str:
        """Of the training sample."""
        return self._samples[TRAINING].fingerprint

    @property
    def widens(self) -> bool:
        """Whether the weights change their dtype for the time, after which DDP must be wrapped anew."""
        return is_widened(self._model, self._dtype)

    @contextmanager
    def surfaces(self, space: Space | None = None) -> Iterator[dict[str, Surface]]:
        """The loss over each sample as a function of the weights; inside, the model is as it must be for that.

        Args:
            space: The weights; None: those that are measured.
        """
        with self._whole(), twice_differentiable(self._model, self._dtype):
            space = space or self._space()
            yield {name: self._surface(sample, space, self.processes) for name, sample in self._samples.items()}

    def check(self, measures: Iterable[str]) -> None:
        """Try each measure, as coarsely as it goes, on one example, so that a training does not end with what cannot be measured.

        Args:
            measures: Names of :data:`~safe_lab.sharpness.names.MEASURES`.

        Raises:
            ValueError: The model cannot be differentiated twice.
            FloatingPointError: The loss of that example or a product is not finite.
        """
        batch = {name: tensor[:1] for name, tensor in self._samples[TRAINING].batches[-1].items()}
        sample = Sample([batch], 1, "")
        with self._whole(), twice_differentiable(self._model, self._dtype):
            surface = self._surface(sample, self._space(), ALONE)
            for name in dict.fromkeys(measures):
                plan = Plan(
                    [name], estimator="hutchinson", num_eigenvalues=1, num_starts=2, num_steps=1, num_directions=2
                )
                measure(surface, plan, budget=Budget(surface.cost, products=1), others=self._others_over(sample, ALONE))

    def take(self, plans: Mapping[str, Plan]) -> Reading:
        """Measure where the weights stand.

        Args:
            plans: What to measure on each sample, by its name.

        Raises:
            ValueError: The model cannot be differentiated twice.
            FloatingPointError: A loss or a product is not finite.
        """
        found: dict[str, dict[str, Any]] = {}
        eigenpairs: dict[str, Eigenpairs] = {}
        with self.surfaces() as surfaces:
            for name, plan in plans.items():
                surface = surfaces[name]
                budget = Budget(
                    surface.cost,
                    seconds=plan.budget_seconds,
                    products=plan.budget_products,
                    processes=self.processes,
                )
                sample = self._samples[name]
                measured = measure(surface, plan, budget=budget, others=self._others_over(sample, self.processes))
                found[name] = {"examples": sample.num_examples, "fingerprint": sample.fingerprint, **measured.figures}
                if measured.eigenpairs is not None:
                    eigenpairs[name] = measured.eigenpairs
            space = next(iter(surfaces.values())).space
        figures = {
            "space": {
                "dimensions": space.num_dimensions,
                "units": [unit.name for unit in self._units],
                "head": bool(self._head),
                "dtype": str(space.dtype).removeprefix("torch."),
            },
            "seed": next(iter(plans.values())).seed,
            "processes": self.processes.count,
            **found.pop(TRAINING, {}),
            **found,
        }
        return Reading(figures, eigenpairs)

    def _space(self) -> Space:
        return Space.of_units(self._units, self._head)

    def _surface(self, sample: Sample, space: Space, processes: Processes) -> Surface:
        return Surface(
            self._model,
            sample.batches,
            self._loss_function,
            space,
            output_curvature=OUTPUT_CURVATURES[self._kind],
            processes=processes,
        )

    def _others_over(self, sample: Sample, processes: Processes) -> dict[str, Callable[[], dict[str, Any]]]:
        """The measures that are not of a surface alone."""
        return {
            "norms": self._norms,
            "effective_weights": partial(self._effective_weights, sample, processes),
        }

    def _norms(self) -> dict[str, Any]:
        return {"norms": {name: asdict(norms) for name, norms in unit_norms(self._units).items()}}

    def _effective_weights(self, sample: Sample, processes: Processes) -> dict[str, Any]:
        traces = effective_weight_traces(
            self._model, sample.batches, self._layers, OUTPUT_CURVATURES[self._kind].roots, processes=processes
        )
        return {
            "effective_weight_trace": sum(traces.values()) if traces else None,
            "effective_weight_trace_by_layer": traces,
            # Those that do not keep examples apart.
            "effective_weight_left_out": [name for name in self._layers if name not in traces],
        }

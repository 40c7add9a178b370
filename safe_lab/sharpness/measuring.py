"""Everything that is measured of one loss at one place: which figures there are, and in which order they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safe_lab.sharpness.ball import average_sharpness, ball_sharpness
from safe_lab.sharpness.budget import Budget
from safe_lab.sharpness.estimate import Estimate
from safe_lab.sharpness.lanczos import Eigenpairs, Krylov, lanczos, top_eigenpairs
from safe_lab.sharpness.names import MEASURES
from safe_lab.sharpness.surface import Products, Surface
from safe_lab.sharpness.trace import ESTIMATORS, TraceEstimate, estimate_trace
from safe_lab.sharpness.xtrace import deflated

# Up to so many classes the Gauss-Newton trace is taken exactly. An estimate takes some twenty products, two gradients each.
MOST_COLUMNS = 20


@dataclass(frozen=True)
class Plan:
    """What is measured, and how finely; the defaults are those of the ``sharpness`` section.

    Attributes:
        measures: Names of :data:`~safe_lab.sharpness.names.MEASURES`.
        estimator: Of traces: a name of :data:`~safe_lab.sharpness.names.ESTIMATORS`.
        tolerance: Relative standard error of a trace at which it is good enough.
        num_eigenvalues: Of the largest.
        eigenvalue_tolerance: Residual of an eigenvalue, as a share of it, at which it is good enough.
        num_starts: Random starts of the spectrum.
        num_steps: Lanczos steps from each.
        radius: Of SAM's ball.
        adaptive_radius: Of adaptive SAM's.
        deviation: Of the noise on the weights.
        adaptive_deviation: Of the noise as a share of each weight.
        num_directions: Of the noise.
        budget_seconds: Most seconds; None: no limit.
        budget_products: Most products with a curvature matrix; None: no limit.
        seed: Of all that is drawn.
    """

    measures: Sequence[str]
    estimator: str = "xtrace"
    tolerance: float = 0.05
    num_eigenvalues: int = 5
    eigenvalue_tolerance: float = 0.05
    num_starts: int = 4
    num_steps: int = 10
    radius: float = 0.05
    adaptive_radius: float = 0.5
    deviation: float = 0.01
    adaptive_deviation: float = 0.1
    num_directions: int = 8
    budget_seconds: float | None = None
    budget_products: int | None = 200
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` came to.

    Attributes:
        figures: Plain values by name; docs/run_folder.md explains them.
        eigenpairs: The largest eigenvalues with their vectors, if they were measured.
    """

    figures: dict[str, Any]
    eigenpairs: Eigenpairs | None


def measure(
    surface: Surface, plan: Plan, *, budget: Budget, others: Mapping[str, Callable[[], dict[str, Any]]] | None = None
) -> Measured:
    """Take the figures of a plan where the weights stand.

    Args:
        surface: The loss, inside :func:`~safe_lab.sharpness.differentiable.twice_differentiable`.
        plan: Which figures.
        budget: Once it is spent, what has begun ends with the error it has reached, and the rest is left out by name.
        others: How to take those that are not of the loss's surface alone (norms, effective weights), by name.

    Raises:
        FloatingPointError: The loss or a product is not finite.
    """
    taker = _Taker(surface, plan, budget)
    takers: dict[str, Callable[[], dict[str, Any]]] = {
        "ball": taker.ball,
        "average": taker.average,
        "trace": taker.trace,
        "spectrum": taker.spectrum,
        "eigenvalues": taker.eigenvalues,
        "gauss_newton": taker.gauss_newton,
        **(others or {}),
    }
    figures: dict[str, Any] = {"loss": surface.loss(), "gradient_norm": float(surface.gradient().double().norm())}
    seconds: dict[str, float] = {}
    left_out = []
    for name in MEASURES:
        if name not in plan.measures:
            continue
        if budget.is_spent(takes_products=not taker.is_without_products(name)) and not taker.knows(name):
            left_out.append(name)
            continue
        began = time.perf_counter()
        figures |= takers[name]()
        seconds[name] = time.perf_counter() - began
    figures["left_out"] = left_out
    figures["cost"] = {"seconds": budget.seconds, "seconds_by_measure": seconds, **asdict(surface.cost)}
    return Measured(figures, taker.eigenpairs)


class _Taker:
    """The measures of one surface; eigenvalues and trace begin where the spectrum has come to."""

    def __init__(self, surface: Surface, plan: Plan, budget: Budget) -> None:
        self._surface = surface
        self._space = surface.space
        self._plan = plan
        self._budget = budget
        self._position_D = surface.space.position()
        self._krylov: Krylov | None = None
        self._of_starts = self._generator()
        self.eigenpairs: Eigenpairs | None = None

    def knows(self, name: str) -> bool:
        """Whether a measure takes no more products, if there are none left."""
        return name == "eigenvalues" and self._krylov is not None

    def is_without_products(self, name: str) -> bool:
        """Whether a measure takes other passes than products; what comes cheap is begun all the same."""
        return name == "gauss_newton" and self._surface.count_columns() <= MOST_COLUMNS

    def trace(self) -> dict[str, Any]:
        if self._krylov is None or self._plan.estimator != "xtrace":
            return self._trace("trace", self._estimate(self._surface.hessian_products))
        basis_DM, of_basis_DM = (part.to(self._position_D) for part in self._krylov.union())
        # The generator that has drawn Lanczos's starts goes on: the same vectors again would lie in the basis.
        readings = deflated(self._surface.hessian_products, basis_DM, of_basis_DM, self._read, self._of_starts)
        return self._trace("trace", self._until_good(readings))

    def gauss_newton(self) -> dict[str, Any]:
        if self._surface.count_columns() > MOST_COLUMNS:
            return self._trace("gauss_newton_trace", self._estimate(self._surface.gauss_newton_products))
        readings_R1 = self._read(self._surface.gauss_newton_diagonal()[:, None])
        exact = [Estimate(float(value), 0.0) for value in readings_R1]
        return self._trace("gauss_newton_trace", TraceEstimate(exact, num_products=0, converged=True))

    def spectrum(self) -> dict[str, Any]:
        self._krylov = krylov = lanczos(
            self._surface.hessian_products,
            self._position_D,
            num_starts=self._plan.num_starts,
            num_steps=self._plan.num_steps,
            generator=self._of_starts,
            budget=self._budget,
        )
        nodes = krylov.nodes()
        smallest, largest = krylov.extremes()
        return {
            "spectrum": {
                "nodes": [values for values, _ in nodes],
                "weights": [weights for _, weights in nodes],
                "moments": {str(power): asdict(krylov.moment(power)) for power in (1, 2) if krylov.has_moment(power)},
                "smallest": smallest,
                "largest": largest,
            }
        }

    def eigenvalues(self) -> dict[str, Any]:
        plan, number = self._plan, min(self._plan.num_eigenvalues, self._space.num_dimensions)
        pairs: Eigenpairs | None = None
        if (krylov := self._krylov) is not None:
            pairs = krylov.top(number)
            # As far again as the density went: a block of products is cheaper than ARPACK's, one at a time.
            for _ in range(plan.num_steps):
                if _are_good(pairs, number, plan.eigenvalue_tolerance) or not krylov.extend(1, self._budget):
                    break
                pairs = krylov.top(number)
        if not _are_good(pairs, number, plan.eigenvalue_tolerance) and not self._budget.is_spent():
            generator = self._generator()
            start_D = (
                torch.randn(len(self._position_D), generator=generator, dtype=torch.float64)
                if pairs is None
                else pairs.vectors.sum(1)
            )
            better = top_eigenpairs(
                self._surface.hessian_products,
                self._position_D,
                number,
                tolerance=plan.eigenvalue_tolerance,
                start_D=start_D,
                budget=self._budget,
            )
            pairs = better or pairs
        self.eigenpairs = pairs
        return {
            "top_eigenvalues": [] if pairs is None else pairs.values,
            "eigenvalue_residuals": [] if pairs is None else pairs.residuals,
            "eigenvalues_converged": _are_good(pairs, number, plan.eigenvalue_tolerance),
        }

    def ball(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "ball": {
                "radius": plan.radius,
                "rise": ball_sharpness(self._surface, plan.radius),
                "adaptive_radius": plan.adaptive_radius,
                "adaptive_rise": ball_sharpness(self._surface, plan.adaptive_radius, adaptive=True),
            }
        }

    def average(self) -> dict[str, Any]:
        plan = self._plan
        found = {
            name: average_sharpness(
                self._surface,
                deviation,
                generator=self._generator(),
                adaptive=adaptive,
                num_directions=plan.num_directions,
            )
            for name, deviation, adaptive in (
                ("rise", plan.deviation, False),
                ("adaptive_rise", plan.adaptive_deviation, True),
            )
        }
        return {
            "average": {
                "deviation": plan.deviation,
                "adaptive_deviation": plan.adaptive_deviation,
                **{name: asdict(estimate) for name, estimate in found.items()},
            }
        }

    def _read(self, diagonals_Dm: Tensor) -> Tensor:
        """The trace, that weighted by the squares of the weights, and the share of each unit (R, m)."""
        total = diagonals_Dm.sum(0, keepdim=True, dtype=torch.float64)
        adaptive = self._position_D.double().square()[None] @ diagonals_Dm.double()
        return torch.cat([total, adaptive, self._space.sum_by_group(diagonals_Dm)])

    def _estimate(self, products: Products) -> TraceEstimate:
        estimator = ESTIMATORS[self._plan.estimator]
        return self._until_good(estimator(products, self._position_D, self._read, self._generator()))

    def _until_good(self, readings: Iterator[tuple[list[Estimate], int]]) -> TraceEstimate:
        return estimate_trace(readings, tolerance=self._plan.tolerance, budget=self._budget)

    def _trace(self, name: str, found: TraceEstimate) -> dict[str, Any]:
        total, adaptive, *by_group = found.readings
        return {
            name: {**asdict(total), "products": found.num_products, "converged": found.converged},
            # The products are for the trace; this one has an error of its own.
            f"adaptive_{name}": {
                **asdict(adaptive),
                "converged": adaptive.standard_error <= self._plan.tolerance * abs(adaptive.value),
            },
            f"{name}_by_unit": {group: asdict(e) for group, e in zip(self._space.groups, by_group, strict=True)},
        }

    def _generator(self) -> torch.Generator:
        # Anew for each, so that none depends on which others are taken.
        return torch.Generator().manual_seed(self._plan.seed)


def _are_good(pairs: Eigenpairs | None, number: int, tolerance: float) -> bool:
    return (
        pairs is not None
        and len(pairs.values) == number
        and all(
            residual <= tolerance * abs(value) for value, residual in zip(pairs.values, pairs.residuals, strict=True)
        )
    )


def summarize(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures that are single numbers, under flat names: what a row or a tracker's chart takes.

    >>> summarize({"loss": 0.5, "trace": {"value": 3.0, "standard_error": 0.1}, "top_eigenvalues": [2.0, 1.0]})
    {'loss': 0.5, 'trace': 3.0, 'trace_standard_error': 0.1, 'top_eigenvalue': 2.0}
    """
    flat: dict[str, float] = {}

    def add(name: str, found: Any) -> None:
        """A number; of an estimate its error too, and that it is not within the tolerance, if it is not."""
        if isinstance(found, Estimate):
            found = asdict(found)
        if isinstance(found, Mapping):
            if "value" in found:
                flat[name] = found["value"]
                flat[f"{name}_standard_error"] = found["standard_error"]
                if not found.get("converged", True):
                    flat[f"{name}_converged"] = False
        elif isinstance(found, int | float):
            flat[name] = found

    for key in ("loss", "gradient_norm", "effective_weight_trace"):
        add(prefix + key, figures.get(key))
    for kind in ("trace", "gauss_newton_trace"):
        add(prefix + kind, figures.get(kind))
        add(f"{prefix}adaptive_{kind}", figures.get(f"adaptive_{kind}"))
    if figures.get("top_eigenvalues"):
        add(f"{prefix}top_eigenvalue", figures["top_eigenvalues"][0])
        if not figures.get("eigenvalues_converged", True):
            flat[f"{prefix}top_eigenvalue_converged"] = False
    if "spectrum" in figures:
        add(f"{prefix}smallest_eigenvalue", figures["spectrum"]["smallest"])
    for group in ("ball", "average"):
        for name in ("rise", "adaptive_rise"):
            add(f"{prefix}{group}_{name}", figures.get(group, {}).get(name))
    return flat

"""Optuna's samplers and pruners by name, with the arguments they take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from safe_lab.section import ConfigError
from safe_lab.suggest import did_you_mean
from safe_lab.sweep.roster import ROOT, VOID
from safe_lab.sweep.space import Space

SAMPLERS: Mapping[str, Callable[..., BaseSampler]] = MappingProxyType(
    {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "cma_es": optuna.samplers.CmaEsSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
        "nsga3": optuna.samplers.NSGAIIISampler,
        "qmc": optuna.samplers.QMCSampler,
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.GridSampler,
    }
)
PRUNERS: Mapping[str, Callable[..., BasePruner]] = MappingProxyType(
    {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "percentile": optuna.pruners.PercentilePruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "threshold": optuna.pruners.ThresholdPruner,
        "patient": optuna.pruners.PatientPruner,
        "wilcoxon": optuna.pruners.WilcoxonPruner,
    }
)
# What a study file cannot say: objects, and what Optuna has given up.
_NOT_IN_A_FILE = (
    *(
        "search_space",
        "independent_sampler",
        "constraints_func",
        "weights",
        "gamma",
        "source_trials",
        "mutation",
        "crossover",
    ),
    *(
        "elite_population_selection_strategy",
        "child_generation_strategy",
        "after_trial_strategy",
        "wrapped_pruner",
        "seed",
    ),
    *("warn_independent_sampling", "warn_asynchronous_seeding", "reference_points", "x0"),
)


_MOST_GRID_POINTS = 100_000

Part = TypeVar("Part")


class SamplerOfStudy(BaseSampler):
    """Draws each trial by its number, so that what it proposes hangs on the study alone and on no worker's past.

    A sampler of Optuna with a fixed seed starts its sequence anew in every process: two workers would try the same points, and a
    study that is taken up again the points it began with. Here trial n draws with a generator of its own, made from the study's
    seed and n.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], space: Space, seed: int) -> None:
        """Sample as one of :data:`SAMPLERS`.

        Args:
            name: Which.
            arguments: Of its constructor.
            space: Of the study.
            seed: Of the study.

        Raises:
            ConfigError: There is no such sampler or argument, or it has no use for this space.
        """
        self._build = _find("sampler", name, SAMPLERS)
        self._arguments = dict(arguments)
        _check_arguments("sampler", name, self._build, self._arguments)
        self._name = name
        self._seed = seed
        if name == "grid":
            self._arguments["search_space"] = _grid(space)
        self._inner = self._make(seed)
        self._space = space
        # Grid points that differ in what is asked for, by their place in Optuna's list.
        self._grid_points: dict[frozenset[tuple[str, Any]], int] = {}
        if isinstance(self._inner, optuna.samplers.GridSampler):
            for i, point in enumerate(self._inner._all_grids):
                named = dict(zip(self._inner._param_names, point, strict=True))
                self._grid_points.setdefault(self._identify(named), i)

    @property
    def num_grid_points(self) -> int | None:
        """How many trials there can be, if there is an end to them."""
        return len(self._grid_points) or None

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Take up the generator of this trial."""
        if isinstance(self._inner, optuna.samplers.GridSampler):
            self._choose_grid_point(study, trial, self._inner)
        else:
            self._take(trial)
            self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As Optuna's sampler does."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's sampler does."""
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As Optuna's sampler does."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As Optuna's sampler does; a grid that has come to its end has no more to say here."""
        if self._name != "grid":
            self._inner.after_trial(study, trial, state, values)

    def _choose_grid_point(self, study: Study, trial: FrozenTrial, grid: optuna.samplers.GridSampler) -> None:
        """Give a trial its point: the n-th that is no known one to the n-th entry that is to be drawn.

        Optuna goes by the trial's number, of which known points and trials that were never begun use up some.
        """
        if "grid_id" in trial.system_attrs or "fixed_params" in trial.system_attrs:
            return
        known, place = set(), 0
        for other in study.get_trials(deepcopy=False):
            if ROOT in other.user_attrs or VOID in other.user_attrs:
                continue
            if "fixed_params" in other.system_attrs:
                known.add(self._identify(other.system_attrs["fixed_params"]))
            else:
                place += other.number < trial.number
        left = [i for point, i in self._grid_points.items() if point not in known] or list(self._grid_points.values())
        storage, key = study._storage, trial._trial_id
        storage.set_trial_system_attr(key, "search_space", grid._search_space)
        storage.set_trial_system_attr(key, "grid_id", left[place % len(left)])

    def _identify(self, plain: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
        """What makes a point another one: the values that are asked for."""
        return frozenset(self._space.asked(plain).items())

    def _take(self, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0] >> 1)
        if self._name == "qmc":
            # All trials are points of one quasi-random sequence, which the seed names; the rest is drawn for each.
            self._arguments["independent_sampler"] = optuna.samplers.RandomSampler(seed)
            self._inner = self._make(self._seed)
        else:
            self._inner = self._make(seed)

    def _make(self, seed: int) -> BaseSampler:
        try:
            return self._build(**self._arguments, seed=seed)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"sampler {self._name}: {error}") from None


def build_pruner(name: str, arguments: Mapping[str, Any]) -> BasePruner:
    """One of :data:`PRUNERS`; ``patient`` takes another one as ``wrapped``: a name, or a mapping with ``name``.

    Raises:
        ConfigError: There is no such pruner or argument.
    """
    build = _find("pruner", name, PRUNERS)
    arguments = dict(arguments)
    wrapped = arguments.pop("wrapped", None) if name == "patient" else None
    _check_arguments("pruner", name, build, arguments, *(["wrapped"] if name == "patient" else []))
    if wrapped is not None:
        wrapped = {"name": wrapped} if isinstance(wrapped, str) else dict(wrapped)
        arguments["wrapped_pruner"] = build_pruner(wrapped.pop("name", ""), wrapped)
    elif name == "patient":
        arguments["wrapped_pruner"] = None
    try:
        return build(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pruner {name}: {error}") from None


def _find(kind: str, name: str, known: Mapping[str, Part]) -> Part:
    if name not in known:
        raise ConfigError(f"{kind}: {name!r} is none{did_you_mean(name, known)}; there are {', '.join(known)}")
    return known[name]


def _check_arguments(kind: str, name: str, build: Callable[..., Any], arguments: Mapping[str, Any], *more: str) -> None:
    known = [key for key in inspect.signature(build).parameters if key not in _NOT_IN_A_FILE] + list(more)
    for key in arguments:
        if key not in known:
            listed = ", ".join(known) or "nothing"
            raise ConfigError(f"{kind} {name} has no argument {key!r}{did_you_mean(key, known)}; it takes {listed}")


def _grid(space: Space) -> dict[str, list[Any]]:
    values = {parameter.key: parameter.grid() for parameter in space.parameters}
    endless = [key for key, found in values.items() if found is None]
    if endless:
        raise ConfigError(
            f"sampler grid: there is no end to the values of {', '.join(endless)}: give a (longer) step, or choices"
        )
    number = math.prod(len(found) for found in values.values() if found is not None)
    if number > _MOST_GRID_POINTS:
        raise ConfigError(f"sampler grid: {number} points are more than the {_MOST_GRID_POINTS} that can be walked")
    return {key: found for key, found in values.items() if found is not None}

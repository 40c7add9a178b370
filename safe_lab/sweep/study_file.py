"""The YAML schema of a study: what is searched, by what, and for what."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from safe_lab import config as configuration
from safe_lab.config import Config, Count, Positive, Seeds, Share
from safe_lab.figures import FORECAST, check_figure, format_figure, parse_amount
from safe_lab.section import ConfigError, Section, check, override_all, override_copy, read_tree
from safe_lab.sweep.space import Parameter, ParameterSection, Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

    from safe_lab.sweep.search import SamplerOfStudy

# Where runs go is the study's own business, and what they draw is `seeds`.
_NOT_SEARCHED = ("name", "variant", "output_dir", "seed", "tracking")
_CONSTRAINT = re.compile(r"\s*([\w/]+)\s*(<=|>=)\s*(\S.*?)\s*")
_PROBES = 200
_VARIANT = "trial-{number:04d}"


class PartSection(Section):
    """A sampler or pruner of Optuna."""

    model_config = Section.model_config | {"extra": "allow"}

    name: str = Field(description="which")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """What its constructor is given."""
        return dict(self.model_extra or {})


class StudySection(Section):
    """A study file."""

    name: str = Field(
        description="study; everything goes to <output_dir>/<name>, and runs of trial 3 to trial-0003 in it"
    )
    base: dict[str, Any] | str = Field(
        description="settings that all trials share, or path of a run's YAML, relative to this file"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="dotted key -> value, for all trials instead of what the base says"
    )
    space: Annotated[dict[str, ParameterSection], Field(min_length=1)] = Field(
        description="dotted key -> {low, high, log, step}, {choices} or a list of choices, each with `when`"
    )
    objectives: Annotated[dict[str, Literal["maximize", "minimize"]], Field(min_length=1)] = Field(
        description="figure of result.json -> maximize or minimize; several make a Pareto front"
    )
    constraints: tuple[str, ...] = Field(
        (), description="what a trial must keep to count as a solution, such as resources/memory_peak_bytes <= 6GiB"
    )
    sampler: PartSection = Field(
        PartSection(name="tpe"), description="tpe, gp, cma_es, nsga2, nsga3, qmc, random or grid, with its arguments"
    )
    sampler_seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(0, description="seed of what is proposed")
    pruner: PartSection = Field(
        PartSection(name="none"),
        description="none, median, percentile, successive_halving, hyperband, threshold, patient (wrapped: another one) or "
        "wilcoxon (over seeds), with its arguments; for one objective",
    )
    prefilter: bool = Field(
        False, description="turn away trials that will break a constraint, as replays of the study's finished runs tell"
    )
    prefilter_margin: Share = Field(
        0.05,
        description="share by which forecasts may be off, at least: a trial that breaks its bound by less is trained. Where "
        "those of earlier trials were off by more, that counts, and until two have been trained, one half",
    )
    num_trials: Count = Field(description="trials that come to an end of their own: complete, pruned or failed")
    timeout: Positive | None = Field(
        None, description="seconds after which a worker begins no more trials; null: no limit"
    )
    seeds: Seeds = Field((0,), description="each trial trains with every one of them; objectives are means over them")
    enqueue: tuple[dict[str, Any], ...] = Field(
        (), description="points that are tried first: dotted key of the space -> value; what is left out is drawn"
    )
    keep_checkpoints: bool = Field(False, description="leave the checkpoints of trials that have ended on disk")
    heartbeat: Positive = Field(
        20.0,
        description="seconds between a worker's signs of life; after three without one its trial is taken up by another",
    )

    @field_validator("name")
    @classmethod
    def _plain_folder_name(cls, name: str) -> str:
        # With room for what is made of it: <name>-front.
        return configuration.plain_folder_name(f"{name}-front").removesuffix("-front")


@dataclass(frozen=True)
class Constraint:
    """A bound on a figure: ``sign * (figure - bound) <= 0``."""

    text: str
    figure: str
    bound: float
    sign: Literal[1, -1]

    def excess(self, value: float) -> float:
        """By how much a value breaks it; 0 or less if it does not."""
        return self.sign * (value - self.bound)

    def describe_bound(self) -> str:
        """The bound, as a person reads it."""
        return f"{'at most' if self.sign > 0 else 'at least'} {format_figure(self.figure, self.bound)}"


@dataclass(frozen=True)
class StudyFile:
    """A checked study.

    Attributes:
        settings: The file, its base with the overrides in it.
        space: What is searched.
        constraints: What trials must keep.
        points: ``enqueue``, as Optuna keeps it.
        notes: What is allowed but will hardly be meant.
    """

    settings: StudySection
    space: Space
    constraints: tuple[Constraint, ...]
    points: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        return Path(self._base["output_dir"]).expanduser() / self.settings.name

    def folder_of(self, number: int) -> Path:
        """Where the runs of a trial lie."""
        return self.folder / _VARIANT.format(number=number)

    @property
    def objectives(self) -> Mapping[str, str]:
        """Direction by figure."""
        return self.settings.objectives

    def config_of(self, number: int, values: Mapping[str, Any], seed: int) -> Config:
        """Configuration of one run of a trial.

        Args:
            number: Of the trial.
            values: By dotted key of the space.
            seed: One of the seeds.

        Raises:
            ConfigError: The schema refuses this combination of values.
        """
        place = {"name": self.settings.name, "variant": _VARIANT.format(number=number), "seed": seed}
        return configuration.build(override_copy(self._base, values) | place)

    def build_sampler(self) -> SamplerOfStudy:
        """The sampler.

        Raises:
            ConfigError: There is none of that name, or an argument it does not have.
        """
        from safe_lab.sweep.search import SamplerOfStudy

        chosen = self.settings.sampler
        return SamplerOfStudy(chosen.name, chosen.arguments, self.space, self.settings.sampler_seed)

    def build_pruner(self) -> BasePruner:
        """The pruner.

        Raises:
            ConfigError: There is none of that name, or an argument it does not have.
        """
        from safe_lab.sweep.search import build_pruner

        return build_pruner(self.settings.pruner.name, self.settings.pruner.arguments)

    def definition(self) -> dict[str, Any]:
        """What must be the same for trials to belong to one study, as plain values."""
        plain = self.settings.model_dump(mode="json", include={"space", "objectives", "constraints", "seeds"})
        base = configuration.build(self._base | {"name": "any"}).model_dump(mode="json")
        # Their order is that of a trial's values.
        plain["objectives"] = [list(objective) for objective in self.objectives.items()]
        return plain | {"base": {key: value for key, value in base.items() if key not in _NOT_SEARCHED}}

    @cached_property
    def _base(self) -> dict[str, Any]:
        assert isinstance(self.settings.base, dict)
        return {"output_dir": "runs"} | self.settings.base


def load(path: str | Path, overrides: Sequence[str] = (), *, num_trials: int | None = None) -> StudyFile:
    """Read a study file, apply overrides such as ``data.path=sst2`` to its base, and check the whole.

    Args:
        path: A YAML file; see :class:`StudySection`.
        overrides: ``dotted.key=value`` of the base; the value is read as YAML.
        num_trials: Instead of the file's.

    Raises:
        ConfigError: With one line for every fault found.
    """
    path = Path(path)
    tree = read_tree(path) | ({} if num_trials is None else {"num_trials": num_trials})
    settings = check(StudySection, tree)
    base = copy.deepcopy(settings.base) if isinstance(settings.base, dict) else read_tree(path.parent / settings.base)
    base = override_copy(base, settings.settings)
    faults = override_all(base, overrides)
    faults += [
        f"{text}: the space says what {key} is"
        for text in overrides
        if (key := text.partition("=")[0]) in settings.space
    ]
    base["name"] = settings.name
    return _check(settings.model_copy(update={"base": base, "settings": {}}), faults)


def _check(settings: StudySection, faults: list[str]) -> StudyFile:
    assert isinstance(settings.base, dict)
    faults += [f"base or settings: {fault}" for fault in configuration.find_faults(settings.base)]
    if faults:
        raise ConfigError("\n".join(faults))
    config = configuration.build(settings.base)
    parameters = []
    for key, section in settings.space.items():
        parameter = Parameter(key, section, _takes_integers_alone(settings.base, key, section))
        found = _find_fault(settings.base, parameter)
        faults += [f"space.{key}: {fault}" for fault in found]
        parameters.append(parameter)
    constraints = []
    for text in settings.constraints:
        try:
            constraints.append(_parse_constraint(text, config))
        except ValueError as error:
            faults.append(f"constraints: {error}")
    for figure in settings.objectives:
        try:
            check_figure(figure, config)
        except ValueError as error:
            faults.append(f"objectives: {error}")
    if faults:
        raise ConfigError("\n".join(faults))
    space = Space(parameters)
    points = []
    for number, point in enumerate(settings.enqueue, start=1):
        plain, wrong = space.check_point(point)
        faults += [f"enqueue, point {number}: {fault}" for fault in wrong]
        if not wrong:
            faults += [
                f"enqueue, point {number}: {fault}"
                for fault in configuration.find_faults(override_copy(settings.base, point))
            ]
        points.append(plain)
    notes = _find_notes(settings, space)
    if len(points) > settings.num_trials:
        notes.append(
            f"{len(points)} points are to be tried first, and num_trials is {settings.num_trials}: the others wait"
        )
    study = StudyFile(settings, space, tuple(constraints), tuple(points), tuple(notes))
    faults += _find_faults_of_parts(study, config)
    if faults:
        raise ConfigError("\n".join(faults))
    return study


def _find_faults_of_parts(study: StudyFile, config: Config) -> list[str]:
    """What sampler, pruner and objectives have against each other."""
    settings, faults = study.settings, []
    for build in (study.build_sampler, study.build_pruner):
        try:
            build()
        except ConfigError as error:
            faults.append(str(error))
    if not faults:
        faults += _try_out(study)
    if settings.prefilter and not any(constraint.figure in FORECAST for constraint in study.constraints):
        faults.append(f"prefilter: no constraint is on a figure that can be forecast: {', '.join(FORECAST)}")
    pruner = settings.pruner.name
    if len(settings.objectives) > 1:
        if pruner != "none":
            faults.append(
                f"pruner {pruner}: there are {len(settings.objectives)} objectives, and pruning is by one alone"
            )
        if settings.sampler.name == "cma_es":
            faults.append(f"sampler cma_es: there are {len(settings.objectives)} objectives, and it knows one alone")
    elif pruner == "wilcoxon":
        # By one less than there are, as after the last nothing is left to be spared.
        smallest, wanted = 0.5 ** (len(settings.seeds) - 1), settings.pruner.arguments.get("p_threshold", 0.1)
        if len(settings.seeds) < 2:
            faults.append("pruner wilcoxon: it compares trials seed by seed, and there is one seed")
        elif isinstance(wanted, int | float) and smallest >= wanted:
            faults.append(
                f"pruner wilcoxon: with {len(settings.seeds)} seeds the smallest p it can come to is {smallest:g}, and "
                f"p_threshold is {wanted:g}: it would never prune"
            )
    elif pruner != "none":
        (objective,) = settings.objectives
        if not objective.startswith("validation"):
            faults.append(
                f"pruner {pruner}: {objective} is known when a run has ended, and pruning needs a metric of the validation split"
            )
        elif config.training.eval_every == "never":
            faults.append(f"pruner {pruner}: training.eval_every is never, and there is nothing to prune by")
    if settings.sampler.name == "grid" and not faults:
        faults += [
            f"enqueue, point {i}: a grid has no value for what it leaves out"
            for i, point in enumerate(study.points, start=1)
            if study.space.lacks(point)
        ]
        number = study.build_sampler().num_grid_points
        if number is not None and settings.num_trials > number:
            faults.append(f"num_trials is {settings.num_trials}, and the grid has {number} points")
    return faults


def _try_out(study: StudyFile) -> list[str]:
    """What sampler and pruner say of their arguments only when they are used."""
    import optuna

    directions: list[Any] = list(study.objectives.values())
    rehearsal = optuna.create_study(directions=directions, sampler=study.build_sampler(), pruner=study.build_pruner())
    try:
        for value in (0.0, 1.0, 2.0):
            trial = rehearsal.ask()
            study.space.suggest(trial)
            if len(directions) == 1:
                trial.report(value, 1)
                trial.should_prune()
            rehearsal.tell(trial, [value] * len(directions))
    except (TypeError, ValueError) as error:
        return [f"sampler {study.settings.sampler.name} or pruner {study.settings.pruner.name}: {error}"]
    return []


def _find_notes(settings: StudySection, space: Space) -> list[str]:
    """How many points of the space the schema refuses, should there be any."""
    assert isinstance(settings.base, dict)
    draw = random.Random(0)
    refused: list[str] = []
    for _ in range(_PROBES):
        values = space.draw(draw)
        refused += configuration.find_faults(override_copy(settings.base, values))[:1]
    if len(refused) == _PROBES:
        raise ConfigError(f"space: the schema refuses every point of it, such as one for: {refused[0]}")
    if not refused:
        return []
    share = len(refused) / _PROBES
    return [f"the schema refuses some {share:.0%} of the space, whose trials fail at once, such as for: {refused[0]}"]


def _takes_integers_alone(base: Mapping[str, Any], key: str, section: ParameterSection) -> bool:
    """Whether the schema refuses a number there for being no whole one."""
    if (
        section.low is None
        or section.high is None
        or any(isinstance(end, float) for end in (section.low, section.high))
    ):
        return False
    whole, between = (section.low, section.low + 0.5)
    return not _faults_at(base, key, whole) and bool(_faults_at(base, key, between))


def _find_fault(base: Mapping[str, Any], parameter: Parameter) -> list[str]:
    step = parameter.settings.step
    if parameter.is_integer and step is not None and step != int(step):
        return [f"step is {step:g}, between whole numbers"]
    if parameter.key.partition(".")[0] in _NOT_SEARCHED:
        return [
            "not for searching; what runs draw is set by `seeds`" if parameter.key == "seed" else "not for searching"
        ]
    return list(dict.fromkeys(fault for value in parameter.ends() for fault in _faults_at(base, parameter.key, value)))


def _faults_at(base: Mapping[str, Any], key: str, value: Any) -> list[str]:
    """What the schema has against a value by itself; not against what it makes together with others."""
    try:
        found = configuration.find_faults(override_copy(base, {key: value}))
    except ConfigError as error:
        return [str(error)]
    return [fault.removeprefix(f"{key}: ") for fault in found if fault.startswith((f"{key}:", f"{key}."))]


def _parse_constraint(text: str, config: Config) -> Constraint:
    match = _CONSTRAINT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r}: it reads FIGURE <= BOUND or FIGURE >= BOUND, such as resources/memory_peak_bytes <= 6GiB"
        )
    figure, relation, bound = match.groups()
    check_figure(figure, config)
    try:
        amount = parse_amount(figure, bound)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return Constraint(text.strip(), figure, amount, 1 if relation == "<=" else -1)

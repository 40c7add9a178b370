"""The YAML schema of an experiment: variants of one run, the seeds they train with, and what is held against what."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from safe_lab import config as configuration
from safe_lab.ablation.rules import Claim, Rules, check_rules
from safe_lab.config import Config, Positive, Seeds, safe_folder_name
from safe_lab.data.tasks import TASKS, metric_key
from safe_lab.figures import check_figure, differs_by_factor, direction_of
from safe_lab.run_folder import changed_keys
from safe_lab.section import ConfigError, Section, check, override_all, override_copy, read_tree
from safe_lab.statistics import Test
from safe_lab.suggest import did_you_mean

# Where runs go, and what they draw, is the experiment's own business.
_NOT_VARIED = ("name", "variant", "output_dir", "seed", "tracking")
# What a comparison shows beside the metric where the file names nothing, as far as runs have it.
FIGURES = (
    *("resources/memory_peak_bytes", "resources/memory_mean_bytes", "resources/flops", "resources/wall_seconds"),
    *("resources/cpu_seconds", "resources/joules", "frozen_share", "frozen_depth"),
    *("sharpness/effective_weight_trace", "sharpness/trace", "sharpness/top_eigenvalue"),
)

Confidence = Annotated[float, Field(gt=0.5, lt=1)]


class ClaimSection(Section):
    """A figure that someone has claimed, to be held against what comes out."""

    variant: str = Field(description="of which variant")
    figure: str = Field(description="of which figure of result.json")
    difference: float = Field(
        allow_inf_nan=False,
        description="to the baseline, of the same figure; of a cost or a curvature as a share, such as -0.25 for a quarter less",
    )
    source: str = Field(description="who says so, and where")


class ExperimentSection(Section):
    """An experiment file."""

    name: str = Field(description="experiment; its runs go to <output_dir>/<name>/<variant>/seed-<seed>")
    base: dict[str, Any] | str = Field(
        description="settings that all variants share, or path of a run's YAML, relative to this file"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="dotted key -> value, for all variants instead of what the base says"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name -> dotted key -> value; {} is the base as it is"
    )
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="dotted key -> values: each combination is a variant too, named after its values",
    )
    seeds: Seeds = Field((0,), description="each variant trains with every one; a number N is 0 to N - 1")
    baseline: str | None = Field(None, description="variant that the others are held against; null: the first")
    metric: str | None = Field(
        None,
        description="figure of result.json that says how good a run is; null: the task's main metric",
    )
    figures: tuple[str, ...] = Field(FIGURES, description="figures of result.json that are compared beside it")
    margin: Positive | None = Field(
        None,
        description="by how much of the metric a variant may be worse and still count as no worse, such as 0.01 (of a cost: a "
        "share); null: that is not asked",
    )
    claims: tuple[ClaimSection, ...] = Field(
        (), description="what a paper reports of a variant, say: shown beside what came out"
    )
    confidence: Confidence = Field(0.95, description="of intervals; 1 - confidence is what a p must stay under")
    keep_checkpoints: bool = Field(False, description="leave the checkpoints of finished runs on disk")
    test: Test = Field(
        "permutation", description="permutation (of the signs of differences), or wilcoxon (of their ranks)"
    )

    @field_validator("name")
    @classmethod
    def _plain_folder_name(cls, name: str) -> str:
        return configuration.plain_folder_name(name)

    @field_validator("variants")
    @classmethod
    def _plain_folder_names(cls, variants: dict[str, Any]) -> dict[str, Any]:
        for name in variants:
            configuration.plain_folder_name(name)
        return variants

    @field_validator("figures")
    @classmethod
    def _different(cls, figures: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(figures)) < len(figures):
            raise PydanticCustomError("option", "a figure stands twice")
        return figures


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
        settings: The file, its base with the overrides in it.
        variants: What each changes, by name, in the order of the file: dotted key -> value.
        baseline: The variant that the others are held against: the file's, or another that was chosen.
        metric: The figure that says how good a run is.
    """

    settings: ExperimentSection
    variants: Mapping[str, Mapping[str, Any]]
    baseline: str
    metric: str

    @property
    def rules(self) -> Rules:
        """How its variants are compared."""
        settings = self.settings
        return Rules(
            metric=self.metric,
            figures=tuple(figure for figure in settings.figures if figure != self.metric),
            margin=settings.margin,
            confidence=settings.confidence,
            test=settings.test,
            # They are of differences to the file's own baseline.
            claims=tuple(Claim(**claim.model_dump()) for claim in settings.claims)
            if self.baseline == self.own_baseline
            else (),
        )

    @property
    def own_baseline(self) -> str:
        """The file's baseline."""
        return self.settings.baseline or next(iter(self.variants))

    @property
    def name(self) -> str:
        """Its name."""
        return self.settings.name

    @property
    def seeds(self) -> tuple[int, ...]:
        """What every variant trains with."""
        return self.settings.seeds

    @property
    def folder(self) -> Path:
        """Where its runs lie."""
        return Path(self._base["output_dir"]).expanduser() / self.name

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of every run, all variants of a seed before the next: what is done first can be compared first."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def config_of(self, variant: str, seed: int) -> Config:
        """Configuration of one run."""
        place = {"name": self.name, "variant": variant, "seed": seed}
        return configuration.build(override_copy(self._base, self.variants[variant]) | place)

    def to_dict(self) -> dict[str, Any]:
        """The file as it was understood, its base in it, as plain values."""
        return self.settings.model_dump(mode="json")

    @cached_property
    def _base(self) -> dict[str, Any]:
        assert isinstance(self.settings.base, dict)
        return {"output_dir": "runs"} | self.settings.base


def load(path: str | Path, overrides: Sequence[str] = (), *, baseline: str | None = None) -> Experiment:
    """Read an experiment file, apply overrides such as ``data.path=sst2`` to its base, and check the whole.

    Args:
        path: A YAML file; see :class:`ExperimentSection`.
        overrides: ``dotted.key=value`` of the base, or ``name=...``; the value is read as YAML.
        baseline: Instead of the file's.

    Raises:
        ConfigError: With one line for every fault found.
    """
    path = Path(path)
    settings = check(ExperimentSection, read_tree(path))
    base = copy.deepcopy(settings.base) if isinstance(settings.base, dict) else read_tree(path.parent / settings.base)
    base = override_copy(base, settings.settings)
    base["name"] = settings.name
    of_file, of_base = _split_overrides(overrides)
    faults = [
        f"{key}: it stands in the experiment file; here fields of its base are given, and name"
        + (" (--baseline takes another)" if key == "baseline" else "")
        for key in of_file
    ]
    faults += override_all(base, of_base)
    if isinstance(base["name"], str):
        settings = settings.model_copy(update={"name": base["name"]})
    faults += [f"base or settings: {fault}" for fault in configuration.find_faults(base)]
    if faults:
        raise ConfigError("\n".join(faults))
    # What a run of the base says of itself is not for its variants.
    for key in ("variant", "seed"):
        base.pop(key, None)
    return _check(settings.model_copy(update={"base": base, "settings": {}}), baseline)


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys among them that are the experiment's own, and the overrides of its base."""
    own = ExperimentSection.model_fields.keys() - Config.model_fields.keys()
    keys = [override.partition("=")[0].partition(".")[0] for override in overrides]
    return (
        list(dict.fromkeys(key for key in keys if key in own)),
        [override for key, override in zip(keys, overrides, strict=True) if key not in own],
    )


def check_experiment(tree: Mapping[str, Any]) -> Experiment:
    """An experiment as it was understood before, and written down: its base is in it.

    Raises:
        ConfigError: It is none, or this version understands it otherwise.
    """
    settings = check(ExperimentSection, dict(tree))
    if not isinstance(settings.base, dict):
        raise ConfigError("base: of an experiment that was written down it holds settings")
    faults = configuration.find_faults(settings.base)
    if faults:
        raise ConfigError("\n".join(faults))
    return _check(settings)


def _check(settings: ExperimentSection, chosen: str | None = None) -> Experiment:
    assert isinstance(settings.base, dict)
    variants, faults = dict(settings.variants), []
    for name, values in _expand(settings.grid):
        if not name or name in variants:
            faults.append(f"grid: {values} would be called {name!r}, as another is: name it among the variants")
        variants[name] = values
    if not variants:
        raise ConfigError(
            "variants: there is none; it maps names to what they change, and grid makes one of each combination"
        )
    for name, values in variants.items():
        faults += [f"variants.{name}: {fault}" for fault in _find_faults(settings.base, values)]
    if faults:
        raise ConfigError("\n".join(faults))
    configs = {name: configuration.build(override_copy(settings.base, values)) for name, values in variants.items()}
    for (one, config), (other, another) in itertools.combinations(configs.items(), 2):
        if not changed_keys(config, another):
            faults.append(f"variants: {one} and {other} come to the same configuration")
    baseline = chosen or settings.baseline or next(iter(variants))
    if baseline not in variants:
        faults.append(
            f"baseline: {baseline!r} is no variant{did_you_mean(baseline, variants)}; there are {', '.join(variants)}"
        )
    tasks = {config.data.task for config in configs.values()}
    if len(tasks) > 1:
        faults.append(f"variants: they are of different tasks, which nothing compares: {', '.join(sorted(tasks))}")
    task = TASKS[next(iter(configs.values())).data.task]
    metric = settings.metric or metric_key(next(iter(task.validation_splits)), task.main_metric)
    named = settings.figures if settings.figures != FIGURES else ()
    for figure in dict.fromkeys((metric, *named)):
        faults += _find_faults_of_figure(figure, configs)
    own = settings.baseline or next(iter(variants))
    for claim in settings.claims:
        faults += _find_faults_of_claim(claim, variants, own, configs)
    if faults:
        raise ConfigError("\n".join(faults))
    experiment = Experiment(settings, variants, baseline, metric)
    check_rules(experiment.rules)
    return experiment


def _expand(grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A variant for each combination, named after its values: ``cka,final_threshold=0.1``."""
    for values in itertools.product(*grid.values()):
        named = [
            value if isinstance(value, str) else f"{key.rpartition('.')[2]}={value}"
            for key, value in zip(grid, values, strict=True)
        ]
        if named:
            yield safe_folder_name(",".join(named)), dict(zip(grid, values, strict=True))


def _find_faults(base: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    faults = [f"{key}: not for variants" for key in values if key.partition(".")[0] in _NOT_VARIED]
    try:
        return faults or configuration.find_faults(override_copy(base, values))
    except ConfigError as error:
        return [str(error)]


def _find_faults_of_figure(figure: str, configs: Mapping[str, Config]) -> list[str]:
    for config in configs.values():
        try:
            check_figure(figure, config)
        except ValueError as error:
            return [f"figures: {error}"]
    return []


def _find_faults_of_claim(
    claim: ClaimSection, variants: Mapping[str, object], baseline: str, configs: Mapping[str, Config]
) -> list[str]:
    if claim.variant not in variants or claim.variant == baseline:
        others = [variant for variant in variants if variant != baseline]
        hint = did_you_mean(claim.variant, others)
        return [f"claims: {claim.variant!r} is no variant that is held against {baseline}{hint}"]
    faults = [fault.replace("figures: ", "claims: ", 1) for fault in _find_faults_of_figure(claim.figure, configs)]
    if not faults and direction_of(claim.figure) == 0:
        faults.append(f"claims: {claim.figure} is neither good nor bad by itself")
    if not faults and differs_by_factor(claim.figure) and claim.difference <= -1:
        faults.append(f"claims: a cost falls by a share of itself, such as -0.25, and {claim.difference:g} is none")
    return faults

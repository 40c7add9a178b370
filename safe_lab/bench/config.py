"""The YAML schema of a bench: a base run, the variants of it that are compared, and how often each is measured."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from safe_lab import config as configuration
from safe_lab import run_folder
from safe_lab.config import Config, Count
from safe_lab.section import ConfigError, Section, check, override_all, override_copy, read_tree
from safe_lab.suggest import did_you_mean

# What of a run's configuration the baseline of transformers has a counterpart for.
_KNOWN_TO_TRANSFORMERS = ("seed", "model", "data", "adapter", "training")


class VariantSection(Section):
    """One of the trainings that are compared."""

    trainer: Literal["safe_lab", "transformers"] = Field(
        "safe_lab",
        description="safe_lab, or transformers.Trainer with PEFT, which has no freezing, savings or tracking",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="dotted key of the base -> value of this variant"
    )


class BenchSection(Section):
    """A bench file."""

    name: str = Field(description="results go to <output_dir>/bench-<name>/<time>")
    base: dict[str, Any] | str = Field(
        description="settings of the run that all variants share, or path of a run's YAML, relative to this file"
    )
    variants: Annotated[dict[str, VariantSection], Field(min_length=1)] = Field(
        description="variant by name, in the order in which they take turns"
    )
    baseline: str | None = Field(None, description="variant that ratios are taken to; null: the first")
    repetitions: Count = Field(3, description="trainings of each variant; repetition i trains with the base's seed + i")
    threads: Count | None = Field(None, description="threads a process computes with; null: as many as torch takes")
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="device of all variants; null: a GPU if there is one"
    )


@dataclass(frozen=True)
class Bench:
    """A checked bench.

    Attributes:
        settings: The bench file, its base with the overrides in it.
        configs: Configuration of each variant's run, by its name, in order.
        baseline: Name of the variant that ratios are taken to.
    """

    settings: BenchSection
    configs: Mapping[str, Config]
    baseline: str

    def config_of(self, variant: str, repetition: int, folder: Path) -> Config:
        """Configuration of one training, whose run folder is ``<folder>/runs/<variant>/seed-<n>``."""
        config = self.configs[variant]
        place = {"output_dir": str(folder), "name": "runs", "variant": variant}
        return config.model_copy(update={**place, "seed": config.seed + repetition})

    def differences(self, variant: str, old: Config, new: Config) -> list[str]:
        """Where two configurations of a variant differ; not in their place, nor in what transformers.Trainer does not know."""
        knows_all = self.settings.variants[variant].trainer == "safe_lab"
        return [
            difference
            for difference in run_folder.differences(old, new)
            if (section := re.split("[.:]", difference)[0]) not in ("output_dir", "name", "variant")
            and (knows_all or section in _KNOWN_TO_TRANSFORMERS)
        ]

    def repeats_baseline(self, variant: str) -> bool:
        """Whether a variant does the baseline's arithmetic: nothing freezes, no batch is cut, all other settings are the same."""
        pair = (variant, self.baseline)
        plain = all(
            self.settings.variants[name].trainer == "transformers" or _trains_plainly(self.configs[name])
            for name in pair
        )
        ours, theirs = (self.configs[name] for name in pair)
        # transformers.Trainer does not average over the micro-batches of a step where a model's loss does not (5.23).
        one_batch = ours.training.gradient_accumulation == 1
        return plain and one_batch and all(getattr(ours, key) == getattr(theirs, key) for key in _KNOWN_TO_TRANSFORMERS)


def load(path: str | Path, overrides: Sequence[str] = (), *, repetitions: int | None = None) -> Bench:
    """Read a bench file, apply overrides such as ``data.path=sst2`` to its base, and check every variant.

    Args:
        path: A YAML file; see :class:`BenchSection`.
        overrides: ``dotted.key=value`` of the base; the value is read as YAML.
        repetitions: Instead of the file's.

    Raises:
        ConfigError: With one line for every fault found.
    """
    path = Path(path)
    settings = check(BenchSection, read_tree(path) | ({} if repetitions is None else {"repetitions": repetitions}))
    base = copy.deepcopy(settings.base) if isinstance(settings.base, dict) else read_tree(path.parent / settings.base)
    base.setdefault("name", settings.name)
    faults = override_all(base, overrides)
    # What the variants compare is training: trackers are measured only where they are asked for.
    if isinstance(base.setdefault("tracking", {}), dict):
        base["tracking"].setdefault("wandb", "disabled")
    in_base = configuration.find_faults(base)
    faults += [f"base.{fault}" for fault in in_base]
    configs: dict[str, Config] = {}
    for name, variant in settings.variants.items():
        try:
            tree = override_copy(base, variant.overrides) | {"variant": name}
            found = [fault for fault in configuration.find_faults(tree) if fault not in in_base] + _without_effect(
                variant, tree
            )
        except ConfigError as fault:
            found = [f"overrides.{fault}"]
        faults += [f"variants.{name}: {fault}" for fault in found]
        if not faults:
            configs[name] = configuration.build(tree)
    baseline = settings.baseline or next(iter(settings.variants))
    if baseline not in settings.variants:
        near = did_you_mean(baseline, settings.variants)
        faults.append(f"baseline: {baseline!r} is no variant{near}; there are {', '.join(settings.variants)}")
    if faults:
        raise ConfigError("\n".join(faults))
    return Bench(settings.model_copy(update={"base": base}), configs, baseline)


def _trains_plainly(config: Config) -> bool:
    return config.freezing.policy == "none" and config.memory.budget is None and config.savings.trim_padding is None


def _without_effect(variant: VariantSection, tree: Mapping[str, Any]) -> list[str]:
    """What a variant of transformers asks for, and transformers.Trainer does not have."""
    if variant.trainer == "safe_lab":
        return []
    found = [
        f"overrides.{key}: transformers.Trainer has no {key.partition('.')[0]}; "
        f"it knows {', '.join(_KNOWN_TO_TRANSFORMERS)}"
        for key in variant.overrides
        if key.partition(".")[0] not in _KNOWN_TO_TRANSFORMERS
    ]
    if (tree.get("training") or {}).get("early_stopping") is not None:
        found.append("training.early_stopping: not among what the baseline of transformers does; null is")
    return found

"""What a report is about: runs, an experiment, or several, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safe_lab import ablation, yaml_core
from safe_lab.ablation import Comparison, Experiment, Rules
from safe_lab.ablation.experiment_file import FIGURES, check_experiment
from safe_lab.ablation.records import Record, find_change, find_runs, read_experiment, read_failures, read_record
from safe_lab.section import ConfigError
from safe_lab.suggest import did_you_mean

_EXPERIMENT = "experiment.yaml"


@dataclass(frozen=True)
class Source:
    """What a report is about.

    Attributes:
        name: Of the experiment, or the folders.
        records: The runs, missing ones among them where an experiment says which there should be.
        comparison: Of their variants.
        command: What makes them again.
    """

    name: str
    records: Sequence[Record]
    comparison: Comparison
    command: str


def read_source(
    paths: Sequence[Path], *, baseline: str | None = None, metric: str | None = None, margin: float | None = None
) -> Source:
    """Read run folders, or the folder or file of an experiment.

    Args:
        paths: Run folders, folders above them, or one experiment's folder or YAML file.
        baseline: Variant that the others are held against, instead of the experiment's, or of the first.
        metric: Figure that says how good a run is, instead of the experiment's or the task's own.
        margin: Of non-inferiority, instead of the experiment's.

    Raises:
        ConfigError: There are no runs, they are of different tasks, or there is no such variant or figure.
    """
    experiment, folder = _find_experiment(paths)
    if experiment is not None:
        records: list[Record] = read_experiment(experiment, read_failures(folder or experiment.folder), folder)
        name, command = experiment.name, f"safe-lab ablate {paths[0] if paths[0].is_file() else paths[0] / _EXPERIMENT}"
        rules = experiment.rules
        if baseline not in (None, experiment.baseline):
            # What is claimed is of differences to the experiment's own.
            rules = replace(rules, claims=())
        baseline = baseline or experiment.baseline
    else:
        records = _name_apart([read_record(path) for path in find_runs(paths)])
        name = ", ".join(dict.fromkeys(record.path.parents[1].name for record in records))
        command = "safe-lab train " + " ".join(str(record.path / "config.yaml") for record in records[:1])
        main = next((record.result["main_metric"] for record in records if not record.fault), None)
        rules = Rules(main or "validation/loss", FIGURES)
    _check_one_task(records)
    _check_alike(records)
    variants = list(dict.fromkeys(record.variant for record in records))
    chosen = baseline or ("none" if "none" in variants else variants[0])
    if chosen not in variants:
        raise ConfigError(f"{chosen!r} is no variant{did_you_mean(chosen, variants)}; there are {', '.join(variants)}")
    if metric is not None and metric != rules.metric:
        # A margin is of one metric.
        rules = replace(rules, metric=metric, figures=(rules.metric, *rules.figures), margin=None)
    figures = tuple(figure for figure in rules.figures if figure != rules.metric)
    rules = replace(rules, figures=figures, margin=margin or rules.margin)
    there = [record for record in records if not record.fault]
    if there and all(record.figure(rules.metric) is None for record in there):
        raise ConfigError(f"{rules.metric!r}: no run has this figure")
    return Source(name, records, ablation.compare(records, rules, chosen), command)


def _find_experiment(paths: Sequence[Path]) -> tuple[Experiment | None, Path | None]:
    """The experiment that paths are of, and where it lies, if that is not where it says."""
    if len(paths) != 1:
        return None, None
    path = paths[0]
    if path.is_file():
        return ablation.load(path), None
    written = path / _EXPERIMENT
    if not written.is_file():
        return None, None
    try:
        return check_experiment(yaml_core.parse(written.read_text(encoding="utf-8"))), path.resolve()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{written}: it is damaged, or of another version ({error}); its runs can be reported without it"
        ) from None


def _name_apart(records: Sequence[Record]) -> list[Record]:
    """With the experiment in the name of a variant, where they are of several: a variant of each by itself."""
    experiments = {record.path.parents[1] for record in records}
    if len(experiments) == 1:
        return list(records)
    named = [replace(record, variant=f"{record.path.parents[1].name}/{record.variant}") for record in records]
    if len({(record.variant, record.seed) for record in named}) < len(named):
        raise ConfigError("two runs are of one experiment, variant and seed; give reports of them apart")
    return named


def _check_alike(records: Sequence[Record]) -> None:
    """Whether the runs of a variant differ in nothing but their seed."""
    first: dict[str, Record] = {}
    for record in records:
        if record.config is None or record.fault:
            continue
        before = first.setdefault(record.variant, record)
        change = find_change(before.path, record.config)
        if change:
            raise ConfigError(
                f"{record.path} and {before.path} are runs of one variant, and differ: {change.partition(': ')[2]}"
            )


def _check_one_task(records: Sequence[Record]) -> None:
    tasks = {record.config.data.task: record for record in records if record.config is not None}
    if len(tasks) > 1:
        listed = "; ".join(f"{task} in {record.path}" for task, record in tasks.items())
        raise ConfigError(f"runs of different tasks do not compare: {listed}")

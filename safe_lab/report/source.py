"""What a report is about: runs, an experiment, or several, read from their folders."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safe_lab import ablation, yaml_core
from safe_lab.ablation import Comparison, Experiment, Rules
from safe_lab.ablation.experiment_file import FIGURES, check_experiment
from safe_lab.ablation.records import Record, find_change, find_runs, read_experiment, read_failures, read_record
from safe_lab.ablation.rules import check_rules
from safe_lab.figures import check_figure
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
        commands: What makes them again, from the folder that the report was made in.
    """

    name: str
    records: Sequence[Record]
    comparison: Comparison
    commands: Sequence[str]


@dataclass(frozen=True)
class _Part:
    """An experiment, or a run folder that is of none."""

    path: Path
    records: Sequence[Record]
    experiment: Experiment | None = None


def read_source(
    paths: Sequence[Path],
    *,
    baseline: str | None = None,
    metric: str | None = None,
    figures: Sequence[str] | None = None,
    margin: float | None = None,
) -> Source:
    """Read run folders, or the folders or files of experiments.

    Args:
        paths: Run folders, folders of experiments, their YAML files, or folders above them.
        baseline: Variant that the others are held against, instead of the experiment's, or of the first.
        metric: Figure that says how good a run is, instead of the experiment's or the task's own.
        figures: Those that are compared beside it, instead of the experiment's or all that runs have.
        margin: Of non-inferiority, instead of the experiment's.

    Raises:
        ConfigError: There are no runs, they are of different tasks, or there is no such variant or figure.
    """
    parts = _without_repeats([part for path in paths for part in _read_parts(path)])
    experiment = parts[0].experiment if len(parts) == 1 else None
    records = list(parts[0].records) if experiment is not None else _name_apart(parts)
    _check_one_task(records)
    _check_alike(records)
    variants = list(dict.fromkeys(record.variant for record in records))
    if experiment is not None:
        rules, own = experiment.rules, experiment.baseline
    else:
        main = next((record.result["main_metric"] for record in records if not record.fault), None)
        rules, own = Rules(main or "validation/loss", FIGURES), "none" if "none" in variants else variants[0]
    chosen = baseline or own
    if chosen not in variants:
        raise ConfigError(f"{chosen!r} is no variant{did_you_mean(chosen, variants)}; there are {', '.join(variants)}")
    if chosen != own:
        # What is claimed is of differences to the experiment's own.
        rules = replace(rules, claims=())
    if metric is not None and metric != rules.metric:
        _check_figure(metric, records)
        # A margin is of one metric.
        rules = replace(rules, metric=metric, figures=(rules.metric, *rules.figures), margin=None)
    for figure in figures or ():
        _check_figure(figure, records)
    beside = tuple(figure for figure in dict.fromkeys(figures or rules.figures) if figure != rules.metric)
    rules = replace(rules, figures=beside, margin=rules.margin if margin is None else margin)
    check_rules(rules)
    names = [experiment.name] if experiment is not None else [_home(part).name for part in parts]
    again = {
        "--baseline": baseline,
        "--metric": metric,
        "--figures": ",".join(figures) if figures else None,
        "--margin": margin,
    }
    options = [text for option, value in again.items() if value is not None for text in (option, str(value))]
    report = shlex.join(["safe-lab", "report", *map(str, paths), *options, "--output", "report.html"])
    return Source(
        ", ".join(dict.fromkeys(names)),
        records,
        ablation.compare(records, rules, chosen),
        [*map(_command, parts), report],
    )


def _read_parts(path: Path) -> Iterator[_Part]:
    """The experiments at or below a path, and the runs there that are of none."""
    if path.is_file():
        experiment = ablation.load(path)
        yield _Part(path, read_experiment(experiment, read_failures(experiment.folder)), experiment)
        return
    if (path / _EXPERIMENT).is_file():
        yield _read_experiment_folder(path)
        return
    experiments = []
    for file in sorted(path.glob(f"**/{_EXPERIMENT}")):
        # One of another version: its runs stand by themselves.
        with suppress(ConfigError):
            yield _read_experiment_folder(file.parent)
            experiments.append(file.parent.resolve())
    try:
        runs = find_runs([path])
    except ConfigError:
        if not experiments:
            raise
        return
    for run in runs:
        if not any(run.is_relative_to(folder) for folder in experiments):
            yield _Part(run, [read_record(run)])


def _read_experiment_folder(folder: Path) -> _Part:
    experiment = _read_experiment_file(folder / _EXPERIMENT)
    return _Part(folder, read_experiment(experiment, read_failures(folder), folder.resolve()), experiment)


def _without_repeats(parts: Sequence[_Part]) -> list[_Part]:
    """Each run once, whichever ways lead to it: a file and a folder, a link."""
    seen: set[Path] = set()
    kept = []
    for part in parts:
        places = [record.path.resolve() for record in part.records]
        records = [record for record, place in zip(part.records, places, strict=True) if place not in seen]
        seen.update(places)
        if records:
            kept.append(replace(part, records=records))
    return kept


def _read_experiment_file(path: Path) -> Experiment:
    try:
        return check_experiment(yaml_core.parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: it is damaged, or of another version ({error}); its runs can be reported without it"
        ) from None


def _command(part: _Part) -> str:
    if part.experiment is None:
        # Elsewhere: here it has finished.
        return shlex.join(["safe-lab", "train", str(part.path / "config.yaml"), "output_dir=again"])
    file = part.path if part.path.is_file() else part.path / _EXPERIMENT
    return shlex.join(["safe-lab", "ablate", str(file)])


def _home(part: _Part) -> Path:
    """The folder of an experiment, by whose name a part is told: for a run, the one that its variant lies in."""
    # Not that of a link's target.
    return part.records[0].path.parents[1].resolve()


def _name_apart(parts: Sequence[_Part]) -> list[Record]:
    """All runs, with the experiment in the name of a variant where they are of several: a variant of each by itself.

    Raises:
        ConfigError: Two are of one experiment, variant and seed.
    """
    several = len({_home(part) for part in parts}) > 1
    records: dict[tuple[str, int], Record] = {}
    for part in parts:
        for record in part.records:
            variant = f"{_home(part).name}/{record.variant}" if several else record.variant
            seed = record.seed
            # Of those whose configuration cannot be read nobody knows the seed.
            while record.config is None and (variant, seed) in records:
                seed = min(seed, 0) - 1
            before = records.get((variant, seed))
            if before is not None:
                raise ConfigError(
                    f"{before.path} and {record.path} are both of variant {variant} and seed {seed}; report one of them"
                )
            records[variant, seed] = replace(record, variant=variant, seed=seed)
    return list(records.values())


def _check_figure(figure: str, records: Sequence[Record]) -> None:
    """Whether some run has a figure, other than of a test split.

    Raises:
        ConfigError: None has.
    """
    there = [record for record in records if not record.fault]
    has_it = any(record.figure(figure) is not None for record in there)
    if has_it and not figure.startswith("test"):
        return
    config = next((record.config for record in records if record.config is not None), None)
    try:
        if config is not None:
            check_figure(figure, config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if there:
        raise ConfigError(f"{figure!r}: no run has this figure")


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

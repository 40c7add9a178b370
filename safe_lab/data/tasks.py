"""The tasks: what is read, what is predicted, and how it is measured. A new task is one entry of :data:`TASKS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

# The labels of the built-in data set, ``docstrings``.
LIBRARIES = ("networkx", "pandas", "scipy", "sqlalchemy", "sympy", "transformers")
_ONE_VALIDATION = MappingProxyType({"validation": "validation"})


@dataclass(frozen=True)
class Task:
    """A sentence or sentence-pair task.

    Attributes:
        name: What ``data.task`` calls it.
        kind: Labels are classes, or numbers.
        text_column: Column of the (first) text.
        text_pair_column: Column of the second text, None where there is one text.
        label_column: Column of the label.
        labels: Names in the order of their ids; None: read from the data, or regression.
        metrics: Names known to :func:`safe_lab.data.metrics.compute_metrics`.
        main_metric: The one of them that decides which model is better; higher is better for all.
        hub_id: Where it is on the Hugging Face hub; None: it needs ``data.path``, or is built in.
        hub_config: Configuration at the hub.
        validation_splits: Our name of each validation split -> its name in the source.
    """

    name: str
    kind: Literal["classification", "regression"]
    text_column: str
    text_pair_column: str | None
    label_column: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str
    hub_id: str | None = None
    hub_config: str | None = None
    validation_splits: Mapping[str, str] = field(default_factory=lambda: _ONE_VALIDATION)


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    validation_splits: Mapping[str, str] = _ONE_VALIDATION,
) -> Task:
    """A GLUE task (Wang et al., ICLR 2019); its first metric is the main one."""
    return Task(
        name=name,
        kind="regression" if labels is None else "classification",
        text_column=columns[0],
        text_pair_column=columns[1] if len(columns) == 2 else None,
        label_column="label",
        labels=labels,
        metrics=metrics,
        main_metric=metrics[0],
        hub_id="nyu-mll/glue",
        hub_config=name,
        validation_splits=validation_splits,
    )


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_SPLITS = MappingProxyType({"matched": "validation_matched", "mismatched": "validation_mismatched"})

_ALL = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
    _glue("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    # GLUE reports F1 and accuracy of MRPC and QQP side by side. F1 is the main one here: their classes are unbalanced.
    _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    _glue("stsb", _PAIR, None, ("pearson", "spearman")),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), _MNLI_SPLITS),
    _glue("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    _glue("rte", _PAIR, _ENTAILMENT, ("accuracy",)),
    _glue("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    Task("classification", "classification", "text", None, "label", None, ("accuracy", "macro_f1"), "accuracy"),
    Task("regression", "regression", "text", None, "label", None, ("pearson", "spearman"), "pearson"),
    Task("docstrings", "classification", "text", None, "label", LIBRARIES, ("accuracy", "macro_f1"), "accuracy"),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


def metric_key(split: str, metric: str) -> str:
    """The key of a metric: ``validation/accuracy``, and ``validation_matched/accuracy`` where there are several splits.

    >>> metric_key("validation", "f1"), metric_key("matched", "accuracy")
    ('validation/f1', 'validation_matched/accuracy')
    """
    return f"{split if split == 'validation' else f'validation_{split}'}/{metric}"

"""Data: from a task's name and a source to tokenised splits, their batches and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safe_lab.data.encode import encode, name_value, read_texts
from safe_lab.data.metrics import compute_metrics
from safe_lab.data.sources import TEST, TRAIN, load_splits, read_label_names
from safe_lab.data.tasks import TASKS, Task
from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from safe_lab.data.batches import Collator, EpochBatchSampler

__all__ = ["TASKS", "Collator", "Data", "EpochBatchSampler", "Task", "compute_metrics", "load_data", "read_splits"]


def __getattr__(name: str) -> Any:
    # Batches need torch, which the configuration must not wait for when it reads TASKS.
    if name in ("Collator", "EpochBatchSampler"):
        from safe_lab.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    Attributes:
        task: With the columns in use.
        train: Tokenised; columns as :func:`safe_lab.data.encode.encode` makes them.
        validation: Tokenised, by name of the validation split.
        labels: Names in the order of their ids; empty for regression.
        num_truncated: Rows longer than ``max_length``, by split.
        baselines: Validation accuracy without a language model, by name; of ``docstrings`` only.
    """

    task: Task
    train: datasets.Dataset
    validation: dict[str, datasets.Dataset]
    labels: tuple[str, ...]
    num_truncated: dict[str, int]
    baselines: dict[str, float]


def load_data(
    *,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int = 128,
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
) -> Data:
    """Read, check and tokenise the splits of a task. Test splits are left alone.

    Args:
        task: A name of :data:`TASKS`.
        tokenizer: Of the model.
        path: See :func:`safe_lab.data.sources.load_splits`.
        text_column: Column of the (first) text; None: the task's own. Likewise the other columns.
        text_pair_column: Column of the second text.
        label_column: Column of the label.
        labels: Names in the order of their ids. None: the task's, else ``labels.json``, else the features of a
            ``datasets`` folder, else the different values in train, sorted.
        max_length: Longest row in tokens.
        max_train_samples: Size of a random subset of train; None: all.
        max_validation_samples: The same of each validation split.
        validation_share: Held out of train where there is no validation split.
        seed: Of what is drawn.

    Raises:
        ValueError: Anything in the arguments or the data that the user can mend.
        FileNotFoundError: There is no such file, folder or train split.
        ConnectionError: The hub cannot be reached.
    """
    columns = (text_column, text_pair_column, label_column)
    spec, raw, names = read_splits(task, path, columns, labels, validation_share, seed)
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length is {max_length}, and the tokenizer's model takes {tokenizer.model_max_length}"
        )
    encoded: dict[str, datasets.Dataset] = {}
    num_truncated: dict[str, int] = {}
    for split, dataset in raw.items():
        size = max_train_samples if split == TRAIN else max_validation_samples
        raw[split] = _draw(dataset, size, seed)
        encoded[split], num_truncated[split] = encode(
            raw[split],
            tokenizer,
            split=split,
            text_column=spec.text_column,
            text_pair_column=spec.text_pair_column,
            label_column=spec.label_column,
            labels=names,
            max_length=max_length,
        )
    reference = {}
    if task == "docstrings" and path is None:
        from safe_lab.data.docstrings import baselines

        train_texts, validation_texts = (read_texts(raw[split], "text", split) for split in (TRAIN, "validation"))
        reference = baselines(train_texts, encoded[TRAIN]["labels"], validation_texts, encoded["validation"]["labels"])
    train = encoded.pop(TRAIN)
    return Data(spec, train, encoded, names or (), num_truncated, reference)


def read_splits(
    task: str,
    path: str | None,
    columns: tuple[str | None, str | None, str | None],
    labels: Sequence[str] | None,
    validation_share: float | None,
    seed: int,
) -> tuple[Task, dict[str, datasets.Dataset], tuple[str, ...] | None]:
    """The task with its columns, the rows of each split but test, and the labels' names (None for numbers).

    Args:
        task: As for :func:`load_data`, like the others.
        path: Of the data.
        columns: Of text, second text and label.
        labels: Names.
        validation_share: Held out where there is no validation split; None: nothing is, and there is none then.
        seed: Of what is drawn.

    Raises:
        ValueError: Anything in the arguments or the data that the user can mend.
        FileNotFoundError: There is no such file, folder or train split.
        ConnectionError: The hub cannot be reached.
    """
    if task not in TASKS:
        raise ValueError(f"data.task={task!r} is not known{did_you_mean(task, TASKS)}; known are {', '.join(TASKS)}")
    known, (text, pair, label) = TASKS[task], columns
    spec = replace(
        known,
        text_column=text or known.text_column,
        text_pair_column=pair or known.text_pair_column,
        label_column=label or known.label_column,
    )
    raw = load_splits(path, spec, label_column=spec.label_column, validation_share=validation_share, seed=seed)
    raw.pop(TEST, None)
    for split, dataset in raw.items():
        _check_columns(dataset, spec, split)
    return spec, raw, None if spec.kind == "regression" else _find_labels(labels, spec, path, raw[TRAIN])


def _check_columns(dataset: datasets.Dataset, task: Task, split: str) -> None:
    keys = {
        "text_column": task.text_column,
        "text_pair_column": task.text_pair_column,
        "label_column": task.label_column,
    }
    there = dataset.column_names
    for key, column in keys.items():
        if column is not None and column not in there:
            raise ValueError(
                f"data.{key}: split {split} has no column {column!r}{did_you_mean(column, there)}; "
                f"its columns are {', '.join(there) or 'none'}"
            )


def _find_labels(given: Sequence[str] | None, task: Task, path: str | None, train: datasets.Dataset) -> tuple[str, ...]:
    """Names of the labels, from the first source that has them."""
    own = read_label_names(path) or getattr(train.features[task.label_column], "names", None)
    if given and task.labels and len(given) != len(task.labels):
        raise ValueError(f"data.labels: task {task.name} has {len(task.labels)} labels, got {len(given)}")
    if task.labels and own and set(own) == set(task.labels) and tuple(own) != task.labels:
        raise ValueError(
            f"the data numbers its labels {', '.join(own)}, and task {task.name} {', '.join(task.labels)}: "
            "give labels as names, or use task classification"
        )
    names = given or task.labels or own or _name_values(train[task.label_column])
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(f"data.labels: a classification needs two or more different labels, got {list(names)}")
    return tuple(names)


def _name_values(values: Sequence[Any]) -> list[str]:
    """Names for labels that come without: ids 0 to n - 1 are named by their number, other values by themselves, sorted."""
    different = {name_value(value) for value in values if value is not None and value == value and value != ""}
    if len(different) > max(100, len(values) // 2):
        raise ValueError(
            f"data.label_column: {len(different)} different labels in {len(values)} rows: another column, or task regression?"
        )
    ids = [str(index) for index in range(len(different))]
    if different == set(ids):
        return ids
    return sorted(
        different,
        key=lambda name: (not name.lstrip("-").isdecimal(), int(name) if name.lstrip("-").isdecimal() else 0, name),
    )


def _draw(dataset: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """A random subset in the order of the rows; all of them if there are no more."""
    import numpy as np

    if size is None or size >= len(dataset):
        return dataset
    drawn = np.random.default_rng(seed).choice(len(dataset), size=size, replace=False)
    return dataset.select(sorted(drawn.tolist()))

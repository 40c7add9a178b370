"""From texts and labels to token ids: columns are checked row by row, labels become ids or numbers, texts are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def encode(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    text_column: str,
    text_pair_column: str | None,
    label_column: str,
    labels: Sequence[str] | None,
    max_length: int,
) -> tuple[datasets.Dataset, int]:
    """Tokenise a split.

    Args:
        dataset: The raw columns.
        tokenizer: Of the model.
        split: Name of the split, for messages.
        text_column: Column of the (first) text.
        text_pair_column: Column of the second text, or None.
        label_column: Column of the label.
        labels: Names in the order of their ids; None: labels are numbers (regression).
        max_length: Longest row in tokens. Of a pair the longer text is cut first.

    Returns:
        Rows of ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer makes them, ``labels`` and
        ``length`` (in tokens); and how many rows were longer than ``max_length``.

    Raises:
        ValueError: A text or label is missing or of the wrong kind, or a label is not known; split, row and value are
            named.
    """
    from datasets import Dataset

    texts = read_texts(dataset, text_column, split)
    pairs = None if text_pair_column is None else read_texts(dataset, text_pair_column, split)
    values = list(dataset[label_column])
    targets: Sequence[int | float]
    if labels is None:
        targets = [_to_number(value, label_column, split, row) for row, value in enumerate(values)]
    else:
        ids = {name: index for index, name in enumerate(labels)}
        targets = [_to_id(value, ids, label_column, split, row) for row, value in enumerate(values)]

    # The tokenizer is asked twice, because truncation leaves no count of what it cut. Without tensors this is cheap.
    lengths = [len(ids) for ids in tokenizer(texts, pairs, truncation=False, verbose=False)["input_ids"]]
    tokens = tokenizer(texts, pairs, truncation="longest_first", max_length=max_length, return_attention_mask=True)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokens]
    columns: dict[str, Any] = {name: tokens[name] for name in names}
    columns["labels"] = targets
    columns["length"] = [len(ids) for ids in tokens["input_ids"]]
    return Dataset.from_dict(columns), sum(length > max_length for length in lengths)


def read_texts(dataset: datasets.Dataset, column: str, split: str) -> list[str]:
    """The texts of a column, each of them a string."""
    texts = list(dataset[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            found = "missing (null)" if text is None else f"a {type(text).__name__}, {text!r}"
            raise ValueError(f"split {split}, row {row}, column {column!r}: expected a text, and it is {found}")
    return texts


def name_value(value: Any) -> str:
    """A label's value as a name: a whole number without its decimal point, anything else as it prints."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _to_id(value: Any, ids: dict[str, int], column: str, split: str, row: int) -> int:
    place = f"split {split}, row {row}, column {column!r}"
    if _is_missing(value):
        raise ValueError(f"{place}: the label is missing (null, NaN or empty)")
    # A name wins over an id: with the labels ("1", "2") both 1 and "1" are the name of label 0.
    if name_value(value) in ids:
        return ids[name_value(value)]
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError):
        known = ", ".join(list(ids)[:20]) + (", ..." if len(ids) > 20 else "")
        raise ValueError(
            f"{place}: unknown label {value!r}, known are {known}{did_you_mean(str(value), ids)}"
        ) from None
    if index != float(value) or not 0 <= index < len(ids):
        hidden = ": -1 marks a label that is not public" if index == -1 else ""
        raise ValueError(f"{place}: label {value!r} is out of range, ids go from 0 to {len(ids) - 1}{hidden}")
    return index


def _to_number(value: Any, column: str, split: str, row: int) -> float:
    place = f"split {split}, row {row}, column {column!r}"
    if _is_missing(value):
        raise ValueError(f"{place}: the label is missing (null, NaN or empty)")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}: regression needs a finite number, got {value!r}")
    return number

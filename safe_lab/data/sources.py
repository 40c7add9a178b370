"""From a path or hub id to raw columns by split. Nothing is written beside the user's files.

Formats, by ending (``.gz`` may follow the text ones):

- ``.jsonl``, ``.json``: one JSON object a line; ``.json`` may also be one list of objects.
- ``.csv``: quoting as in RFC 4180 (``"`` around a field, ``""`` for a quote in it), so fields may hold line breaks.
- ``.tsv``: no quoting at all, as in GLUE's files, whose texts hold unbalanced quotes: a tab ends a field, a line break
  a row.
- ``.parquet``.

CSV and TSV cells stay the strings they are, "NA", "null" and "01" included. The first line names the columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_lab.data.tasks import Task
from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    import datasets

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
LABELS_FILE = "labels.json"
TRAIN, TEST = "train", "test"
# The hub names the parts of a large split train-00000-of-00004.
_SHARD = re.compile(r"-\d+-of-\d+$")
_VALIDATION_NAMES = ("validation", "dev", "valid", "val")


def load_splits(
    path: str | None, task: Task, *, label_column: str, validation_share: float | None, seed: int
) -> dict[str, datasets.Dataset]:
    """Read the splits of a task.

    Args:
        path: A file, a folder with ``train.*`` and validation files (``validation``, ``dev``, ``valid`` or ``val``; for
            MNLI with ``_matched`` and ``_mismatched``), a folder saved by ``datasets``, or a hub id. None: the task's
            own source.
        task: Names its hub id and its validation splits.
        label_column: Held-out examples are drawn evenly from its values (classification).
        validation_share: Share of train that is held out where there is no validation split; None: nothing is.
        seed: Of that draw.

    Returns:
        ``train``, the validation splits by the task's names, and ``test`` where a local source has one.

    Raises:
        FileNotFoundError: There is no such file or folder, or no train split in it.
        ValueError: A file is cut or malformed, a split is empty, or the task has no source of its own.
        ConnectionError: The hub cannot be reached.
    """
    if task.name == "docstrings" and path is None:
        from safe_lab.data.docstrings import load_docstrings

        return load_docstrings()
    if path is not None and _is_local(path):
        found = _read_local(Path(path).expanduser())
    else:
        found = _read_hub(path or task.hub_id, task)
    splits = _name_splits(found, task, path or str(task.hub_id))
    for split, dataset in splits.items():
        if not len(dataset):
            raise ValueError(f"data.path={path}: split {split} is empty")
    if set(splits) <= {TRAIN, TEST}:
        if len(splits[TRAIN]) < 2:
            raise ValueError("split train has 1 row, of which none can be held out for validation")
        if validation_share is None:
            return splits
        train, held_out = _hold_out(splits[TRAIN], task, label_column, validation_share, seed)
        splits = {TRAIN: train, "validation": held_out} | {k: v for k, v in splits.items() if k == TEST}
    return splits


def read_label_names(path: str | None) -> tuple[str, ...] | None:
    """Names of the labels in the order of their ids, from ``labels.json`` in the folder or beside the file ``path``.

    Raises:
        ValueError: The file is not a list of different names.
    """
    if path is None:
        return None
    place = Path(path).expanduser()
    file = (place if place.is_dir() else place.parent) / LABELS_FILE
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{file}: expected a list of different label names in the order of their ids, got {names!r}")
    return tuple(names)


def read_file(path: Path) -> datasets.Dataset:
    """Read one file of :data:`FORMATS`.

    Raises:
        ValueError: The file is cut, malformed, of an unknown format, or not UTF-8.
    """
    import pyarrow as pa
    from datasets import Dataset

    ending = _format(path)
    try:
        if ending == "parquet":
            import pyarrow.parquet

            return Dataset(pyarrow.parquet.read_table(path))
        text = _read_text(path)
        if ending in ("csv", "tsv"):
            return Dataset.from_dict(_read_cells(path, text, ending))
        rows = _read_objects(path, text, whole=ending == "json")
        columns = dict.fromkeys(name for row in rows for name in row)
        values = {name: [row.get(name) for row in rows] for name in columns}
        for name, column in values.items():
            _check_kinds(path, name, column)
        return Dataset.from_dict(values)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OSError,
        EOFError,
        OverflowError,
        UnicodeDecodeError,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} cannot be read as {ending}, it is cut or malformed: {error}") from error


def _is_local(path: str) -> bool:
    """A path that exists, or cannot be a hub id: those are ``name`` or ``owner/name``, without an ending we know."""
    place = Path(path).expanduser()
    if place.exists():
        return True
    looks_like_id = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and _format(place) not in FORMATS
    return not looks_like_id


def _read_local(path: Path) -> Mapping[str, datasets.Dataset]:
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

    if path.is_file():
        if _format(path) not in FORMATS:
            raise ValueError(f"data.path={path}: unknown format, known are {', '.join(FORMATS)}")
        return {TRAIN: read_file(path)}
    if not path.is_dir():
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"data.path={path}: no such file or folder{near}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"data.path={path}: cannot be read as a folder of datasets: {error}") from error
        if isinstance(saved, Dataset):
            return {TRAIN: saved}
        assert isinstance(saved, DatasetDict)
        return {str(name): dataset for name, dataset in saved.items()}
    files: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and _format(file) in FORMATS and file.name != LABELS_FILE:
            stem = file.name.split(".")[0]
            split = _SHARD.sub("", stem)
            if split in files and split == stem:
                raise ValueError(
                    f"data.path={path}: two files for split {split}: {files[split][0].name} and {file.name}"
                )
            files.setdefault(split, []).append(file)
    if TRAIN not in files:
        listed = ", ".join(file.name for shards in files.values() for file in shards) or "no data file"
        raise FileNotFoundError(
            f"data.path={path}: no train split (train.jsonl, .csv, .tsv or .parquet), "
            f"found {listed}{did_you_mean(TRAIN, files)}"
        )
    wanted = (TRAIN, TEST, *_VALIDATION_NAMES)
    return {
        split: concatenate_datasets([read_file(file) for file in shards])
        for split, shards in files.items()
        if split.split("_")[0] in wanted
    }


def _read_hub(hub_id: str | None, task: Task) -> Mapping[str, datasets.Dataset]:
    if hub_id is None:
        raise ValueError(
            f"data.task={task.name} has no source of its own: set data.path to a file, a folder or a hub id"
        )
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    config = task.hub_config if hub_id == task.hub_id else None
    try:
        # The test splits of GLUE have no public labels and are left where they are.
        splits = [
            name for name in get_dataset_split_names(hub_id, config) if name != TEST and not name.startswith("test_")
        ]
        return {name: load_dataset(hub_id, config, split=name) for name in splits}
    except (OSError, DatasetsError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"data set {hub_id!r}{f' ({config})' if config else ''} is no local path, "
            f"and the hub did not give it ({reason}); data.path also takes a local file or folder"
        ) from error


def _name_splits(found: Mapping[str, datasets.Dataset], task: Task, source: str) -> dict[str, datasets.Dataset]:
    """Give the splits the task's names."""
    if TRAIN not in found:
        raise FileNotFoundError(f"data.path={source}: no train split, found {', '.join(found) or 'none'}")
    splits = {TRAIN: found[TRAIN]}
    for name, source_name in task.validation_splits.items():
        _, _, suffix = source_name.partition("_")
        for stem in _VALIDATION_NAMES:
            candidate = f"{stem}_{suffix}" if suffix else stem
            if candidate in found:
                splits[name] = found[candidate]
                break
    if len(splits) == 1:
        # A task with two validation splits (MNLI) may come from a source with a plain one.
        plain = next((stem for stem in _VALIDATION_NAMES if stem in found), None)
        splits |= {"validation": found[plain]} if plain else {}
    if TEST in found:
        splits[TEST] = found[TEST]
    return splits


def _hold_out(
    train: datasets.Dataset, task: Task, label_column: str, share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out a share of train, evenly by label where every label has two examples and the share holds one of each."""
    from sklearn.model_selection import train_test_split

    num_held_out = min(max(round(share * len(train)), 1), len(train) - 1)
    strata = None
    if task.kind == "classification" and label_column in train.column_names:
        values = [str(value) for value in train[label_column]]
        counts = {value: values.count(value) for value in set(values)}
        if min(counts.values()) >= 2 and len(counts) <= min(num_held_out, len(train) - num_held_out):
            strata = values
    kept, held_out = train_test_split(range(len(train)), test_size=num_held_out, random_state=seed, stratify=strata)
    return train.select(sorted(kept)), train.select(sorted(held_out))


def _format(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _read_text(path: Path) -> str:
    """The file as text: line breaks within fields stay as they are, a byte order mark goes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8-sig")


def _read_objects(path: Path, text: str, *, whole: bool) -> list[dict[str, Any]]:
    if whole and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is cut or not JSON: {error}") from error
        numbered = list(enumerate(rows, start=1))
    else:
        numbered = []
        # Split at "\n" alone: str.splitlines also splits at U+2028 and the like, which JSON allows within a string.
        for line, content in enumerate(text.split("\n"), start=1):
            if content.strip():
                try:
                    numbered.append((line, json.loads(content)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {line}: cut or not JSON: {error}") from error
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {place}: expected a JSON object, got {type(row).__name__}")
    return [row for _, row in numbered]


def _check_kinds(path: Path, column: str, values: list[Any]) -> None:
    """A column has to be of one kind, or Arrow refuses it without saying where."""
    expected = None
    for row, value in enumerate(values):
        kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
        if value is None or kind == expected:
            continue
        if expected is not None:
            raise ValueError(
                f"{path}, row {row}, column {column!r}: a {kind}, {value!r}, after rows that hold a {expected}"
            )
        expected = kind


def _read_cells(path: Path, text: str, ending: str) -> dict[str, list[str]]:
    rows = _split_csv(path, text) if ending == "csv" else _split_tsv(text)
    header = next(rows, None)
    if header is None:
        return {}
    columns: list[list[str]] = [[] for _ in header]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: a column name occurs twice in {', '.join(header)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, row {number}: {len(row)} fields, and the header has {len(header)}: {', '.join(header)}"
            )
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    return dict(zip(header, columns, strict=True))


def _split_csv(path: Path, text: str) -> Iterator[list[str]]:
    # The csv module's limit on a field is global to the process and 128 KiB; a text may be longer.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        # strict=True: a quote that is never closed is an error, not a field that swallows the rest of the file.
        yield from (row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row)
    except csv.Error as error:
        raise ValueError(f"{path} is cut or not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _split_tsv(text: str) -> Iterator[list[str]]:
    return (line.removesuffix("\r").split("\t") for line in text.split("\n") if line)

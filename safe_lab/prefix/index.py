"""The index of an activation cache on disk: which examples are kept where, and what they were computed from."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Key of an example -> offset, tokens, checksum.
Rows = dict[bytes, tuple[int, int, int]]
_ENTRY = np.dtype([("key", "S16"), ("offset", "<i8"), ("tokens", "<i4"), ("checksum", "<u8")])


def write_index(path: Path, header: Mapping[str, Any], rows: Rows) -> None:
    """Write it, whole or not at all.

    Args:
        path: The file.
        header: Plain values.
        rows: The entries.

    Raises:
        OSError: The disk is full or failed.
    """
    entries = np.array([(key, *row) for key, row in rows.items()], dtype=_ENTRY)
    table = io.BytesIO()
    np.save(table, entries, allow_pickle=False)
    body = json.dumps(header).encode() + b"\n" + table.getvalue()
    with unfinished(path).open("wb") as file:
        file.write(hashlib.sha256(body).digest() + body)
        file.flush()
        os.fsync(file.fileno())
    unfinished(path).replace(path)


def read_index(path: Path) -> tuple[dict[str, Any], Rows]:
    """Header and entries.

    Raises:
        OSError: There is none.
        ValueError: It is cut or altered.
    """
    whole = path.read_bytes()
    digest, body = whole[:32], whole[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("altered")
    first_line, _, table = body.partition(b"\n")
    header = json.loads(first_line)
    entries = np.load(io.BytesIO(table), allow_pickle=False)
    # NumPy cuts zeros off the end of a string of bytes.
    rows = {bytes(key).ljust(16, b"\0"): (int(at), int(tokens), int(sum_)) for key, at, tokens, sum_ in entries}
    return header, rows


def unfinished(path: Path) -> Path:
    """Where it is written before it has its name."""
    return path.with_name(f".unfinished-{path.name}")

"""Folders that are whole or absent: written under another name, hashed, synced, renamed; verified on load.

A folder holds ``*.safetensors`` (tensors), ``state.pt`` (plain values and tensors, loaded with ``weights_only``) and
``manifest.json`` with the SHA-256 and the size of every other file. Nothing read from one can run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

MANIFEST = "manifest.json"


class DamagedError(RuntimeError):
    """A checkpoint that is cut or altered; the message names folder and file."""


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint: after a crash at any moment ``folder`` is whole or absent.

    Args:
        folder: The checkpoint; replaced if it exists.
        tensors: Weights by name.
        state: Nested dicts and lists of plain values and tensors.

    Raises:
        OSError: No room, or no right, to write; what stood in ``folder`` before is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".unfinished-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        # Through memory and an ordinary write: of a full disk the libraries' own writers raise anything but OSError.
        weights = serialize({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
        (unfinished / "model.safetensors").write_bytes(weights)
        plain = io.BytesIO()
        torch.save(dict(state), plain)
        (unfinished / "state.pt").write_bytes(plain.getbuffer())
        files = {
            path.name: {"sha256": _hash(path), "bytes": path.stat().st_size} for path in sorted(unfinished.iterdir())
        }
        (unfinished / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        sync(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    remove(folder)
    unfinished.rename(folder)
    _sync(folder.parent)


def sync(folder: Path) -> None:
    """Make the files of a folder survive a power cut."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def load(folder: Path, *, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint after checking every file against the manifest.

    Returns:
        The weights by name, and the state.

    Raises:
        DamagedError: A file is missing, cut or altered.
    """
    verify(folder)
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return load_file(folder / "model.safetensors", device=str(device)), state


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        DamagedError: A file is missing, cut or altered, or the manifest is.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in ("model.safetensors", "state.pt"):
            if name not in files:
                raise DamagedError(f"{folder}: the manifest does not name {name}")
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                raise DamagedError(
                    f"{path}: {path.stat().st_size} bytes, {expected['bytes']} were written: cut or altered"
                )
            if _hash(path) != expected["sha256"]:
                raise DamagedError(f"{path}: its SHA-256 is not the one that was written: altered")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST}: unreadable ({error})") from None


def steps(folders: Path) -> list[Path]:
    """The ``step-*`` checkpoints in a folder, oldest first."""
    return sorted(folders.glob("step-*")) if folders.is_dir() else []


def keep_newest(folders: Path, number: int) -> None:
    """Remove all but the newest ``number`` checkpoints."""
    for folder in steps(folders)[:-number]:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a crash half-way cannot leave half of it under its name."""
    if folder.exists():
        doomed = folder.parent / f".doomed-{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

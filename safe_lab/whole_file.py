"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write a file with, which has its name only once all of it is on the disk.

    Args:
        path: Of the file; one that is there already stays until then.

    Raises:
        OSError: It could not be written; with the file's name, which a full disk does not tell by itself.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except BaseException as error:
        # Whatever ended it, Ctrl-C too, half a file would stay; it goes on up from here.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error

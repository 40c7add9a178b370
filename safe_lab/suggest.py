"""The near name for a typing slip, as every error message gives it."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half-sentence naming the known name nearest to ``name``; empty if none is near.

    >>> did_you_mean("fischer", ["cka", "fisher"])
    '; did you mean fisher?'
    >>> did_you_mean("acuracy", ["validation/loss", "validation/accuracy"])
    '; did you mean validation/accuracy?'
    """
    known = list(known)
    # Of names with a path the last part may be meant, or misspelt.
    by_end = {entry.rpartition("/")[2]: entry for entry in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1) or [
        by_end[end] for end in difflib.get_close_matches(name, by_end, n=1)
    ]
    return f"; did you mean {near[0]}?" if near else ""

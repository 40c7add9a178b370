"""The near name for a typing slip, as every error message gives it."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half-sentence naming the known name nearest to ``name``; empty if none is near.

    >>> did_you_mean("fischer", ["cka", "fisher"])
    '; did you mean fisher?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

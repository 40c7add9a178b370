"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import math
import re

from safe_lab.suggest import did_you_mean

_UNITS: dict[str, int] = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGTP", start=1)
}


def parse_bytes(text: str) -> int:
    """A size such as ``24GiB``, ``24 GB``, ``1.5TiB``, ``800MiB`` or ``1000B``; a GiB is 1024 MiB, a GB 1000 MB.

    Raises:
        ValueError: No positive number, or a unit there is not.

    >>> parse_bytes("24GiB"), parse_bytes("24GB"), parse_bytes("1000B")
    (25769803776, 24000000000, 1000)
    """
    number, unit = re.match(r"\s*([\d.]*)\s*(.*?)\s*$", text, re.DOTALL).groups()  # type: ignore[union-attr]
    units = {name.lower(): size for name, size in _UNITS.items()}
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", number) or not 0 < float(number) < math.inf:
        raise ValueError(f"{text!r} is no size: a positive number with a unit is needed, such as 24GiB, 800MiB or 24GB")
    if not unit:
        raise ValueError(f"{text!r} has no unit: is {number}GiB meant?")
    if unit.lower() not in units:
        raise ValueError(
            f"{text!r}: there is no unit {unit!r}{did_you_mean(unit, _UNITS)}; there are {', '.join(_UNITS)}"
        )
    return round(float(number) * units[unit.lower()])


def format_bytes(number: float) -> str:
    """A size in the largest binary unit that leaves a whole part.

    >>> format_bytes(8803947315), format_bytes(14705056), format_bytes(512)
    ('8.20 GiB', '14.0 MiB', '512 B')
    """
    unit, size = byte_unit(number)
    decimals = 2 if size >= 1024**3 else 1 if size > 1 else 0
    return f"{number / size:.{decimals}f} {unit}"


def byte_unit(number: float) -> tuple[str, int]:
    """The largest binary unit that leaves a whole part, and its bytes.

    >>> byte_unit(14705056), byte_unit(0)
    (('MiB', 1048576), ('B', 1))
    """
    return next(((unit, _UNITS[unit]) for unit in ("TiB", "GiB", "MiB", "KiB") if number >= _UNITS[unit]), ("B", 1))

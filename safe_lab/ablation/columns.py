"""Figures as columns of a table: one unit and one number of decimals for all of a column, the unit in its heading."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from safe_lab.ablation.comparison import Comparison, Row
from safe_lab.ablation.words import difference_of, format_share, signed
from safe_lab.figures import unit_of

# Of the largest figure of a column. A share, or a loss, tells nothing by its fifth decimal at any number of rows.
_DIGITS = 4
_MOST_DECIMALS = 4
_COUNT = re.compile(r"(depth|steps?|epochs|tokens|computed|layers|examples)$|^parameters/")
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Column:
    """How the values of a figure are written, below each other.

    Attributes:
        figure: Which.
        unit: Of the written numbers, such as MiB; empty of a share, a loss, a count.
        divisor: What a value is divided by for it.
        decimals: Of the written numbers; None: they are too large or small for any, and each has an exponent.
    """

    figure: str
    unit: str
    divisor: float
    decimals: int | None

    @property
    def name(self) -> str:
        """The figure's, as a heading, without its unit."""
        return self.figure.removeprefix("resources/").removesuffix("_bytes").replace("_", " ").replace("/", " ")

    @property
    def heading(self) -> str:
        """Its name, and its unit if it has one."""
        return f"{self.name}, {self.unit_told}" if self.unit_told else self.name

    @property
    def unit_told(self) -> str:
        """The unit, where the name does not tell it."""
        return "" if self.unit == "s" and self.name.endswith("seconds") else self.unit

    def write(self, value: float) -> str:
        """A value of the figure, without its unit."""
        amount = abs(value) / self.divisor
        written = f"{amount:.{_DIGITS - 1}e}" if self.decimals is None else f"{amount:.{self.decimals}f}"
        return f"{_MINUS}{written}" if value < 0 else written


def column_of(figure: str, values: Iterable[float]) -> Column:
    """The column in which values of a figure are told apart.

    >>> [column_of("resources/memory_mean_bytes", [2**28, 2**27]).write(value) for value in (2**28, 2**27, 111)]
    ['256.0', '128.0', '0.0']
    >>> column_of("validation/accuracy", [0.9, 0.883]).write(0.883), column_of("sharpness/trace", [5e-6]).write(5e-6)
    ('0.8830', '5.000e-06')
    """
    found = [abs(float(value)) for value in values]
    largest = max(found, default=0.0)
    unit, divisor = unit_of(figure, largest)
    if _COUNT.search(figure) or unit == "B":
        # The mean of several has a decimal.
        return Column(figure, unit, divisor, 1 if largest < 10**_DIGITS else 0)
    power = math.floor(math.log10(largest / divisor)) if largest else 0
    decimals = min(max(_DIGITS - 1 - power, 0), _MOST_DECIMALS)
    is_lost = not unit and any(0 < value < 10**-decimals for value in found)
    return Column(figure, unit, divisor, None if is_lost or not -3 <= power < 6 else decimals)


def columns_of(comparison: Comparison) -> list[Column]:
    """Those of the figures that some run has, the metric first."""
    rules = comparison.rules
    columns = []
    for figure in (rules.metric, *rules.figures):
        cells = [row.cells[figure] for row in comparison.rows if figure in row.cells]
        if cells:
            columns.append(column_of(figure, [value for cell in cells for value in cell.by_seed.values()]))
    return columns


class Told(NamedTuple):
    """A cell of a table; empty texts where there is nothing to tell.

    Attributes:
        value: The mean, in its column's unit.
        spread: The standard deviation over the seeds, and where runs are missing the number of those it is of.
        difference: To the baseline.
        interval: Of the difference.
    """

    value: str = ""
    spread: str = ""
    difference: str = ""
    interval: str = ""


def tell(comparison: Comparison, row: Row, column: Column) -> Told:
    """A variant's figure."""
    cell, found = row.cells.get(column.figure), difference_of(row, column.figure)
    if cell is None:
        return Told()
    numbers = {len(other.cells[column.figure].by_seed) for other in comparison.rows if column.figure in other.cells}
    spread = [] if cell.spread is None else [f"\N{PLUS-MINUS SIGN} {column.write(cell.spread)}"]
    if len(numbers) > 1:
        spread.append(f"(n = {len(cell.by_seed)})")
    value = Told(column.write(cell.mean), " ".join(spread))
    if found is None:
        return value
    ends = [end for end in (found.low, found.high) if end is not None]
    write = format_share if found.is_relative else lambda end: signed(end, column.write(abs(end)))
    difference, *interval = map(write, (found.mean, *ends))
    # Of percent one sign will do.
    return value._replace(difference=difference, interval=" to ".join(interval).replace(" % to", " to"))


def tell_test(comparison: Comparison, row: Row) -> tuple[str, str]:
    """Of a variant's metric: p after correction, and the size of the effect; empty where there is none."""
    found = difference_of(row, comparison.rules.metric)
    p = "" if found is None or found.p_corrected is None else f"{found.p_corrected:.2g}"
    effect = "" if found is None or found.effect_size is None else f"g = {found.effect_size:.2f}"
    return p, effect.replace("-", "\N{MINUS SIGN}")

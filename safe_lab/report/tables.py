"""The table of variants as Markdown for a README, as CSV for a spreadsheet, and as LaTeX for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from safe_lab.ablation import Comparison, Verdict
from safe_lab.ablation.comparison import Row
from safe_lab.ablation.words import describe_claims, describe_rules, difference_of, format_difference, format_interval
from safe_lab.figures import direction_of, format_figure

_MINUS = "\N{MINUS SIGN}"
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        _MINUS: "$-$",
        "\N{PLUS-MINUS SIGN}": r"$\pm$",
    }
)


def figures_of(comparison: Comparison) -> list[str]:
    """The figures that some run has, the metric first."""
    rules = comparison.rules
    return [figure for figure in (rules.metric, *rules.figures) if any(figure in row.cells for row in comparison.rows)]


def find_best(comparison: Comparison, figure: str) -> str | None:
    """The variant with the best mean of a figure over the seeds that all have.

    None of a figure that is neither good nor bad by itself, and where all are alike or no seed has all.
    """
    sign = direction_of(figure)
    by_variant = {row.variant: row.cells[figure].by_seed for row in comparison.rows if figure in row.cells}
    shared = set.intersection(*(set(by_seed) for by_seed in by_variant.values())) if by_variant else set()
    means = {variant: fmean(by_seed[seed] for seed in shared) for variant, by_seed in by_variant.items() if shared}
    if not sign or len(set(means.values())) < 2:
        return None
    return max(means, key=lambda variant: sign * means[variant])


def short_name(figure: str) -> str:
    """A figure's name as a heading."""
    return figure.removeprefix("resources/").removesuffix("_bytes").replace("_", " ").replace("/", " ")


def format_cell(comparison: Comparison, row: Row, figure: str) -> tuple[str, str]:
    """A variant's figure with its spread, and its difference to the baseline with its interval; empty where there is none.

    Where runs are missing, the number of those it is of stands beside it.
    """
    cell, found = row.cells.get(figure), difference_of(row, figure)
    if cell is None:
        return "", ""
    value = format_figure(figure, cell.mean)
    if cell.spread is not None:
        value += f" \N{PLUS-MINUS SIGN} {format_figure(figure, cell.spread)}"
    if len({len(other.cells[figure].by_seed) for other in comparison.rows if figure in other.cells}) > 1:
        value += f" (n = {len(cell.by_seed)})"
    if found is None:
        return value, ""
    interval = format_interval(figure, found)
    return value, format_difference(figure, found) + (f" ({interval})" if interval else "")


def format_test(comparison: Comparison, row: Row) -> tuple[str, str]:
    """Of a variant's metric: p after correction, and the size of the effect; empty where there is none."""
    found = difference_of(row, comparison.rules.metric)
    p = "" if found is None or found.p_corrected is None else f"{found.p_corrected:.2g}"
    effect = "" if found is None or found.effect_size is None else f"g = {found.effect_size:.2f}"
    return p, effect.replace("-", _MINUS)


def to_markdown(comparison: Comparison) -> str:
    """A table for a README."""
    figures = figures_of(comparison)
    lines = [
        ["variant", *(short_name(figure) for figure in figures), "p", "verdict"],
        ["---", *("---:" for _ in figures), "---:", "---"],
    ]
    for row in comparison.rows:
        cells = []
        for figure in figures:
            value, difference = format_cell(comparison, row, figure)
            shown = f"**{value}**" if value and find_best(comparison, figure) == row.variant else value
            cells.append(f"{shown}<br>{difference}" if difference else shown)
        lines.append([row.variant, *cells, "<br>".join(filter(None, format_test(comparison, row))), _verdict(row)])
    table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    notes = "".join(f"- {' '.join(note.split())}\n" for note in notes_of(comparison))
    return f"{table}\n{notes}" if notes else table


def to_csv(comparison: Comparison) -> str:
    """A row for each variant, seed and figure, and one without seed for the mean: plain numbers."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heading = (
        "variant",
        "figure",
        "seed",
        "value",
        "spread",
        "difference",
        "is_relative",
        "low",
        "high",
        "p",
        "p_corrected",
        "smallest_p",
        "effect_size",
        "verdict",
    )
    writer.writerow(heading)
    for row in comparison.rows:
        for figure, cell in row.cells.items():
            found = cell.difference
            numbers = (
                (
                    *(found.mean, found.is_relative, found.low, found.high),
                    *(found.p, found.p_corrected, found.smallest_p, found.effect_size),
                )
                if found
                else [None] * 8
            )
            verdict = row.verdict if figure == comparison.rules.metric else None
            writer.writerow([row.variant, figure, None, cell.mean, cell.spread, *numbers, verdict])
            for seed, value in cell.by_seed.items():
                writer.writerow([row.variant, figure, seed, value, None, (found.by_seed.get(seed) if found else None)])
        for seed, fault in row.faults.items():
            writer.writerow([row.variant, None, seed, *[None] * 10, f"not in it: {fault}"])
    return stream.getvalue()


def to_latex(comparison: Comparison) -> str:
    """A table for a paper (package booktabs): the best in bold, intervals below in small print."""
    figures = figures_of(comparison)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(figures)}r}}",
        r"\toprule",
        " & ".join(["variant", *(_escape(short_name(figure)) for figure in figures), "$p$"]) + r" \\",
        r"\midrule",
    ]
    for row in comparison.rows:
        values, differences = [], []
        for figure in figures:
            value, difference = (_escape(part) for part in format_cell(comparison, row, figure))
            values.append(rf"\textbf{{{value}}}" if value and find_best(comparison, figure) == row.variant else value)
            differences.append(rf"{{\scriptsize {difference}}}" if difference else "")
        p, effect = (_escape(part) for part in format_test(comparison, row))
        values.append(p)
        differences.append(rf"{{\scriptsize {effect}}}" if effect else "")
        lines.append(" & ".join([_escape(row.variant), *values]) + r" \\")
        if any(differences):
            lines.append(" & ".join(["", *differences]) + r" \\")
    notes = [f"% {' '.join(note.split())}" for note in notes_of(comparison)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, ""])


def _verdict(row: Row) -> str:
    return "" if row.verdict == Verdict.BASELINE else f"{row.verdict}: {row.reason}"


def _escape(text: str) -> str:
    return text.translate(_LATEX)


def warnings_of(comparison: Comparison) -> Sequence[str]:
    """What is not in the table, and what stands against it."""
    faults = [
        f"{row.variant}, seed {seed}, is not in it: {fault}"
        for row in comparison.rows
        for seed, fault in row.faults.items()
    ]
    return [*faults, *comparison.warnings]


def notes_of(comparison: Comparison) -> Sequence[str]:
    """What stands below a table: how it is to be read, what was claimed, and what stands against taking it at its word."""
    return [
        describe_rules(comparison),
        *describe_claims(comparison),
        *warnings_of(comparison),
    ]

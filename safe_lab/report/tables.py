"""The table of variants as Markdown for a README, as CSV for a spreadsheet, and as LaTeX for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from safe_lab.ablation import Comparison, Verdict
from safe_lab.ablation.columns import Column, Told, columns_of, tell, tell_test
from safe_lab.ablation.comparison import Row
from safe_lab.ablation.words import describe_claims, describe_rules
from safe_lab.figures import direction_of

_BEST = "Bold: the best mean over the seeds that all variants have, whether or not it can be told from the others."
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


def find_best(comparison: Comparison, column: Column) -> frozenset[str]:
    """The variants with the best mean of a figure, as it is written, over the seeds that all have.

    None of a figure that is neither good nor bad by itself, and where all are alike or no seed has all.
    """
    figure, sign = column.figure, direction_of(column.figure)
    by_variant = {row.variant: row.cells[figure].by_seed for row in comparison.rows if figure in row.cells}
    shared = set.intersection(*(set(by_seed) for by_seed in by_variant.values())) if by_variant else set()
    if not sign or not shared:
        return frozenset()
    means = {variant: fmean(by_seed[seed] for seed in shared) for variant, by_seed in by_variant.items()}
    best = column.write(max(means.values(), key=lambda mean: sign * mean))
    found = frozenset(variant for variant, mean in means.items() if column.write(mean) == best)
    return frozenset() if len(found) == len(means) else found


def how_to_read(comparison: Comparison) -> str:
    """What its figures are, and what is bold."""
    is_any_best = any(find_best(comparison, column) for column in columns_of(comparison))
    return " ".join(filter(None, (describe_rules(comparison), _BEST if is_any_best else "")))


def to_markdown(comparison: Comparison) -> str:
    """A table for a README."""
    columns = columns_of(comparison)
    lines = [
        ["variant", *(column.heading for column in columns), "p<br>effect", "verdict"],
        ["---", *("---:" for _ in columns), "---:", "---"],
    ]
    for row in comparison.rows:
        cells = []
        for column in columns:
            value, difference = _lines_of(tell(comparison, row, column))
            shown = f"**{value}**" if row.variant in find_best(comparison, column) else value
            cells.append(f"{shown}<br>{difference}" if difference else shown)
        lines.append([row.variant, *cells, "<br>".join(filter(None, tell_test(comparison, row))), _verdict(row)])
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
    columns = columns_of(comparison)
    units = [rf"{{\scriptsize {_escape(column.unit_told)}}}" if column.unit_told else "" for column in columns]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(columns)}rl}}",
        r"\toprule",
        " & ".join(["variant", *(_escape(column.name) for column in columns), "$p$", "verdict"]) + r" \\",
        " & ".join(["", *units, r"{\scriptsize effect}", ""]) + r" \\",
        r"\midrule",
    ]
    for row in comparison.rows:
        values, differences = [], []
        for column in columns:
            value, difference = map(_escape, _lines_of(tell(comparison, row, column)))
            is_best = row.variant in find_best(comparison, column)
            values.append(rf"\textbf{{{value}}}" if is_best else value)
            differences.append(_small(difference))
        p, effect = map(_escape, tell_test(comparison, row))
        verdict = "" if row.verdict == Verdict.BASELINE else _escape(row.verdict)
        lines.append(" & ".join([_escape(row.variant), *values, p, verdict]) + r" \\")
        if any((*differences, effect)):
            lines.append(" & ".join(["", *differences, _small(effect), ""]) + r" \\")
    notes = [f"% {' '.join(note.split())}" for note in notes_of(comparison)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, ""])


def _lines_of(told: Told) -> tuple[str, str]:
    """A cell in two lines: the value with its spread, and the difference with its interval."""
    difference = f"{told.difference} ({told.interval})" if told.interval else told.difference
    return f"{told.value} {told.spread}".strip(), difference


def _small(text: str) -> str:
    return rf"{{\scriptsize {text}}}" if text else ""


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
        *filter(None, [how_to_read(comparison)]),
        *describe_claims(comparison),
        *warnings_of(comparison),
    ]

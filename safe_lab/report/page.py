"""A report as one HTML file that opens from disk, without a network: its script, styles and figures are in it."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

from safe_lab import yaml_core
from safe_lab.ablation import Comparison, Verdict
from safe_lab.ablation.columns import Column, columns_of, tell, tell_test
from safe_lab.ablation.comparison import Row
from safe_lab.ablation.records import Record
from safe_lab.ablation.words import describe, describe_claims
from safe_lab.report.charts import (
    Chart,
    choose_styles,
    draw_costs,
    draw_freezing,
    draw_learning_curves,
    draw_trade_off,
    read_rows,
)
from safe_lab.report.curvature import draw_slices, draw_spectra
from safe_lab.report.source import Source
from safe_lab.report.tables import find_best, how_to_read, warnings_of

_GOOD = (Verdict.BETTER, Verdict.NO_WORSE)
_BAD = (Verdict.WORSE, Verdict.NO_RUNS)
_MOST_EVENTS = 200
# Of all figures together: with plotly's five million the page stays under eight.
_MOST_CHARACTERS = 2_500_000
_ENVIRONMENT = ("time", "commit", "python", "platform", "processor", "processors", "threads", "devices", "packages")


def write_page(source: Source) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    figures = _Figures()
    body = "\n".join(_sections(source, figures))
    folder = files("safe_lab.report")
    title = _escape(source.name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is to be fetched: a page that names an address, in the text of some data set, stays what it is.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:\">\n"
        f"<title>{title}</title>\n<style>\n{(folder / 'page.css').read_text()}</style>\n</head>\n<body>\n{body}\n"
        f"{figures.scripts()}\n<script>{get_plotlyjs()}</script>\n<script>\n{(folder / 'page.js').read_text()}</script>\n"
        "</body>\n</html>\n"
    )


class _Figures:
    """Figures of the page, which its script draws once they are looked at."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._left = _MOST_CHARACTERS

    def place(self, chart: Chart) -> str:
        """Where a figure is drawn."""
        name = f"figure-{len(self._texts)}"
        # "</script>" in some text would end the element it stands in.
        text = str(chart.figure.to_json()).replace("<", "\\u003c")
        if len(text) > self._left:
            return f'<p class="note">{_escape(chart.title)}: left out, as the page is large; that of fewer runs has it.</p>'
        self._left -= len(text)
        self._texts.append(f'<script type="application/json" id="{name}">{text}</script>')
        return (
            f'<figure><h3>{_escape(chart.title)}</h3><p class="note">{_escape(chart.note)}</p>'
            f'<div class="chart" data-figure="{name}" role="img" aria-label="{_escape(chart.title)}"></div></figure>'
        )

    def scripts(self) -> str:
        """What they are drawn from."""
        return "\n".join(self._texts)


def _sections(source: Source, figures: _Figures) -> Iterator[str]:
    comparison = source.comparison
    num_runs = sum(not record.fault for record in source.records)
    yield f"<h1>{_escape(source.name)}</h1>"
    yield f'<p class="note">{num_runs} runs, {len(comparison.rows)} variants; written {time.strftime("%Y-%m-%d %H:%M")}</p>'
    yield f'<p class="note">{_escape(_describe_training(source))}</p>'
    yield _verdicts(comparison)
    faults = warnings_of(comparison)
    if faults:
        yield f'<ul class="warnings">{"".join(f"<li>{_escape(fault)}</li>" for fault in faults)}</ul>'
    yield "<h2>Variants</h2>"
    yield _table(comparison)
    yield f'<p class="rules">{_escape(how_to_read(comparison))}</p>'
    claims = [f"<li>{_escape(line)}</li>" for line in describe_claims(comparison)]
    if claims:
        yield f"<h2>What was claimed</h2><ul>{''.join(claims)}</ul>"
    styles = choose_styles([row.variant for row in comparison.rows])
    shown = "".join(
        _place(figures, what, draw)
        for what, draw in (
            ("The trade-off", lambda: [draw_trade_off(comparison, styles)]),
            (
                "The metric over training",
                lambda: [draw_learning_curves(source.records, comparison.rules.metric, styles)],
            ),
            ("The spectrum", lambda: [draw_spectra(source.records, styles)]),
        )
    )
    if shown:
        yield f'<h2>At a glance</h2><div class="charts">{shown}</div>'
    yield "<h2>Run by run</h2>"
    yield from _runs(source.records, figures)
    yield "<h2>What the variants change</h2>"
    yield _changes(comparison)
    yield "<h2>Where it was made, and how to make it again</h2>"
    yield from _origin(source)


def _describe_training(source: Source) -> str:
    """What was trained, by the first run of the baseline that can be read."""
    records = [record for record in source.records if record.variant == source.comparison.baseline]
    record = next((record for record in sorted(records, key=lambda one: bool(one.fault)) if record.config), None)
    if record is None or record.config is None:
        return ""
    config = record.config
    examples = record.result.get("examples")
    found = examples.items() if isinstance(examples, dict) else ()
    numbers = [f"{num:,} of {split}" for split, num in found if isinstance(num, int)]
    rank = "" if config.adapter.rank is None else f" of rank {config.adapter.rank}"
    steps, epochs = config.training.max_steps, config.training.epochs
    length = f"{epochs} epoch{'s' if epochs > 1 else ''}" if steps is None else f"{steps} steps"
    told = f"{config.data.task} of {config.data.path or 'its own data'}"
    if numbers:
        told += f" (examples: {', '.join(numbers)})"
    return f"Trained, by the baseline's configuration: {told}, {config.model.path} with {config.adapter.method}{rank}, {length}."


def _verdicts(comparison: Comparison) -> str:
    verdicts = {row.variant: row.verdict for row in comparison.rows}
    items = []
    for variant, sentence in describe(comparison):
        kind = "good" if verdicts[variant] in _GOOD else "bad" if verdicts[variant] in _BAD else "unsure"
        items.append(
            f'<li class="{kind}"><strong>{_escape(variant)}</strong>: {_escape(sentence).replace(" %", "&nbsp;%")}</li>'
        )
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _table(comparison: Comparison) -> str:
    columns = columns_of(comparison)
    first, others = columns[:1], columns[1:]
    headings = [
        _heading("variant", kind="text"),
        *(_heading(column.name, column.unit_told) for column in first),
        _heading("verdict", kind="text"),
        _heading("p", "effect"),
        *(_heading(column.name, column.unit_told) for column in others),
    ]
    rows = "".join(_table_row(row, comparison, first, others) for row in comparison.rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(headings)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _heading(name: str, below: str = "", *, kind: str = "") -> str:
    small = f"<small>{_escape(below)}</small>" if below else ""
    return f'<th scope="col" class="{kind}"><button type="button">{_escape(name)}</button>{small}</th>'


def _table_row(row: Row, comparison: Comparison, first: Sequence[Column], others: Sequence[Column]) -> str:
    p, effect = tell_test(comparison, row)
    return "".join(
        (
            f'<tr><td data-value="{_escape(row.variant)}">{_escape(row.variant)}</td>',
            *(_cell(row, comparison, column) for column in first),
            f'<td class="text" data-value="{_escape(row.verdict)}">{_escape(row.verdict)}</td>',
            f'<td data-value="{p}">{p}<small>{_escape(effect)}</small></td>',
            *(_cell(row, comparison, column) for column in others),
            "</tr>",
        )
    )


def _cell(row: Row, comparison: Comparison, column: Column) -> str:
    cell, told = row.cells.get(column.figure), tell(comparison, row, column)
    best = ' class="best"' if row.variant in find_best(comparison, column) else ""
    number = "" if cell is None else repr(cell.mean)
    below = "".join(f"<small>{_escape(line)}</small>" for line in told[1:] if line)
    return f'<td{best} data-value="{number}">{_escape(told.value)}{below}</td>'


def _runs(records: Iterable[Record], figures: _Figures) -> Iterator[str]:
    """Of each variant its first run that has finished."""
    first: dict[str, Record] = {}
    for record in records:
        if not record.fault:
            first.setdefault(record.variant, record)
    # One is open, as what is to be seen there is not plain from a heading: the first in which something froze.
    froze = [variant for variant, record in first.items() if record.result["frozen_share"]]
    opened = next(iter([*froze, *first]), None)
    for record in first.values():
        is_open = " open" if record.variant == opened else ""
        charts = _place(figures, "What froze when", partial(draw_freezing, record))
        charts += _place(figures, "What it cost", partial(draw_costs, record))
        slices = _place(figures, "The loss around the solution", partial(draw_slices, record))
        if slices:
            slices = f'<h3>The loss around the solution</h3><div class="charts">{slices}</div>'
        yield (
            f"<details{is_open}><summary>{_escape(record.variant)}, seed {record.seed}</summary>"
            f'<div class="charts">{charts}</div>{slices}{_events(record)}</details>'
        )


def _place(figures: _Figures, what: str, draw: Callable[[], Iterable[Chart | None]]) -> str:
    """Charts where they are drawn; what is damaged, in whichever way, is told instead."""
    try:
        return "".join(figures.place(chart) for chart in draw() if chart is not None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"<p>{what} cannot be drawn: {_escape(_say(error))}</p>"


def _say(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"damaged, or of another version ({error!r})"


def _events(record: Record) -> str:
    try:
        rows = read_rows(record, "events.jsonl", ("step", "epoch", "units", "frozen_share", "frozen_depth"))
        items = [
            f"<li>step {row['step']:d} (epoch {row['epoch']:.3g}): {_escape(', '.join(row['units']))}; "
            f"{row['frozen_share']:.0%} of the units frozen, depth {row['frozen_depth']:d}</li>"
            for row in rows[:_MOST_EVENTS]
        ]
    except (ValueError, TypeError) as error:
        return f"<p>What happened cannot be told: {_escape(_say(error))}</p>"
    if not items:
        return "<p>Nothing froze.</p>"
    more = f"<li>and {len(rows) - _MOST_EVENTS} more</li>" if len(rows) > _MOST_EVENTS else ""
    return f"<h3>What happened</h3><ul>{''.join(items)}{more}</ul>"


def _changes(comparison: Comparison) -> str:
    rows = [
        f"<tr><td>{_escape(row.variant)}</td><td class='text'>{_escape(key)}</td>"
        f"<td class='text'>{_escape(_plain(before))}</td><td class='text'>{_escape(_plain(after))}</td></tr>"
        for row in comparison.rows
        for key, (before, after) in row.changes.items()
    ]
    if not rows:
        return "<p>Nothing that could be read.</p>"
    heads = "".join(
        f'<th class="text">{_escape(name)}</th>' for name in ("variant", "setting", comparison.baseline, "variant's")
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _origin(source: Source) -> Iterator[str]:
    commands = "\n".join(source.commands)
    yield f"<pre>{_escape(commands)}</pre>"
    environment = next((record.environment for record in source.records if record.environment), {})
    if environment:
        shown = {key: environment[key] for key in _ENVIRONMENT if key in environment}
        yield f"<details><summary>Environment</summary><pre>{_escape(yaml_core.write(shown))}</pre></details>"
    folders = "\n".join(str(record.path) for record in source.records)
    yield f"<details><summary>Run folders</summary><pre>{_escape(folders)}</pre></details>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return "" if value is None else str(value)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)

"""What a comparison comes to, in plain words and figures."""

from __future__ import annotations

from collections.abc import Iterator

from safe_lab.ablation.comparison import Comparison, Difference, Row, Verdict, smallest_p_worse
from safe_lab.figures import differs_by_factor, format_figure

_MINUS = "\N{MINUS SIGN}"
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
# What is said of a variant's costs, where it is known.
_COSTS = {
    "resources/memory_peak_bytes": "peak memory",
    "resources/memory_mean_bytes": "mean memory",
    "resources/flops": "FLOPs",
    "resources/wall_seconds": "time",
    "resources/joules": "energy",
}
_ORDER = (
    Verdict.BETTER,
    Verdict.NO_WORSE,
    Verdict.NO_DIFFERENCE_FOUND,
    Verdict.NOT_ENOUGH_SEEDS,
    Verdict.WORSE,
    Verdict.NO_RUNS,
)


def describe(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """A variant and a sentence for each but the baseline, the good ones first."""
    others = [row for row in comparison.rows if row.verdict != Verdict.BASELINE]
    for row in sorted(others, key=lambda row: _ORDER.index(row.verdict)):
        yield row.variant, _describe_row(row, comparison)
    if not others:
        for row in comparison.rows:
            cell = row.cells.get(comparison.rules.metric)
            if cell is not None:
                yield row.variant, f"{comparison.rules.metric} {format_figure(comparison.rules.metric, cell.mean)}"


def _describe_row(row: Row, comparison: Comparison) -> str:
    metric = comparison.rules.metric
    cell = row.cells.get(metric)
    if cell is None or cell.difference is None:
        return f"{row.verdict}: {row.reason}"
    found = cell.difference
    interval = format_interval(metric, found)
    seeds = f"{len(found.by_seed)} seed{'s' if len(found.by_seed) > 1 else ''}"
    said = (
        f"{row.verdict} than {comparison.baseline}"
        if row.verdict in (Verdict.BETTER, Verdict.WORSE)
        else str(row.verdict)
    )
    said += f" ({row.reason}): " if row.reason else ": "
    said += f"{metric} {format_difference(metric, found)}"
    said += f" ({interval}, {seeds})" if interval else f" ({seeds})"
    costs = [
        f"{name} {format_difference(figure, difference)}"
        for figure, name in _COSTS.items()
        if (difference := difference_of(row, figure)) is not None
    ]
    return said + ("; " + ", ".join(costs) if costs else "") + "."


def describe_claims(comparison: Comparison) -> Iterator[str]:
    """Each claim, and what came of it, in a line."""
    for claim, outcome in zip(comparison.rules.claims, comparison.claims, strict=True):
        found = difference_of(comparison.row(claim.variant), claim.figure)
        claimed = _signed(claim.figure, claim.difference, differs_by_factor(claim.figure))
        line = f"{claim.source} claims {claimed} {claim.figure} of {claim.variant}: {outcome}"
        if found is not None:
            interval = format_interval(claim.figure, found)
            line += f"; found {format_difference(claim.figure, found)}" + (f" ({interval})" if interval else "")
        yield line


def describe_rules(comparison: Comparison) -> str:
    """How to read the figures, in a sentence or two."""
    rules = comparison.rules
    differences = [found for row in comparison.rows if (found := difference_of(row, rules.metric)) is not None]
    most = max((len(found.by_seed) for found in differences), default=0)
    num_others = len([found for found in differences if found.p is not None])
    methods = sorted({found.method for found in differences if found.method and found.method != "all alike"})
    if not differences:
        return ""
    said = [f"Differences are to {comparison.baseline}, paired by seed."]
    if most > 1:
        said.insert(0, f"{_PLUS_MINUS} is the standard deviation over the seeds.")
    if methods:
        said.append(
            f"Intervals ({' and '.join(methods)}) hold the true mean in {rules.confidence:.0%} of cases, each by itself."
        )
    if most > 1:
        smallest = min(found.smallest_p for found in differences)
        line = f"With {most} seeds p ({rules.test}) cannot come below {smallest:.2g}"
        if num_others > 1:
            corrected = min(1.0, smallest * num_others)
            line += f", nor below {corrected:.2g} after Holm's correction over {num_others} comparisons"
        said.append(f"{line}. p and g (the size of the effect, after Hedges) are of {rules.metric}.")
    if rules.margin is not None:
        said.append(
            f"No worse: the interval of the metric ends less than {rules.margin:g} on the worse side, by itself"
        )
        if num_others > 1:
            chance = 1 - ((1 + rules.confidence) / 2) ** num_others
            said[-1] += (
                f", so that of {num_others} variants worse by just that one or more may be called so in {chance:.0%} of cases"
            )
        said[-1] += "."
        if most > 1:
            floor = min(smallest_p_worse(found, num_others) for found in differences if found.p is not None)
            if floor > (1 - rules.confidence) / 2:
                how = ", corrected," if num_others > 1 else ""
                said.append(f"A test of that{how} is not told: with so few seeds p cannot come below {floor:.2g}.")
    return " ".join(said)


def difference_of(row: Row, figure: str) -> Difference | None:
    """Of a variant's figure to the baseline's."""
    cell = row.cells.get(figure)
    return None if cell is None else cell.difference


def format_difference(figure: str, found: Difference) -> str:
    """A mean difference, as a person reads it: percent of costs, points of shares.

    >>> format_difference("resources/flops", Difference({0: -0.25}, {}, True, -0.25, None, None, None, None, None, 1.0, None))
    '\N{MINUS SIGN}25.0 %'
    """
    return _signed(figure, found.mean, found.is_relative)


def format_interval(figure: str, found: Difference) -> str:
    """Its interval; empty with a single seed."""
    if found.low is None or found.high is None:
        return ""
    return f"{_signed(figure, found.low, found.is_relative)} to {_signed(figure, found.high, found.is_relative)}"


def format_share(value: float) -> str:
    """A difference as a share of the baseline's figure.

    >>> format_share(-0.25)
    '\N{MINUS SIGN}25.0 %'
    """
    return signed(value, f"{abs(value):.1%}".replace("%", " %"))


def signed(value: float, amount: str) -> str:
    """An amount that was written without the sign of its value, with it."""
    return f"{'+' if value > 0 else _MINUS if value < 0 else ''}{amount}"


def _signed(figure: str, value: float, is_relative: bool) -> str:
    if is_relative:
        return format_share(value)
    # Of a share, or a loss, the fourth figure tells nothing at any number of rows that is evaluated.
    return signed(value, f"{abs(value):.4f}" if abs(value) < 1 else format_figure(figure, abs(value)))

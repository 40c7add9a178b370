"""FLOPs of steps that were not counted, from those of steps that were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, islice

Shape = tuple[int, int]
Flops = Mapping[str, int]


def fit_flops(known: Mapping[Shape, Flops]) -> Callable[[Shape], dict[str, int]]:
    r"""FLOPs of a micro-step as a function of its shape, from counted ones.

    .. math:: F(b, n) = b\,(\alpha n + \beta n^2 + \gamma) + \delta

    for b examples of n tokens in a Transformer: linear maps, attention, pooler and head, and what is done once for all
    examples (the relative positions of DeBERTa). The first three terms alone are tried first: three counted shapes of different
    lengths determine them, four all of them. A phase in which another counted shape contradicts, and all phases where fewer
    are known, are scaled by the tokens from the nearest counted shape.

    Args:
        known: Counted FLOPs by phase, by (examples, tokens an example); at least one shape.

    Returns:
        Shape -> FLOPs by phase; counted shapes as counted.

    >>> flops = fit_flops({(2, 1): {"forward": 6}, (2, 2): {"forward": 14}, (2, 3): {"forward": 26}})
    >>> flops((1, 4))
    {'forward': 21}
    """
    exact = {
        phase: _solve({shape: flops[phase] for shape, flops in known.items()}) for phase in next(iter(known.values()))
    }

    def estimate(shape: Shape) -> dict[str, int]:
        if shape in known:
            return dict(known[shape])
        tokens = shape[0] * shape[1]
        near = min(known, key=lambda other: abs(other[0] * other[1] - tokens))
        scale = Fraction(tokens, near[0] * near[1])
        return {
            phase: round(known[near][phase] * scale if terms is None else _evaluate(terms, shape))
            for phase, terms in exact.items()
        }

    return estimate


def _terms(shape: Shape) -> tuple[int, int, int, int]:
    examples, n = shape
    return examples * n, examples * n * n, examples, 1


def _evaluate(coefficients: Sequence[Fraction], shape: Shape) -> Fraction:
    return sum((c * term for c, term in zip(coefficients, _terms(shape), strict=False)), Fraction(0))


def _solve(flops: Mapping[Shape, int]) -> list[Fraction] | None:
    """The coefficients with which every counted shape comes out to the unit; None: there are none, or too few shapes."""
    # The shapes that differ most come first, and a handful of choices is enough to find independent ones.
    shapes = sorted(flops, key=lambda shape: (shape[1], shape[0]))
    shapes = [*shapes[::-2], *shapes[-2::-2]]
    for num_terms in (3, 4):
        for chosen in islice(combinations(shapes, num_terms), 50):
            coefficients = _eliminate([[*map(Fraction, _terms(s)[:num_terms]), Fraction(flops[s])] for s in chosen])
            if coefficients is not None:
                if all(_evaluate(coefficients, shape) == count for shape, count in flops.items()):
                    return coefficients
                break
    return None


def _eliminate(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """Solution of a square system whose last column is the right-hand side (Gauss, Jordan); None: it is singular."""
    size = len(rows)
    for column in range(size):
        pivot = next((i for i in range(column, size) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and rows[i][column]:
                rows[i] = [a - rows[i][column] * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [row[-1] for row in rows]

"""FLOPs of steps that were not counted, from those of steps that were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

Shape = tuple[int, int]
Flops = Mapping[str, int]


def fit_flops(known: Mapping[Shape, Flops]) -> Callable[[Shape], dict[str, int]]:
    r"""FLOPs of a micro-step as a function of its shape, from counted ones.

    .. math:: F(b, n) = b\,(\alpha n + \beta n^2 + \gamma)

    for b examples of n tokens in a Transformer: linear maps, attention, pooler and head. Three lengths determine it
    (Lagrange). A phase in which another counted shape contradicts, and all phases where fewer lengths are known, are
    scaled by the tokens from the nearest counted shape.

    Args:
        known: Counted FLOPs by phase, by (examples, tokens an example); at least one shape.

    Returns:
        Shape -> FLOPs by phase; counted shapes as counted.

    >>> flops = fit_flops({(2, 1): {"forward": 6}, (2, 2): {"forward": 14}, (2, 3): {"forward": 26}})
    >>> flops((1, 4))
    {'forward': 21}
    """
    examples_of = {length: examples for examples, length in known}
    lengths = sorted(examples_of)
    nodes = [(examples_of[n], n) for n in dict.fromkeys((lengths[0], lengths[len(lengths) // 2], lengths[-1]))]

    def interpolate(phase: str, shape: Shape) -> Fraction:
        examples, n = shape
        total = Fraction(0)
        for node in nodes:
            weight = Fraction(known[node][phase], node[0])
            for _, other in nodes:
                if other != node[1]:
                    weight *= Fraction(n - other, node[1] - other)
            total += weight
        return examples * total

    exact = {
        phase: len(nodes) == 3 and all(interpolate(phase, shape) == flops[phase] for shape, flops in known.items())
        for phase in next(iter(known.values()))
    }

    def estimate(shape: Shape) -> dict[str, int]:
        if shape in known:
            return dict(known[shape])
        tokens = shape[0] * shape[1]
        near = min(known, key=lambda other: abs(other[0] * other[1] - tokens))
        return {
            phase: round(
                interpolate(phase, shape) if exact[phase] else known[near][phase] * Fraction(tokens, near[0] * near[1])
            )
            for phase in exact
        }

    return estimate

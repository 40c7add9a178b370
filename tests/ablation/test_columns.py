"""Columns: figures below each other, told apart and in one unit."""

import pytest

from safe_lab.ablation.columns import column_of

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("figure", "values", "heading", "written"),
    [
        ("validation/accuracy", [0.912345, 0.5], "validation accuracy", ["0.9123", "0.5000"]),
        ("validation/matthews", [0.5, -0.06], "validation matthews", ["0.5000", f"{MINUS}0.0600"]),
        ("resources/memory_mean_bytes", [2**30, 2**29], "memory mean, GiB", ["1.000", "0.500"]),
        ("resources/memory_mean_bytes", [0, 0], "memory mean, B", ["0.0", "0.0"]),
        ("resources/wall_seconds", [1234.5, 61.7], "wall seconds", ["1234", "62"]),
        ("resources/flops", [2.5e12, 1e9], "flops, TFLOP", ["2.500", "0.001"]),
        # Of counts every figure counts, and a mean of several may lie between.
        ("frozen_depth", [3, 2.5], "frozen depth", ["3.0", "2.5"]),
        ("parameters/total", [22713601, 22713000], "parameters/total".replace("/", " "), ["22713601", "22713000"]),
        # Of shares none is a count, even if all are 0 or 1.
        ("frozen_share", [1, 1 / 3], "frozen share", ["1.000", "0.333"]),
        # Nothing that is there is written as nothing.
        ("sharpness/trace", [12345, 0.4], "sharpness trace", ["1.234e+04", "4.000e-01"]),
        ("sharpness/trace", [5e-6], "sharpness trace", ["5.000e-06"]),
        ("sharpness/trace", [], "sharpness trace", []),
    ],
)
def test_a_column_has_one_unit_and_as_many_decimals_as_tell(figure, values, heading, written):
    column = column_of(figure, values)
    assert column.heading == heading
    assert [column.write(value) for value in values] == written

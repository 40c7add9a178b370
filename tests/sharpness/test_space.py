"""Weights as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safe_lab.sharpness.space import Space


def weights(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape).to(dtype))


def test_groups_follow_one_another():
    space = Space({"a": [weights(2, 3), weights(4)], "b": [weights(5)]})
    assert space.num_dimensions == 15
    assert space.groups == {"a": slice(0, 10), "b": slice(10, 15)}


def test_weight_of_two_groups_counts_once_and_lies_in_the_first():
    shared = weights(4)
    space = Space({"a": [weights(2), shared], "b": [shared, weights(3)], "c": [shared]})
    assert space.num_dimensions == 9
    assert space.groups == {"a": slice(0, 6), "b": slice(6, 9), "c": slice(9, 9)}


def test_vector_is_the_weights_row_by_row():
    first, second = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), nn.Parameter(torch.tensor([5.0]))
    assert Space({"a": [first], "b": [second]}).position().tolist() == [1, 2, 3, 4, 5]


def test_splitting_undoes_joining():
    space = Space({"a": [weights(2, 3), weights(4)], "b": [weights(1, 5)]})
    parts = [torch.randn_like(parameter) for parameter in space.parameters]
    assert all(map(torch.equal, space.split(space.join(parts)), parts))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_vectors_are_as_wide_as_the_widest_weight_and_float32_at_least(dtypes, expected):
    space = Space({"a": [weights(2, dtype=dtype) for dtype in dtypes]})
    assert space.dtype == space.position().dtype == expected


def test_sum_by_group_is_taken_in_float64():
    space = Space({"a": [weights(2)], "b": [weights(1)]})
    sums = space.sum_by_group(torch.tensor([[1.0], [2.0**-30], [5.0]]))
    assert sums.tolist() == [[1 + 2**-30], [5]]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_moved_and_come_back_to_the_bit(dtype, raises):
    parameter = weights(3, 2, dtype=dtype)
    before, space = parameter.detach().clone(), Space({"a": [parameter]})
    try:
        with space.moved_to(torch.full((6,), 0.5)):
            assert parameter.tolist() == [[0.5] * 2] * 3
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("groups", [{}, {"a": []}])
def test_no_weights_are_refused(groups):
    with pytest.raises(ValueError, match="no weights"):
        Space(groups)


def test_quantised_weights_are_refused():
    quantised = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch\.int8.*quantised"):
        Space({"a": [weights(2)], "b": [quantised]})

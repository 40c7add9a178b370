import pytest
import torch
from frozen import make_batch, pick

from safe_lab.prefix.rows import MULTIPLE, count_tokens, is_padded_on_the_right, make_keys, select_rows


def inputs(*args, **options):
    batch = make_batch(*args, **options)
    del batch["labels"]
    return batch


def test_a_key_does_not_depend_on_padding_or_on_the_other_rows():
    batch = inputs([9, 4, 6])
    batch["token_type_ids"] = (batch["input_ids"] % 2) * batch["attention_mask"]
    keys = make_keys(batch)
    assert make_keys(pick([batch], [(0, 2), (0, 1)], width=17)) == [keys[2], keys[1]]
    other_padding = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 63)}
    assert make_keys(other_padding) == keys
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {16}


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_a_key_depends_on_each_token_and_all_that_goes_with_it(name):
    batch = inputs([9, 4])
    batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"]), "position_ids": torch.arange(9).expand(2, 9)}
    changed = batch | {name: batch[name].clone()}
    changed[name][1, 3] += 1
    assert make_keys(changed)[0] == make_keys(batch)[0]
    assert make_keys(changed)[1] != make_keys(batch)[1]


def test_a_key_depends_on_which_inputs_there_are():
    batch = inputs([5])
    typed = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    positioned = batch | {"position_ids": torch.zeros_like(batch["input_ids"])}
    assert len({*make_keys(batch), *make_keys(typed), *make_keys(positioned)}) == 3


def test_without_a_mask_every_column_is_a_token():
    batch = inputs([5, 5])
    assert count_tokens({"input_ids": batch["input_ids"]}) == [5, 5]
    assert make_keys({"input_ids": batch["input_ids"]}) == make_keys(batch)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_tokens_are_counted_whatever_the_masks_dtype(dtype):
    batch = inputs([5, 2, 1])
    mask = batch["attention_mask"].to(dtype)
    assert count_tokens(batch | {"attention_mask": mask}) == [5, 2, 1]
    assert make_keys(batch | {"attention_mask": mask}) == make_keys(batch)


@pytest.mark.parametrize(
    ("mask", "on_the_right"),
    [
        ([[1, 1, 0], [1, 1, 1]], True),
        ([[0, 0, 0], [1, 0, 0]], True),
        ([[1, 1, 0], [0, 1, 1]], False),
        ([[1, 0, 1], [1, 1, 1]], False),
    ],
)
def test_padding_is_on_the_right_if_no_token_follows_it(mask, on_the_right):
    mask = torch.tensor(mask)
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    assert is_padded_on_the_right(batch) is on_the_right
    assert is_padded_on_the_right(batch | {"attention_mask": mask.bool()}) is on_the_right
    assert is_padded_on_the_right({"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("lengths", "columns"), [([1], 16), ([16, 3], 16), ([17, 3], 32), ([33, 1], 48), ([0], 16), ([0, 20], 32)]
)
def test_selected_rows_are_padded_to_a_multiple_of_sixteen(lengths, columns):
    batch = inputs(lengths, width=40)
    selected = select_rows(batch, range(len(lengths)), pad_token_id=3)
    assert MULTIPLE == 16
    assert {tuple(tensor.shape) for tensor in selected.values()} == {(len(lengths), columns)}
    for row, length in enumerate(lengths):
        assert selected["attention_mask"][row].tolist() == [1] * length + [0] * (columns - length)
        assert torch.equal(selected["input_ids"][row, :length], batch["input_ids"][row, :length])
    assert selected["attention_mask"].dtype == torch.int64


def test_rows_are_selected_in_the_order_asked_for():
    batch = inputs([9, 4, 6])
    batch["token_type_ids"] = batch["input_ids"] % 3
    selected = select_rows(batch, [2, 0], pad_token_id=3)
    assert make_keys(selected) == [make_keys(batch)[i] for i in (2, 0)]
    assert selected["input_ids"][0, 9:].tolist() == [3] * 7
    assert selected["token_type_ids"][0, 9:].tolist() == [0] * 7


def test_without_a_mask_one_is_made():
    selected = select_rows({"input_ids": inputs([5, 5])["input_ids"]}, [1])
    assert selected["attention_mask"].tolist() == [[1] * 5 + [0] * 11]


@pytest.mark.parametrize(("longest", "columns"), [(30, 32), (33, 40), (40, 40), (41, 41)])
def test_padding_stops_at_the_longest_row_the_model_takes_and_no_token_is_cut(longest, columns):
    batch = inputs([longest, 3])
    selected = select_rows(batch, [0, 1], most_tokens=40)
    assert selected["input_ids"].shape == (2, columns)
    assert count_tokens(selected) == [longest, 3]

import itertools
import math
import random
import weakref

import pytest
import torch
from tiny import random_batch, tiny_model

from safe_lab.memory import split_batch
from safe_lab.memory.split import cut_rows

BATCH, LONGEST = 16, 36


def parts_of(batch, most_rows, **how):
    return list(split_batch(batch, most_rows if callable(most_rows) else lambda length: most_rows, **how))


def lengths_of(batch):
    return batch["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("most", [1, 2, 5, 15, 16, 99])
def test_each_row_goes_into_one_part_and_weighs_as_much_as_in_the_batch(most):
    batch = random_batch() | {"row": torch.arange(BATCH)}
    parts = parts_of(batch, most)
    assert math.fsum(weight for _, weight in parts) == pytest.approx(1, abs=1e-15)
    assert sorted(row for part, _ in parts for row in part["row"].tolist()) == list(range(BATCH))
    assert len(parts) == math.ceil(BATCH / most)
    for part, weight in parts:
        assert weight == len(part["labels"]) / BATCH
        for place, row in enumerate(part["row"].tolist()):
            tokens = lengths_of(batch)[row]
            assert part["labels"][place] == batch["labels"][row]
            assert torch.equal(part["input_ids"][place, :tokens], batch["input_ids"][row, :tokens])
            assert part["attention_mask"][place].sum() == tokens


def test_rows_go_by_length_longest_first_and_keep_their_order_where_they_are_alike():
    batch = random_batch(6, 5)
    batch["attention_mask"] = (torch.arange(5) < torch.tensor([2, 4, 2, 5, 4, 2])[:, None]).long()
    batch["row"] = torch.arange(6)
    asked = []

    def most_rows(length):
        asked.append(length)
        return 12 // length

    assert [part["row"].tolist() for part, _ in split_batch(batch, most_rows)] == [[3, 1], [4, 0, 2], [5]]
    assert asked == [5, 4, 2]


def test_a_part_has_the_columns_of_its_longest_row():
    batch = random_batch() | {"hidden": torch.randn(BATCH, LONGEST, 3)}
    longest = sorted(lengths_of(batch), reverse=True)[::4]
    for multiple, columns in [(1, longest), (8, [min(LONGEST, -(-n // 8) * 8) for n in longest])]:
        for (part, _), width in zip(parts_of(batch, 4, pad_to_multiple_of=multiple), columns, strict=True):
            assert part["input_ids"].shape == part["attention_mask"].shape == (4, width)
            assert part["hidden"].shape == (4, width, 3)
            # Its own storage, not a view of all columns.
            assert part["input_ids"].untyped_storage().nbytes() == part["input_ids"].nbytes


def test_a_batch_that_goes_in_one_piece_keeps_its_order_and_loses_only_padding():
    batch = random_batch()
    ((part, weight),) = parts_of(batch, BATCH)
    assert weight == 1
    assert all(torch.equal(part[name], tensor) for name, tensor in batch.items())
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 4)) if tensor.dim() > 1 else tensor for name, tensor in batch.items()
    }
    ((part, weight),) = parts_of(padded, BATCH)
    assert all(torch.equal(part[name], tensor) and part[name].is_contiguous() for name, tensor in batch.items())


def test_without_a_mask_rows_keep_their_order_and_all_columns():
    batch = random_batch()
    del batch["attention_mask"]
    asked = []

    def most_rows(length):
        asked.append(length)
        return 6

    parts = parts_of(batch, most_rows)
    assert [weight for _, weight in parts] == [6 / 16, 6 / 16, 4 / 16]
    assert torch.equal(torch.cat([part["input_ids"] for part, _ in parts]), batch["input_ids"])
    assert set(asked) == {LONGEST}


def test_what_is_no_tensor_of_rows_goes_along_as_it_is():
    extra = {"name": "sst2", "scale": torch.tensor(2.0), "table": torch.ones(3, LONGEST), "nothing": None}
    for part, _ in parts_of(random_batch() | extra, 5):
        assert all(part[name] is value for name, value in extra.items())


def test_a_row_without_a_token_keeps_a_column():
    batch = random_batch(2, 6)
    batch["attention_mask"][0] = 0
    (_, _), (empty, weight) = parts_of(batch, 1)
    assert (empty["input_ids"].shape, weight) == ((1, 1), 0.5)


def test_no_reference_to_a_part_is_kept_once_the_next_is_asked_for():
    parts = split_batch(random_batch(), lambda length: 4)
    count = 0
    for part, _ in parts:
        remembered = weakref.ref(part["input_ids"])
        del part
        count += 1
        assert remembered() is None
    assert count == 4


def test_a_batch_that_cannot_be_split_is_told():
    with pytest.raises(ValueError, match="gives 0 for rows of 36 tokens"):
        parts_of(random_batch(), 0)
    with pytest.raises(ValueError, match="without a tensor has no rows to split; its entries are text"):
        parts_of({"text": "none"}, 1)


def test_a_cut_spares_more_padding_than_a_part_costs():
    lengths = [50, 48, 20, 19, 18, 5]
    assert cut_rows(lengths, trim_padding=8) == [2, 5, 6]
    assert cut_rows(lengths, trim_padding=15) == [2, 6]
    assert cut_rows(lengths, trim_padding=1000) == [6]
    assert cut_rows(lengths, trim_padding=1) == [1, 2, 4, 5, 6]
    # What a cut would spare is what it costs: there is none.
    assert cut_rows([9, 4], trim_padding=5) == [2]
    assert cut_rows([], trim_padding=5) == []


@pytest.mark.parametrize("seed", range(100))
def test_no_other_cuts_cost_less(seed):
    draw = random.Random(seed)
    lengths = sorted((draw.randint(1, 30) for _ in range(draw.randint(1, 9))), reverse=True)
    trim_padding, most = draw.randint(1, 40), [draw.randint(1, 9) for _ in range(30)]

    def cost(ends):
        return sum((end - begin) * lengths[begin] + trim_padding for begin, end in itertools.pairwise([0, *ends]))

    def allowed(ends):
        return all(end - begin <= most[lengths[begin] - 1] for begin, end in itertools.pairwise([0, *ends]))

    inner = range(1, len(lengths))
    all_ends = [
        [*chosen, len(lengths)] for count in range(len(lengths)) for chosen in itertools.combinations(inner, count)
    ]
    ends = cut_rows(lengths, lambda length: most[length - 1], trim_padding=trim_padding)
    assert allowed(ends)
    best = min(cost(other) for other in all_ends if allowed(other))
    assert cost(ends) == best
    assert len(ends) == min(len(other) for other in all_ends if allowed(other) and cost(other) == best)


def test_gradients_of_parts_of_like_length_add_up_too(family):
    model = tiny_model(family).double().eval()
    batch = random_batch(8, 20)
    parts = parts_of(batch, 5, trim_padding=3)
    assert len(parts) > 2
    whole, split_up = gradients(model, [(batch, 1.0)]), gradients(model, parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split_up[name], gradient, rtol=0, atol=1e-12)


def gradients(model, parts):
    model.zero_grad()
    for part, weight in parts:
        (weight * model(**part).loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_of_parts_add_up(model, batch, most, **tolerance):
    whole = gradients(model, [(batch, 1.0)])
    split_up = gradients(model, split_batch(batch, lambda length: most))
    assert whole.keys() == split_up.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split_up[name], gradient, **tolerance)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_gradients_of_the_parts_add_up_to_the_batchs(family, most):
    model = tiny_model(family).double().eval()
    assert_gradients_of_parts_add_up(model, random_batch(8, 20), most, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_so_they_do_with_padding_on_the_left(name):
    model = tiny_model(name).double().eval()
    batch = random_batch(8, 20, left=True)
    assert_gradients_of_parts_add_up(model, batch, 3, rtol=0, atol=1e-12)
    assert {part["input_ids"].shape[1] for part, _ in parts_of(batch, 3)} == {20}


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, random_batch(8, 20, num_labels=1)),
        ({"num_labels": 5}, random_batch(8, 20, num_labels=5)),
        ({}, {name: tensor for name, tensor in random_batch(8, 20).items() if name != "attention_mask"}),
        ({}, random_batch(1, 20)),
    ],
)
def test_so_they_do_for_any_labels_without_a_mask_and_for_a_single_row(changes, batch):
    model = tiny_model("bert", **changes).eval()
    assert_gradients_of_parts_add_up(model, batch, 3, rtol=1e-4, atol=1e-7)

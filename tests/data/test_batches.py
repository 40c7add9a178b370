import numpy as np
import pytest
import torch

from safe_lab.data.batches import Collator, EpochBatchSampler

LENGTHS = np.random.default_rng(0).integers(3, 60, size=1003).tolist()


def sampler(**changes):
    arguments = {"lengths_or_num_examples": LENGTHS, "batch_size": 8, "seed": 1} | changes
    return EpochBatchSampler(arguments.pop("lengths_or_num_examples"), arguments.pop("batch_size"), **arguments)


@pytest.fixture(params=[False, True], ids=["shuffled", "grouped"])
def grouped(request):
    return request.param


def test_each_example_comes_once_an_epoch(grouped):
    batches = list(sampler(group_by_length=grouped))
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert len(batches) == len(sampler()) == 126


def test_only_the_last_batch_is_not_full(grouped):
    assert [len(batch) for batch in sampler(group_by_length=grouped)] == [8] * 125 + [3]
    assert [len(batch) for batch in sampler(group_by_length=grouped, drop_last=True)] == [8] * 125


def test_order_depends_on_seed_and_epoch_alone(grouped):
    first, second = sampler(group_by_length=grouped), sampler(group_by_length=grouped)
    list(second)
    second.set_epoch(3)
    first.set_epoch(3)
    torch.manual_seed(7)
    np.random.seed(7)
    assert list(first) == list(second)
    assert list(first) != list(sampler(group_by_length=grouped))
    assert list(first) != list(sampler(group_by_length=grouped, seed=2))


def test_global_random_streams_are_untouched(grouped):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    list(sampler(group_by_length=grouped))
    assert (torch.rand(1), np.random.rand()) == expected


def test_resume_in_mid_epoch_gives_the_rest_of_the_epoch(grouped):
    whole, resumed = sampler(group_by_length=grouped), sampler(group_by_length=grouped)
    for each in (whole, resumed):
        each.set_epoch(2)
    resumed.start = 17
    assert list(resumed) == list(whole)[17:]
    assert len(resumed) == len(whole)


def test_a_new_epoch_starts_at_its_first_batch():
    resumed = sampler()
    resumed.set_epoch(2)
    resumed.start = 17
    resumed.set_epoch(2)
    assert resumed.start == 17
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(resumed)


def test_grouping_wastes_less_padding():
    def count_padding(batches):
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)

    assert count_padding(sampler(group_by_length=True)) < 0.2 * count_padding(sampler())


@pytest.mark.parametrize("epoch", range(5))
def test_longest_row_comes_first_when_grouped(epoch):
    grouped = sampler(group_by_length=True)
    grouped.set_epoch(epoch)
    assert max(LENGTHS[i] for i in next(iter(grouped))) == max(LENGTHS)


def test_without_shuffling_rows_keep_their_order():
    assert list(EpochBatchSampler(5, 2, seed=0, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_fewer_rows_than_a_batch_make_one_batch(grouped):
    lengths = [3, 9, 4]
    assert [sorted(b) for b in EpochBatchSampler(lengths, 8, seed=0, group_by_length=grouped)] == [[0, 1, 2]]


@pytest.mark.parametrize("arguments", [(0, 2, False), (3, 0, False), (3, 2, True)])
def test_impossible_batches_are_an_error(arguments):
    with pytest.raises(ValueError, match=r"batch|length"):
        EpochBatchSampler(arguments[0], arguments[1], seed=0, group_by_length=arguments[2])


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (8, 8)])
def test_collator_pads_to_the_longest_row(tokenizer, multiple, width):
    rows = [
        {"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "labels": 1, "length": 3},
        {"input_ids": [2, 3], "attention_mask": [1, 1], "labels": 0, "length": 2},
    ]
    batch = Collator(tokenizer, multiple)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64


def test_collator_gives_regression_labels_as_float32(tokenizer):
    rows = [{"input_ids": [2, 3], "attention_mask": [1, 1], "labels": 2.5, "length": 2}]
    assert Collator(tokenizer)(rows)["labels"].dtype == torch.float32

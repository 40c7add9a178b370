"""What of a batch goes through the model at once, stage by stage."""

import pytest
from tiny import random_batch

from safe_lab.memory import Stage
from safe_lab.micro_batches import MicroBatches


def stage(rows):
    return Stage(False, 0, (rows,) * 36, (2 * rows,) * 36)


def sizes(micro_batches, batch):
    return [len(part["labels"]) for part, _ in micro_batches.split(batch)]


def test_without_budget_and_trimming_the_batch_is_left_alone():
    batch, micro_batches = random_batch(), MicroBatches(None, trim_padding=None)
    micro_batches.enter_stage([False])
    ((part, weight),) = micro_batches.split(batch)
    assert part is batch and weight == 1
    assert (micro_batches.longest_rows, micro_batches.eval_rows, micro_batches.can_halve) == (None, None, False)


def test_each_stage_has_its_rows_and_is_halved_once():
    rows = {(False,): 4, (True,): 8}
    micro_batches = MicroBatches(lambda frozen: stage(rows[tuple(frozen)]), trim_padding=None)
    micro_batches.enter_stage([False])
    assert (micro_batches.longest_rows, micro_batches.eval_rows(36)) == (4, 8)
    assert sizes(micro_batches, random_batch()) == [4] * 4
    micro_batches.halve()
    assert sizes(micro_batches, random_batch()) == [2] * 8
    assert micro_batches.has_halved and not micro_batches.can_halve
    micro_batches.enter_stage([True])
    assert micro_batches.longest_rows == 8 and micro_batches.can_halve
    micro_batches.enter_stage([True], halve=True)
    assert micro_batches.longest_rows == 4 and not micro_batches.can_halve


@pytest.mark.parametrize(("rows", "trim_padding"), [(None, 1), (5, 1), (5, 1000)])
def test_padding_is_trimmed_within_the_rows_of_the_stage(rows, trim_padding):
    plan = None if rows is None else lambda frozen: stage(rows)
    micro_batches = MicroBatches(plan, trim_padding=trim_padding)
    micro_batches.enter_stage([False])
    found = sizes(micro_batches, random_batch())
    assert sum(found) == 16
    assert max(found) <= (rows or 16)
    # Hardly any two rows are alike.
    assert len(found) > 8 if trim_padding == 1 else len(found) == 4

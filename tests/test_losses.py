"""Losses on their way to a row: read once, in order, and named where they are not finite."""

import math

import pytest
import torch

from safe_lab.losses import Losses


def test_a_batchs_loss_is_the_sum_of_its_parts_and_a_row_the_mean_of_its_batches():
    losses = Losses(lambda: "")
    losses.record(1, [torch.tensor(0.25), torch.tensor(0.5)])
    losses.record(2, [torch.tensor(1.25)])
    assert losses.take_mean() == 1.0
    losses.record(3, [torch.tensor(4.0)])
    assert losses.take_mean() == 4.0


def test_on_the_cpu_a_bad_loss_stops_at_once_with_step_and_cause():
    losses = Losses(lambda: "unit 3 is the first")
    losses.record(6, [torch.tensor(1.0)])
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 7; unit 3 is the first; the last checkpoint stays"
    ):
        losses.record(7, [torch.tensor(math.nan), torch.tensor(1.0)])


def test_on_an_accelerator_losses_are_read_together_before_a_row():
    losses = Losses(lambda: "the head")
    # A tensor without values: reading it would fail.
    losses.record(1, [torch.zeros((), device="meta")])
    with pytest.raises(NotImplementedError):
        losses.read()


def test_what_no_row_tells_yet_survives_a_checkpoint():
    losses, resumed = Losses(lambda: ""), Losses(lambda: "")
    losses.record(1, [torch.tensor(1.0)])
    resumed.load_state_dict(losses.state_dict())
    resumed.record(2, [torch.tensor(3.0)])
    assert resumed.take_mean() == 2.0

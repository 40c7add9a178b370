import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.memory.predict import Rehearsal, count_bytes, make_full_batch, to_fake
from safe_lab.model import checkpoint_gradients, head_modules


def build(family="bert", *, fake, **settings):
    """A Rehearsal of a tiny model."""
    base = tiny_model(family)
    config = build_peft_config("lora", target_modules=FAMILIES[family][2], head_modules=head_modules(base))
    model = attach(base, config).model
    mode = FakeTensorMode() if fake else None

    def make_batch(rows, tokens):
        return make_full_batch(rows, tokens=tokens, num_labels=2, vocabulary=64)

    model.eval()
    units = find_units(model, lambda: model(**tiny_batch()))
    if mode:
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        to_fake(model, mode)
        assert not set(parameters.values()) & {id(parameter) for parameter in model.parameters()}
        with mode:
            units = find_units(model, lambda: model(**make_batch(1, 12)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return Rehearsal(model, units, optimizer, make_batch, tokens=12, mode=mode, **settings)


def test_everything_of_a_fake_model_is_fake_and_keeps_shape_dtype_flags_and_ties():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3, dtype=torch.bfloat16), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)
    )
    model[2].weight = model[0].weight
    model[0].bias.requires_grad = False
    before = {name: (t.shape, t.dtype, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    to_fake(model, FakeTensorMode())
    after = model.state_dict(keep_vars=True)
    assert {name: (t.shape, t.dtype, t.requires_grad) for name, t in after.items()} == before
    assert all(isinstance(tensor, FakeTensor) for tensor in after.values())
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("accumulating", [False, True])
def test_a_fake_step_costs_what_the_real_one_does(family, accumulating):
    fake, real = build(family, fake=True), build(family, fake=False)
    for frozen in [(), (0,), (0, 1), (1,), (0, 1, 2), ()]:
        predicted = fake.trace(frozen, rows=5, accumulating=accumulating)
        measured = real.trace(frozen, rows=5, accumulating=accumulating)
        assert predicted.flops == measured.flops
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.001)
        assert (fake.num_trainable, fake.optimizer_bytes) == (real.num_trainable, real.optimizer_bytes)


def test_what_is_frozen_has_no_gradient_and_no_state_and_can_be_trained_again():
    rehearsal = build(fake=False)
    everything = rehearsal.trace((), rows=4)
    state = rehearsal.optimizer_bytes
    frozen = list(rehearsal.units[1].parameters.values())
    rehearsal.trace((1,), rows=4)
    assert not any(parameter.requires_grad for parameter in frozen)
    # Two moments of each weight and a step count of each parameter.
    assert state - rehearsal.optimizer_bytes == 2 * count_bytes(frozen) + 4 * len(frozen)
    again = rehearsal.trace((), rows=4)
    assert (again.peak_bytes, again.flops) == (everything.peak_bytes, everything.flops)
    assert rehearsal.optimizer_bytes == state


def test_a_weight_that_units_share_freezes_with_the_last_of_them():
    rehearsal = build(fake=False)
    first, second, _ = rehearsal.units
    shared = next(iter(first.parameters.values()))
    second.parameters["shared"] = shared
    rehearsal.trace((0,), rows=2)
    assert shared.requires_grad
    rehearsal.trace((0, 1), rows=2)
    assert not shared.requires_grad


def test_gradients_of_earlier_micro_steps_are_there_in_a_micro_step_of_several():
    rehearsal = build(fake=True)
    alone, later = (rehearsal.trace((), rows=4, accumulating=several) for several in (False, True))
    trained = count_bytes(rehearsal.trained)
    assert (alone.held["gradients"], later.held["gradients"]) == (0, trained)
    assert later.peak_bytes > alone.peak_bytes
    assert later.flops == alone.flops


def test_a_full_batch_has_padding_that_masks():
    batch = make_full_batch(3, tokens=5, num_labels=4, vocabulary=64)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "input_ids": ((3, 5), torch.int64),
        "attention_mask": ((3, 5), torch.int64),
        "labels": ((3,), torch.int64),
    }
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 4, 4]
    assert make_full_batch(1, tokens=5, num_labels=4, vocabulary=64)["attention_mask"].sum() == 4
    assert make_full_batch(3, tokens=5, num_labels=1, vocabulary=64)["labels"].dtype == torch.float32


def test_mixed_precision_keeps_copies_of_the_weights_in_half_precision():
    plain, mixed = (build(fake=True, mixed_precision=precision).trace((), rows=4) for precision in ("none", "bf16"))
    assert mixed.flops == plain.flops
    assert mixed.peak["activations"] < plain.peak["activations"]
    assert mixed.peak["parameters"] == plain.peak["parameters"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_fake_evaluation_costs_what_the_real_one_does(family):
    fake, real = build(family, fake=True), build(family, fake=False)
    for rows, tokens in [(5, 9), (2, None)]:
        predicted, measured = (one.trace_evaluation(rows=rows, tokens=tokens) for one in (fake, real))
        assert predicted.flops == measured.flops
        assert predicted.flops["backward"] == 0
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.001)


def test_an_evaluation_keeps_nothing_for_a_backward_pass_and_holds_the_whole_optimizer_state():
    rehearsal = build(fake=True)
    whole, step = rehearsal.trace((), rows=8), rehearsal.trace((0, 1), rows=8)
    evaluation = rehearsal.trace_evaluation(rows=8)
    assert not rehearsal.model.training
    assert evaluation.peak["activations"] == 0
    assert evaluation.peak["temporary"] < whole.peak["activations"] / 3
    assert evaluation.held["optimizer"] > step.held["optimizer"]
    assert evaluation.left["gradients"] == 0
    # Made once, and a step after it trains again.
    assert rehearsal.trace_evaluation(rows=8, tokens=12) is evaluation
    assert rehearsal.trace((0, 1), rows=8).peak_bytes == step.peak_bytes


def test_a_trace_takes_rows_of_any_length():
    rehearsal = build(fake=True)
    assert rehearsal.trace((), rows=4, tokens=12).peak == rehearsal.trace((), rows=4).peak
    flops = [rehearsal.trace((), rows=4, tokens=tokens).total_flops for tokens in (5, 10, 20)]
    assert 2 * flops[0] < flops[1] < flops[2] / 2


def test_a_rehearsal_knows_whether_it_recomputes():
    rehearsal = build(fake=True)
    assert not rehearsal.recomputes
    plain = rehearsal.trace((), rows=4)
    checkpoint_gradients(rehearsal.model.get_base_model())
    assert rehearsal.recomputes
    assert rehearsal.trace((), rows=4).peak["activations"] < plain.peak["activations"]

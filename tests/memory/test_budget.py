import bisect
import itertools
import math
import random
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_batch, tiny_model
from torch._subclasses import FakeTensorMode

from safe_lab import config as configuration
from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.byte_size import parse_bytes
from safe_lab.memory import Ledger, Stage, halved, is_out_of_memory, plan_stage, split_batch
from safe_lab.memory.budget import fit_rows, largest_within
from safe_lab.memory.predict import Rehearsal, make_full_batch, to_fake
from safe_lab.model import checkpoint_gradients, head_modules
from safe_lab.plan.subject import build_subject

BATCH, EVAL_BATCH, LONGEST = 16, 24, 36


def build(family, *, fake, checkpointing=False, mixed_precision="none"):
    """A Rehearsal of a tiny model, fake or real."""
    base = tiny_model(family)
    config = build_peft_config("lora", target_modules=FAMILIES[family][2], head_modules=head_modules(base))
    model = attach(base, config).model
    if checkpointing:
        checkpoint_gradients(base)
    mode = FakeTensorMode() if fake else None
    if mode:
        to_fake(model, mode)

    def make_batch(rows, tokens):
        return make_full_batch(rows, tokens=tokens, num_labels=2, vocabulary=64)

    model.eval()
    with mode or nullcontext():
        units = find_units(model, lambda: model(**make_batch(1, 8)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    return Rehearsal(model, units, optimizer, make_batch, tokens=LONGEST, mode=mode, mixed_precision=mixed_precision)


def plan(rehearsal, budget_bytes, frozen=(), **changes):
    settings = {"kept_bytes": 5000, "batch_rows": BATCH, "eval_batch_rows": EVAL_BATCH, "longest": LONGEST}
    return plan_stage(rehearsal, frozen, budget_bytes=budget_bytes, **(settings | changes))


def needed(rehearsal, frozen, rows, tokens=LONGEST, *, batch_rows=BATCH, kept_bytes=5000):
    """What a plan counts for a micro-batch: its peak, what is kept, and the loaded batch."""
    trace = rehearsal.trace(frozen, rows=rows, tokens=tokens, accumulating=rows < batch_rows)
    return trace.peak_bytes + kept_bytes + 32 * batch_rows * LONGEST


def smallest_budget(rehearsal, **changes):
    with pytest.raises(ValueError, match="memory.budget") as refusal:
        plan(rehearsal, 1000, **changes)
    return parse_bytes(re.search(r"will do is ([\d.]+ \w+)", str(refusal.value))[1])


def real_peak(real, frozen, batch, stage, *, autocast=nullcontext()):
    """Ledger of an optimizer step on real weights, over the parts of a batch."""
    model, optimizer = real.model, real._optimizer
    real.freeze(frozen)
    model.train()
    with Ledger(model, optimizer, batch=batch.values()) as ledger:
        for part, weight in split_batch(batch, stage.rows):
            with autocast:
                loss = model(**part).loss
            (weight * loss.float()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return ledger.trace.peak_bytes


def real_eval_peak(real, batch, stage):
    """Ledger of the forward passes of an evaluation batch on real weights."""
    real.freeze(())
    real.model.eval()
    with Ledger(real.model, real._optimizer, batch=batch.values()) as ledger, torch.no_grad():
        logits = [real.model(**part).logits for part, _ in split_batch(batch, stage.eval_rows)]
    assert len(torch.cat(logits)) == EVAL_BATCH
    return ledger.trace.peak_bytes


def between(rehearsal, frozen, share, **changes):
    """A budget between that for a single row and that for a whole batch."""
    least, whole = (needed(rehearsal, frozen, rows, **changes) for rows in (1, BATCH))
    return round(least + share * (whole - least))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_real_steps_stay_within_the_budget_that_was_planned_for_without_weights(family, checkpointing):
    fake, real = (build(family, fake=fake, checkpointing=checkpointing) for fake in (True, False))
    for frozen, share in [((), 0.3)] if checkpointing else [((), 0.2), ((0, 1), 0.6)]:
        # Not a byte more than the forecast.
        budget = plan(fake, between(fake, frozen, share), frozen).peak_bytes
        stage = plan(fake, budget, frozen)
        assert stage.peak_bytes == budget
        assert 1 < stage.rows(LONGEST) < BATCH
        for shortest in (2, LONGEST // 2, LONGEST):
            batch = random_batch(shortest=shortest)
            if family == "bert":
                batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            assert real_peak(real, frozen, batch, stage) + 5000 <= budget


@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("bert", True), ("llama", True)]
)
def test_a_stage_takes_what_fits_and_of_the_longest_rows_the_most(family, checkpointing):
    rehearsal = build(family, fake=False, checkpointing=checkpointing)
    for frozen, share in [((), 0.1), ((0, 1), 0.5), ((1,), 0.95)]:
        budget = between(rehearsal, frozen, share)
        stage = plan(rehearsal, budget, frozen)
        most = stage.rows(LONGEST)
        assert needed(rehearsal, frozen, most) == stage.peak_bytes <= budget < needed(rehearsal, frozen, most + 1)
        assert stage.gradient_checkpointing is checkpointing
        for tokens in (1, 13, 25):
            assert needed(rehearsal, frozen, stage.rows(tokens), tokens) <= budget


def test_an_evaluation_fits_the_budget_too():
    fake, real = build("bert", fake=True), build("bert", fake=False)
    least = smallest_budget(fake)
    stage = plan(fake, least)
    assert 1 < stage.eval_rows(LONGEST) < EVAL_BATCH
    for tokens in (3, 13, 20, LONGEST):
        assert fake.trace_evaluation(rows=stage.eval_rows(tokens), tokens=tokens).peak_bytes + 5000 <= least
    assert real_eval_peak(real, random_batch(EVAL_BATCH), stage) + 5000 <= least


def test_a_stage_fits_in_mixed_precision_too():
    rehearsal = build("roberta", fake=True, mixed_precision="bf16")
    budget = between(rehearsal, (), 0.5)
    stage = plan(rehearsal, budget)
    assert 1 < stage.rows(LONGEST) < BATCH
    real = build("roberta", fake=False, mixed_precision="bf16")
    assert real_peak(real, (), random_batch(), stage, autocast=torch.autocast("cpu", torch.bfloat16)) + 5000 <= budget


def test_what_shorter_rows_take_is_near_the_most_that_fits():
    rehearsal = build("bert", fake=False)
    budget = between(rehearsal, (), 0.5)
    stage = plan(rehearsal, budget)
    for tokens in (8, 15, 22, 29):
        too_many = stage.rows(tokens) / 0.85
        assert too_many > BATCH or needed(rehearsal, (), math.ceil(too_many), tokens) > budget


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_will_do():
    rehearsal = build("bert", fake=False)
    least = smallest_budget(rehearsal)
    # Rounded up for the eye, by no more than the digits shown.
    for kept_bytes in range(5000, 5100, 25):
        least = smallest_budget(rehearsal, kept_bytes=kept_bytes)
        assert 0 <= least - needed(rehearsal, (), 1, kept_bytes=kept_bytes) <= 204
        assert plan(rehearsal, least, kept_bytes=kept_bytes).rows(LONGEST) == 1
    with pytest.raises(ValueError) as refusal:
        plan(rehearsal, least * 2 // 3)
    assert re.fullmatch(
        r"memory.budget: [\d.]+ KiB is too small for even a single row of 36 tokens at a time: the smallest that will do is "
        r"[\d.]+ KiB, or less with memory.gradient_checkpointing: true",
        str(refusal.value),
    )


def test_an_evaluation_that_needs_more_than_a_step_decides_what_is_too_small():
    rehearsal = build("bert", fake=False)
    frozen = range(3)
    least = smallest_budget(rehearsal, frozen=frozen, eval_batch_rows=4000)
    peak = rehearsal.trace_evaluation(rows=1, tokens=LONGEST).peak_bytes + 5000 + 32 * 4000 * LONGEST
    assert needed(rehearsal, frozen, 1) < peak <= least < 1.01 * peak
    with pytest.raises(ValueError, match="memory.budget"):
        plan(rehearsal, peak - 1, frozen, eval_batch_rows=4000)
    assert plan(rehearsal, least, frozen, eval_batch_rows=4000).eval_rows(LONGEST) >= 1


def test_a_budget_for_the_whole_batch_leaves_it_whole_and_a_byte_less_does_not():
    rehearsal = build("bert", fake=False)
    whole = needed(rehearsal, (), BATCH)
    assert plan(rehearsal, whole).most_rows == (BATCH,) * LONGEST
    assert plan(rehearsal, whole - 1).rows(LONGEST) == BATCH - 1
    # In a step of several batches there are gradients from the first, when a whole one goes through.
    assert plan(rehearsal, whole, accumulating=True).rows(LONGEST) < BATCH


def test_what_is_kept_beside_the_model_comes_off_the_budget():
    rehearsal = build("bert", fake=False)
    budget = between(rehearsal, (), 0.5)
    less, more = plan(rehearsal, budget, kept_bytes=0), plan(rehearsal, budget, kept_bytes=100_000)
    assert more.rows(LONGEST) < less.rows(LONGEST)
    assert plan(rehearsal, budget + 100_000, kept_bytes=100_000).most_rows == less.most_rows


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_never_shrink_as_the_frozen_run_grows(family, checkpointing):
    rehearsal = build(family, fake=False, checkpointing=checkpointing)
    least, whole = smallest_budget(rehearsal), needed(rehearsal, (), BATCH)
    grown = 0
    for share in (0.0, 0.2, 0.7):
        budget = round(least + share * (whole - least))
        stages = [plan(rehearsal, budget, range(depth)) for depth in range(4)]
        for before, after in itertools.pairwise(stages):
            assert all(np.array(after.most_rows) >= np.array(before.most_rows))
            assert after.most_eval_rows == before.most_eval_rows
        grown += stages[-1].rows(LONGEST) > stages[0].rows(LONGEST)
    assert grown


def test_activations_are_recomputed_only_where_not_one_row_fits_without():
    plain, built = build("bert", fake=False), []

    def with_checkpointing():
        built.append(build("bert", fake=False, checkpointing=True))
        return built[-1]

    least = smallest_budget(plain)
    assert not plan(plain, least, with_checkpointing=with_checkpointing).gradient_checkpointing
    assert not built
    least_with = smallest_budget(plain, with_checkpointing=with_checkpointing)
    assert least_with < needed(plain, (), 1)
    stage = plan(plain, least_with, with_checkpointing=with_checkpointing)
    assert stage.gradient_checkpointing
    assert stage.rows(LONGEST) >= 1
    with pytest.raises(ValueError, match=r"will do is [\d.]+ \w+$"):
        plan(plain, least_with * 2 // 3, with_checkpointing=with_checkpointing)


def test_evaluations_are_rehearsed_once_for_all_stages(monkeypatch):
    rehearsal = build("bert", fake=False)
    budget = smallest_budget(rehearsal)
    plan(rehearsal, budget)
    forward, modes = rehearsal.model.forward, []

    def count(**batch):
        modes.append(rehearsal.model.training)
        return forward(**batch)

    monkeypatch.setattr(rehearsal.model, "forward", count)
    plan(rehearsal, budget, (0, 1))
    assert modes and all(modes)


def random_costs(draw):
    """A peak as it arises: the maximum over moments of terms with rows and tokens, of coefficients that are not negative."""
    moments = [
        ([draw.choice([0, draw.random()]) for _ in range(3)], [10 * draw.random() for _ in range(3)]) for _ in range(5)
    ]

    def peak(b, n):
        return round(
            max(
                1000 * b * (f[0] + f[1] * n + f[2] * n * n / 20) + 100 * (100 * g[0] + g[1] * n + g[2] * n * n / 50)
                for f, g in moments
            )
        )

    return peak


def test_rows_by_length_are_never_too_many_and_at_the_longest_exact():
    draw = random.Random(0)
    shares, calls = [], []
    for _ in range(200):
        peak, rows, longest = random_costs(draw), draw.randrange(1, 70), draw.randrange(1, 200)
        spared = draw.choice([0, draw.randrange(peak(rows, longest))])
        called = []

        def cost(b, n):
            called.append((b, n))
            return peak(b, n) + (spared if b < rows else 0)

        budget = draw.randrange(peak(1, 1), peak(rows, longest) + 2 * spared + 2)
        found = fit_rows(cost, budget, rows, longest, spared_bytes=spared)
        calls.append(len(called))
        assert len(set(called)) == len(called)
        # Of all the rows at once and of fewer the costs rise; all may cost less than all but one.
        most = [
            rows
            if cost(rows, n) <= budget
            else bisect.bisect_right(range(1, rows), budget, key=lambda b, n=n: cost(b, n))
            for n in range(1, longest + 1)
        ]
        if not found:
            assert most[-1] == 0
            continue
        assert found[-1] == most[-1]
        assert all(1 <= one <= best for one, best in zip(found, most, strict=True))
        assert list(found) == sorted(found, reverse=True)
        shares += [one / best for one, best in zip(found, most, strict=True)]
    assert np.mean(shares) > 0.93
    assert np.mean(calls) < 8


@pytest.mark.parametrize(("power", "share"), [(1, 0.9), (2, 0.5)])
def test_nine_tenths_of_what_fits_are_found_where_tokens_cost_and_half_where_their_squares_do(power, share):
    for budget in (1.1, 1.5, 3, 9, 20, 40):
        there = round(budget * 100**power)
        found = fit_rows(lambda b, n: 10**6 + b * n**power, 10**6 + there, 64, 100)
        for n, rows in enumerate(found[7:], start=8):
            assert rows >= share * min(64, there // n**power)


def test_of_costs_on_a_straight_line_three_are_asked_for():
    asked = []

    def cost(x):
        asked.append(x)
        return 10 + 3 * x

    assert largest_within(cost, 100, 64) == 30
    assert asked == [64, 1, 30]


def test_a_stage_answers_for_lengths_it_was_planned_for():
    stage = Stage(True, 123, (8, 8, 5, 2), (9, 9, 9, 9))
    assert [stage.rows(length) for length in range(5)] == [8, 8, 8, 5, 2]
    assert stage.eval_rows(4) == 9
    with pytest.raises(ValueError, match="a row has 5 tokens, and the memory budget was planned for rows of up to 4"):
        stage.rows(5)
    assert stage.to_dict() == {
        "gradient_checkpointing": True,
        "peak_bytes": 123,
        "rows": [{"tokens": 2, "rows": 8}, {"tokens": 3, "rows": 5}, {"tokens": 4, "rows": 2}],
        "eval_rows": [{"tokens": 4, "rows": 9}],
    }


def test_half_a_stage_has_half_the_rows_and_at_least_one():
    stage = Stage(False, 123, (9, 4, 1), (64, 3, 1))
    assert halved(stage) == replace(stage, most_rows=(4, 2, 1), most_eval_rows=(32, 1, 1))
    least = Stage(False, 123, (1, 1), (1, 1))
    assert halved(least) == least


def test_a_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(2**62, dtype=torch.uint8)
    for error in (too_much.value, MemoryError("host"), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    for error in (RuntimeError("out of range"), ValueError("CUDA error: out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)


def test_a_subject_has_the_labels_that_the_data_have():
    tree = {
        "name": "planned",
        "model": {"path": "shape://bert-base"},
        "data": {"task": "classification", "path": "nowhere.csv", "max_length": 16},
        "adapter": {"rank": 2, "target_modules": ["query"]},
    }
    config = configuration.build(tree)
    assert build_subject(config).notes
    subject = build_subject(config, num_labels=7)
    assert (subject.num_labels, subject.notes) == (7, ())

import io
import json
import os
import random
from itertools import product

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from tiny import FAMILIES

from safe_lab import config as configuration
from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.byte_size import format_bytes
from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.memory import Ledger
from safe_lab.memory.budget import largest_within
from safe_lab.model import checkpoint_gradients, head_modules, load_config
from safe_lab.optimizer import build_optimizer
from safe_lab.plan import find_fit, plan, rows, show, subject
from safe_lab.plan.depths import fill_depths, find_period
from safe_lab.plan.fit import smallest_within

LAYERS, ROWS, TOKENS = 4, 6, 24
SIZES = {
    "hidden_size": 32,
    "pooler_hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "n_embd": 32,
    "n_layer": LAYERS,
    "dim": 32,
    "n_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
}


def save_config(folder, family="bert", **changes):
    """A small model of a family as a folder with a config.json and no weights."""
    name, arguments, _ = FAMILIES[family]
    sizes = {key: value for key, value in SIZES.items() if key in arguments}
    settings = {"pad_token_id": 0, **arguments, **sizes, **changes}
    getattr(transformers, name)(**settings).save_pretrained(folder)
    return folder


def build_config(folder, family="bert", **changes):
    """The configuration of a run; ``changes`` by dotted key with __ for the dot."""
    tree = {
        "name": "planned",
        "model": {"path": str(folder), "attention": "eager"},
        "data": {"task": "sst2", "path": "nowhere.csv", "max_length": TOKENS},
        "adapter": {"rank": 2, "target_modules": FAMILIES[family][2]},
        "training": {"batch_size": ROWS},
    }
    for key, value in changes.items():
        section, field = key.split("__")
        tree.setdefault(section, {})[field] = value
    return configuration.build(tree)


def real_step(config, frozen):
    """Ledger of the second optimizer step on real weights, with Accelerate and a Freezer, as a run does it."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision.replace("none", "no"),
        gradient_accumulation_steps=config.training.gradient_accumulation,
        cpu=True,
    )
    architecture = load_config(config.model.path, num_labels=2, regression=False, pad_token_id=None)
    base = transformers.AutoModelForSequenceClassification.from_config(
        architecture, attn_implementation=config.model.attention, dtype=getattr(torch, config.model.dtype)
    )
    model = attach(base, build_peft_config(**config.adapter.model_dump(), head_modules=head_modules(base))).model
    if config.model.gradient_checkpointing:
        checkpoint_gradients(base)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.training))
    batch = {
        "input_ids": torch.randint(4, 64, (ROWS, TOKENS)),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "labels": torch.randint(2, (ROWS,)),
    }
    batch["attention_mask"][2:, -5:] = 0
    model.eval()
    units = find_units(model, lambda: model(**batch), config.freezing.unit)
    freezer = Freezer(model, units, optimizer, [batch], lambda m, b: m(**b).loss, FreezingRule(policy="none"))

    def step():
        for _ in range(config.training.gradient_accumulation):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.training.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), config.training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

    model.train()
    step()
    freezer._freeze(frozen)
    with Ledger(model, optimizer.optimizer, batch=batch.values()) as ledger:
        step()
    return ledger.trace


def assert_equal_to_real(config, depths):
    planned = plan(config)
    assert not any("Real steps" in note for note in planned.notes)
    for depth in depths:
        row, real = planned.rows[depth], real_step(config, range(depth))
        assert row.peak_bytes - row.bytes["cache"] == pytest.approx(real.peak_bytes, rel=0.01), depth
        assert row.flops == real.flops, depth


def test_a_plan_tells_the_micro_batches_of_a_memory_budget(tmp_path):
    folder = save_config(tmp_path)
    whole = plan(build_config(folder))
    assert whole.stages == ()
    budget = int(0.6 * whole.rows[0].peak_bytes)
    planned = plan(build_config(folder, memory__budget=f"{budget}B"))
    assert planned.rows == whole.rows
    assert [stage.frozen_depth for stage in planned.stages] == [0, 1, 2, 3]
    rows = [stage.micro_batch_rows for stage in planned.stages]
    assert rows == sorted(rows) and 1 <= rows[0] < rows[-1] == ROWS
    assert all(stage.peak_bytes <= budget for stage in planned.stages)
    with pytest.raises(ValueError, match="the smallest that will do is"):
        plan(build_config(folder, memory__budget="1KiB"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_plan_equals_the_real_step(family, checkpointing, tmp_path):
    config = build_config(save_config(tmp_path, family), family, model__gradient_checkpointing=checkpointing)
    assert_equal_to_real(config, [0, LAYERS // 2, LAYERS - 1])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"model__attention": "sdpa"}),
        ("llama", {"model__attention": "sdpa", "model__gradient_checkpointing": True}),
        ("bert", {"model__dtype": "bfloat16"}),
        ("roberta", {"training__mixed_precision": "bf16"}),
        ("gpt2", {"training__gradient_accumulation": 2}),
        ("bert", {"adapter__options": {"use_dora": True}, "training__max_grad_norm": None}),
        ("bert", {"adapter__dropout": 0.1}),
        ("deberta-v2", {}),
        ("modernbert", {"model__attention": "sdpa"}),
    ],
)
def test_a_plan_equals_the_real_step_also_with(family, changes, tmp_path):
    assert_equal_to_real(build_config(save_config(tmp_path, family), family, **changes), [0, 3])


@pytest.mark.parametrize("unit", ["module", "matrix"])
def test_a_plan_by_finer_units_equals_the_real_step(unit, tmp_path):
    assert_equal_to_real(build_config(save_config(tmp_path), freezing__unit=unit), [1, 4, 5])


def test_a_step_of_several_micro_steps_holds_gradients_and_does_the_flops_of_all(tmp_path):
    folder = save_config(tmp_path)
    single = plan(build_config(folder)).rows
    several = plan(build_config(folder, training__gradient_accumulation=3)).rows
    for one, three in zip(single, several, strict=True):
        assert three.flops_per_step == 3 * one.flops_per_step
        assert three.bytes["gradients"] == 4 * three.trainable_parameters > one.bytes["gradients"]
        assert three.peak_bytes > one.peak_bytes


def test_freezing_saves_activations_from_the_input_and_nowhere_else(tmp_path):
    rehearsal = subject.build_subject(build_config(save_config(tmp_path))).rehearsal
    activations = {
        frozen: rehearsal.trace(frozen, rows=ROWS).peak["activations"]
        for frozen in [(), (0,), (0, 1), (1,), (2,), (1, 2)]
    }
    share = activations[(0,)] - activations[(0, 1)]
    assert share > activations[()] / 10
    for frozen in [(1,), (2,), (1, 2)]:
        # Only what the gradients of its own weights needed: the layer's input.
        assert activations[()] - activations[frozen] < 0.07 * share * len(frozen)


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("bert", 8, {}),
        ("bert", 6, {"freezing__unit": "module", "model__attention": "sdpa"}),
        ("llama", 8, {"model__attention": "sdpa"}),
        ("gpt2", 8, {"model__gradient_checkpointing": True, "training__mixed_precision": "bf16"}),
    ],
)
def test_rows_that_follow_equal_those_that_are_measured(family, layers, changes, tmp_path, monkeypatch):
    size = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = build_config(save_config(tmp_path, family, **{size: layers}), family, **changes)
    quick = plan(config)
    assert not all(row.measured for row in quick.rows)
    monkeypatch.setattr(rows, "find_period", lambda *_: None)
    slow = plan(config)
    assert all(row.measured for row in slow.rows)
    for first, second in zip(quick.rows, slow.rows, strict=True):
        assert {**vars(first), "measured": True} == vars(second)


def test_depths_are_filled_in_only_where_the_midpoint_lies_on_the_chord():
    measured = []

    def measure(depth):
        measured.append(depth)
        return {"peak": max(1000 - 10 * depth, 500 - 4 * depth, 330), "odd": 7}

    filled, known = fill_depths(100, 1, measure)
    assert sorted(known) == sorted(set(measured)) == sorted(measured)
    assert len(known) < 30
    assert [figures["peak"] for figures in filled] == [max(1000 - 10 * d, 500 - 4 * d, 330) for d in range(101)]


def test_each_place_in_a_layer_has_a_chord_of_its_own():
    def cost(depth):
        return {"peak": 1000 - 7 * (depth // 2) - 3 * (depth % 2)}

    filled, known = fill_depths(64, 2, cost)
    assert filled == [cost(depth) for depth in range(65)]
    assert len(known) == 8
    assert len(fill_depths(64, None, cost)[1]) == 65
    assert len(fill_depths(1, None, cost)[0]) == 2


def test_a_model_that_breaks_the_rule_is_measured_at_every_depth_and_says_so(tmp_path, monkeypatch):
    config = build_config(save_config(tmp_path, num_hidden_layers=8))
    build = subject._build_base

    def with_a_wider_layer(config, device):
        base, heads = build(config, device)
        with torch.device(device):
            wider = type(base.config)(**base.config.to_dict() | {"intermediate_size": 96})
            wider._attn_implementation = "eager"
            base.bert.encoder.layer[3] = type(base.bert.encoder.layer[3])(wider)
        return base, heads

    monkeypatch.setattr(subject, "_build_base", with_a_wider_layer)
    planned = plan(config)
    assert all(row.measured for row in planned.rows)
    assert "All 9 depths were measured: the layers of this model differ" in planned.notes[0]


@pytest.mark.parametrize(("unit", "period"), [("layer", 1), ("module", 2), ("matrix", 4)])
def test_a_period_is_the_number_of_units_in_a_layer(unit, period, tmp_path):
    config = build_config(save_config(tmp_path, num_hidden_layers=6), freezing__unit=unit)
    rehearsal = subject.build_subject(config).rehearsal
    assert find_period(rehearsal.model, rehearsal.units) == period


def test_checkpoint_and_cache_are_as_large_as_those_of_a_run(tiny_tree):
    from safe_lab import checkpoint
    from safe_lab.run import run

    config = configuration.build(tiny_tree | {"freezing": {"policy": "none"}})
    row = plan(config).rows[0]
    run(config)
    tensors, state = checkpoint.load(checkpoint.steps(config.run_folder / "checkpoints")[-1])
    optimizer = [value for one in state["optimizer"]["state"].values() for value in one.values()]
    start = [value for one in state["freezer"]["start"].values() for value in one["parameters"].values()]
    best = [tensor for name, tensor in tensors.items() if name.startswith("best.")]
    assert row.checkpoint_bytes == sum(tensor.nbytes for tensor in (*tensors.values(), *optimizer, *start))
    assert row.optimizer_bytes == sum(tensor.nbytes for tensor in optimizer)
    assert row.bytes["cache"] == sum(tensor.nbytes for tensor in (*best, *start))


def test_the_head_has_the_size_that_labels_or_task_give(tmp_path):
    folder = save_config(tmp_path)
    for changes, labels in [
        ({}, 2),
        ({"data__task": "mnli"}, 3),
        ({"data__task": "stsb"}, 1),
        ({"data__task": "classification", "data__labels": ["a", "b", "c", "d"]}, 4),
    ]:
        planned = plan(build_config(folder, **changes))
        assert planned.step["labels"] == labels
        assert planned.rows[-1].trainable_parameters == 32 * labels + labels


def test_a_model_that_does_not_run_without_weights_is_measured_with_random_ones_and_says_so(
    tmp_path, monkeypatch, caplog
):
    config = build_config(save_config(tmp_path))
    without = plan(config)
    forward = transformers.BertModel.forward

    def look(self, input_ids, **arguments):
        input_ids.sum().item()
        return forward(self, input_ids, **arguments)

    monkeypatch.setattr(transformers.BertModel, "forward", look)
    planned = plan(config)
    assert "Real steps were measured" in planned.notes[0]
    assert [row.flops for row in planned.rows] == [row.flops for row in without.rows]
    assert planned.rows[0].peak_bytes == pytest.approx(without.rows[0].peak_bytes, rel=0.01)

    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    with pytest.raises(ValueError, match="that its weights take this machine has 1 B"):
        plan(config)
    monkeypatch.undo()
    monkeypatch.setattr(transformers.BertModel, "forward", lambda *_, **__: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(
        ValueError, match="neither without weights .* nor with random ones .RuntimeError: mat1 and mat2"
    ):
        plan(config)
    assert not caplog.records


def test_starts_that_need_weights_are_planned_as_plain_lora(tmp_path):
    folder = save_config(tmp_path)
    pissa = plan(build_config(folder, adapter__options={"init_lora_weights": "pissa"}))
    assert "Planned as plain LoRA" in pissa.notes[0]
    assert pissa.rows == plan(build_config(folder)).rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__path": "shape://roberta-larg"}, "did you mean roberta-large"),
        ({"model__path": "nowhere/at-all"}, "roberta-large"),
        ({"data__max_length": 64}, "data.max_length is 64, and the model takes 40 tokens"),
        ({"adapter__target_modules": ["querry"]}, "did you mean query"),
        ({"adapter__method": "prompt_tuning", "adapter__options": {"num_virtual_tokens": 2}}, "adapter"),
    ],
)
def test_what_cannot_be_planned_for_is_told(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(build_config(save_config(tmp_path), **changes))


def test_a_fit_was_measured_to_fit_and_the_next_larger_not_to(tmp_path):
    folder = save_config(tmp_path, num_hidden_layers=2)
    config = build_config(folder, training__batch_size=3, training__gradient_accumulation=4)
    budget = plan(build_config(folder, training__batch_size=12)).rows[0].peak_bytes // 2
    fit = find_fit(config, budget)
    settings = [
        {"dtype": option.dtype, "gradient_checkpointing": option.gradient_checkpointing} for option in fit.options
    ]
    assert [tuple(one.values()) for one in settings] == list(product(["float32", "bfloat16"], [False, True]))
    partly = 0
    for option, one in zip(fit.options, settings, strict=True):
        built = subject.build_subject(config.model_copy(update={"model": config.model.model_copy(update=one)}))

        def peak(depth, rows, built=built):
            return built.rehearsal.trace(range(depth), rows=rows, accumulating=rows < 12).peak_bytes + built.kept_bytes

        assert [largest.frozen_depth for largest in option.largest] == [0, 1, 2]
        for largest in option.largest:
            assert peak(largest.frozen_depth, largest.batch_size) == largest.peak_bytes <= budget
            if largest.batch_size < 12:
                partly += 1
                assert peak(largest.frozen_depth, largest.batch_size + 1) > budget
        assert peak(option.smallest_frozen_depth, 3) <= budget
        assert option.smallest_frozen_depth == 0 or peak(option.smallest_frozen_depth - 1, 3) > budget
    assert partly
    assert fit.advice.batch_size * fit.advice.gradient_accumulation == 12
    assert (fit.advice.dtype, fit.advice.gradient_checkpointing, fit.advice.frozen_depth) == ("float32", False, 0)
    assert fit.advice.batch_size <= fit.options[0].largest[0].batch_size
    assert f"training.batch_size={fit.advice.batch_size} " in fit.sentence

    planned, printed = plan(config), io.StringIO()
    show.print_tables(planned, fit, Console(file=printed, width=160))
    cells = [f"{largest.batch_size} ({format_bytes(largest.peak_bytes)})" for largest in fit.options[0].largest]
    for part in (*cells, fit.sentence, *planned.notes, "what fits "):
        assert part in printed.getvalue(), part
    assert json.loads(show.to_json(planned, fit))["fit"]["advice"]["batch_size"] == fit.advice.batch_size


def test_where_nothing_fits_a_fit_says_what_the_least_is(tmp_path):
    fit = find_fit(build_config(save_config(tmp_path, num_hidden_layers=2)), 1000)
    assert fit.advice is None
    assert {option.smallest_frozen_depth for option in fit.options} == {None}
    assert {largest.batch_size for option in fit.options for largest in option.largest} == {0}
    least = min(largest.peak_bytes for option in fit.options for largest in option.largest)
    assert fit.sentence == f"Nothing fits 1000 B: a single row takes {format_bytes(least)} at the least."


def test_what_fits_only_once_frozen_is_no_advice(tmp_path):
    config = build_config(save_config(tmp_path, num_hidden_layers=2), training__batch_size=1)
    most = {depth: plan(config).rows[depth].peak_bytes for depth in (0, 2)}
    budget = most[2] + 1
    least_at_start = min(option.largest[0].peak_bytes for option in find_fit(config, 10**12).options)
    if least_at_start <= budget:
        budget = least_at_start - 1
    fit = find_fit(config, budget)
    assert fit.advice is None
    assert "while nothing is frozen" in fit.sentence and "frozen units on" in fit.sentence


def test_the_search_finds_the_last_that_fits():
    random.seed(0)
    for _ in range(200):
        slopes = sorted(random.randrange(1, 20) for _ in range(3))
        most, budget = random.randrange(1, 70), random.randrange(400)

        def cost(x, slopes=slopes):
            return max(30 + slopes[0] * x, 10 + slopes[1] * x, slopes[2] * x - 40)

        assert largest_within(cost, budget, most) == sum(cost(x) <= budget for x in range(1, most + 1))
        falling = [1000 - cost(x) for x in range(most + 1)]
        expected = next((x for x, value in enumerate(falling) if value <= budget), None)
        assert smallest_within(falling.__getitem__, budget, most) == expected


@pytest.mark.slow
def test_roberta_large_costs_what_was_measured_once():
    config = build_config(
        "shape://roberta-large",
        data__max_length=128,
        training__batch_size=32,
        adapter__rank=8,
        adapter__target_modules=["query", "value"],
    )
    planned = plan(config)
    assert sum(row.measured for row in planned.rows) < 13
    for depth, gib, tflop in [(0, 8.199, 5.095), (12, 4.831, 3.800), (18, 3.141, 3.153)]:
        row = planned.rows[depth]
        assert (row.peak_bytes - row.bytes["cache"]) / 2**30 == pytest.approx(gib, abs=1e-3)
        assert row.flops_per_step / 1e12 == pytest.approx(tflop, abs=1e-3)

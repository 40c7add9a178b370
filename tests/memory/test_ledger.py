"""The ledger against hand counts, against the allocator, and against what autograd says it saved."""

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.memory import KINDS, Ledger
from safe_lab.model import checkpoint_gradients


def build(family="bert", *, tokens=24, examples=8, checkpointing=False, **changes):
    """Model with LoRA, optimizer with its state there, batch."""
    model = tiny_model(family, **changes)
    config = build_peft_config("lora", rank=4, target_modules=FAMILIES[family][2], head_modules=["classifier"])
    model = attach(model, config).model.train()
    if checkpointing:
        checkpoint_gradients(model.base_model.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = tiny_batch(examples=examples, tokens=tokens)
    step(model, optimizer, batch)
    return model, optimizer, batch


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def traced(model, optimizer, batch):
    with Ledger(model, optimizer, batch=batch.values()) as ledger:
        step(model, optimizer, batch)
    return ledger.trace


def freeze(model, optimizer, units):
    for unit in units:
        for parameter in unit.parameters.values():
            parameter.requires_grad, parameter.grad = False, None
            optimizer.state.pop(parameter, None)


def test_a_linear_map_and_a_square_come_to_the_bytes_counted_by_hand():
    model = nn.Linear(3, 5, bias=False)  # 60 bytes
    x = torch.ones(4, 3)  # 48 bytes
    with Ledger(model, batch=[x]) as ledger:
        y = model(x)  # 80 bytes, kept by the square
        loss = y.square().sum()  # 80 bytes that die at the sum, then 4
        loss.backward()
    trace = ledger.trace
    assert trace.held == dict.fromkeys(KINDS, 0) | {"parameters": 60, "temporary": 48}
    # In the backward pass of the square: y, the loss, and the 1 that autograd starts from were made before it; x is the
    # batch; the square's own three operators make y^1, then 2 y^1, then that times the gradient, a view of the 1.
    assert trace.peak == dict.fromkeys(KINDS, 0) | {
        "parameters": 60,
        "activations": 80 + 4 + 4,
        "temporary": 48 + 3 * 80,
    }
    assert trace.peak_bytes == sum(trace.peak.values())
    # 4 x 3 x 5 multiply-adds forward; the weight's gradient is as many, and x needs none.
    assert trace.flops == {"forward": 120, "backward": 120}


def test_a_storage_counts_once_however_many_views_it_has():
    model = nn.Linear(2, 2)
    with Ledger(model) as ledger:
        x = torch.zeros(1000)
        views = [x.view(10, 100), x[5:], x.reshape(100, 10).t()]
        x.add_(1)
    assert ledger.trace.peak["temporary"] == 4000
    del views


def test_a_frozen_weight_with_a_tied_twin_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    with Ledger(model) as ledger:
        pass
    assert ledger.trace.held["parameters"] == 8 * 8 * 4


def test_gradients_and_optimizer_state_are_told_apart():
    model, optimizer, batch = build()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trace = traced(model, optimizer, batch)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert trace.held["optimizer"] == sum(value.nbytes for value in moments) > 8 * trainable
    with Ledger(model, optimizer) as ledger:
        model(**batch).loss.backward()
    with Ledger(model, optimizer) as holding:
        pass
    assert holding.trace.held["gradients"] == 4 * trainable
    assert ledger.trace.held["gradients"] == 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_activations_are_what_autograd_saved(family):
    model, optimizer, batch = build(family)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    expected = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    loss.backward()
    optimizer.zero_grad()
    # The backward pass takes activations down from where the forward pass left them; logits and masks come on top.
    with Ledger(model, optimizer, batch=batch.values()) as ledger:
        loss = model(**batch).loss
        at_the_turn = sum(entry.nbytes for _, entry in ledger._live.values() if entry.kind is None and entry.born > 0)
        loss.backward()
    assert expected <= at_the_turn <= 1.02 * expected
    assert ledger.trace.peak["activations"] == pytest.approx(expected, rel=0.1)


def allocator_peak(run):
    """Peak of what torch's own profiler sees allocated, over what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_peak_is_the_allocators(family, checkpointing):
    model, optimizer, batch = build(family, checkpointing=checkpointing, examples=16, tokens=36)
    trace = traced(model, optimizer, batch)
    allocated = allocator_peak(lambda: step(model, optimizer, batch))
    # The allocator sees the scratch space inside operators too.
    assert trace.peak_bytes - sum(trace.held.values()) == pytest.approx(allocated, rel=0.05)


def test_the_ledger_leaves_no_trace_in_what_it_watches():
    results = []
    for watched in (False, True):
        model, optimizer, batch = build()
        for _ in range(3):
            torch.manual_seed(1)
            if watched:
                traced(model, optimizer, batch)
            else:
                step(model, optimizer, batch)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fused_attention_on_cpu_is_counted_as_the_eager_one():
    flops = {}
    for attention in ("eager", "sdpa"):
        model, optimizer, batch = build(attn_implementation=attention, attention_probs_dropout_prob=0.0)
        flops[attention] = traced(model, optimizer, batch).flops
    assert flops["sdpa"]["forward"] == flops["eager"]["forward"]
    # Fused attention computes the scores again in the backward pass: one of five products more than the eager one's four.
    assert flops["sdpa"]["backward"] > flops["eager"]["backward"]


def test_only_the_frozen_run_from_the_input_frees_activations():
    def activations(frozen):
        model, optimizer, batch = build(num_hidden_layers=6, attn_implementation="eager")
        freeze(model, optimizer, [find_units(model, lambda: model(**batch))[i] for i in frozen])
        trace = traced(model, optimizer, batch)
        return trace.peak["activations"], trace.flops["backward"]

    (all_live, flops_live), (one, _), (two, _) = (activations(frozen) for frozen in ([], [0], [0, 1]))
    share = one - two  # of a layer in the frozen run
    assert share > all_live / 10
    middle, flops_middle = activations([3])
    # A layer in the middle frees the inputs of its LoRA weights at most: not a tenth of its share.
    assert all_live - middle < share / 10
    assert flops_middle < flops_live  # its own weight gradients are gone all the same
    in_the_run, _ = activations([0, 1, 2, 3])
    without, _ = activations([0, 1, 2])
    assert without - in_the_run == pytest.approx(share, rel=0.01)


def test_checkpointing_keeps_less_and_its_recomputation_is_counted():
    plain = traced(*build(num_hidden_layers=6))
    recomputed = traced(*build(num_hidden_layers=6, checkpointing=True))
    assert recomputed.peak["activations"] < plain.peak["activations"] / 2
    assert recomputed.flops["forward"] == plain.flops["forward"]
    # Each layer once more; embeddings and head are not recomputed.
    assert 0.9 < (recomputed.flops["backward"] - plain.flops["backward"]) / plain.flops["forward"] <= 1.0


def test_the_mean_lies_between_what_is_always_there_and_the_peak():
    trace = traced(*build())
    assert sum(trace.held.values()) < trace.mean_bytes < trace.peak_bytes
    assert trace.mean["parameters"] == pytest.approx(trace.held["parameters"])


def test_a_failed_step_leaves_no_hooks_and_the_ledger_can_be_left():
    model, optimizer, batch = build()
    with pytest.raises(RuntimeError, match="on purpose"), Ledger(model, optimizer) as ledger:
        model(**batch)
        raise RuntimeError("on purpose")
    assert not optimizer._optimizer_step_pre_hooks
    assert ledger.trace.total_flops > 0


def test_a_ledger_tells_nothing_before_it_is_left():
    with Ledger(nn.Linear(2, 2)) as ledger, pytest.raises(RuntimeError, match="once it has been left"):
        _ = ledger.trace

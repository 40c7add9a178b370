import copy
import logging

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_batch, tiny_model
from torch import nn

from safe_lab.adapters import attach, find_units
from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.memory import Ledger
from safe_lab.policy import PredictedSavings
from safe_lab.units import Unit

ONLY_THE_LAST_PAYS = PredictedSavings([0, 1, 2, 3, 4], [1, 1, 1, 9])
NEVER_NEGATIVE_RULE = FreezingRule(metric="depth", warmup=1, final=2, final_threshold=2.5)


class Residual(nn.Module):
    """A plain residual layer with a bottleneck adapter of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(size, 2), nn.ReLU(), nn.Linear(2, size))

    def forward(self, x):
        return x + torch.tanh(self.base(x)) + self.adapter(x)


def bare_loop(*, rule=NEVER_NEGATIVE_RULE, epochs=4, freeze=True, seed=0, savings=None):
    """A plain PyTorch loop: no PEFT, no Accelerate, no configuration."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(Residual(6) for _ in range(4)), nn.Linear(6, 2))
    data = torch.randn(32, 6), torch.randint(0, 2, (32,))
    units = [
        Unit(f"layer{i}", i, {f"{i}.{n}": p for n, p in model[i].adapter.named_parameters()}, model[i])
        for i in range(4)
    ]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)

    def loss_function(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    probe = [{"x": data[0][:8], "y": data[1][:8]}]
    freezer = Freezer(model, units, optimizer, probe, loss_function, rule, savings=savings)
    history = []
    for epoch in range(epochs):
        for i in range(0, 32, 8):
            loss_function(model, {"x": data[0][i : i + 8], "y": data[1][i : i + 8]}).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if freeze:
            history.append((freezer.step(4 * (epoch + 1)), copy.deepcopy(model.state_dict())))
    return model, optimizer, freezer, history


def test_frozen_weights_do_not_move_by_a_bit_after_their_event():
    model, _, freezer, history = bare_loop()
    assert [scoring.froze for scoring, _ in history] == [[], [0, 1], [], []]
    _, at_event = history[1]
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, at_event[name])
        frozen = name.startswith(("0.adapter", "1.adapter"))
        assert moved == (not frozen and "base" not in name), name


def test_a_freeze_event_leaves_the_moments_of_the_others_and_drops_its_own():
    model, optimizer, freezer, _ = bare_loop(epochs=1)
    before = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    groups = [list(group["params"]) for group in optimizer.param_groups]
    freezer.step(8)
    frozen = {p for unit in freezer.units[:2] for p in unit.parameters.values()}
    assert frozen
    assert set(optimizer.state) == set(before) - frozen
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(value, before[parameter][key])
    assert [list(group["params"]) for group in optimizer.param_groups] == groups
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_the_optimizer_bytes_of_what_froze_are_gone_from_the_ledger():
    model, optimizer, freezer, _ = bare_loop(epochs=1)

    def held_bytes():
        with Ledger(model, optimizer) as ledger:
            pass
        return ledger.trace.held["optimizer"]

    before = held_bytes()
    dropped = sum(
        value.nbytes
        for unit in freezer.units[:2]
        for parameter in unit.parameters.values()
        for value in optimizer.state[parameter].values()
    )
    assert freezer.step(8).froze == [0, 1]
    assert held_bytes() == before - dropped < before


def test_the_learning_rate_schedule_goes_on_over_a_freeze_event():
    def learning_rates(*, freeze):
        _, optimizer, freezer, _ = bare_loop(epochs=1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        rates = []
        for step in range(10):
            optimizer.step()
            scheduler.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
            if freeze and step == 4:
                assert freezer.step(8).froze == [0, 1]
        return rates

    assert learning_rates(freeze=True) == learning_rates(freeze=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_gradients_of_an_uncompiled_one_after_a_freeze_event(backend):
    gradients = []
    for compiled in (False, True):
        model, optimizer, freezer, _ = bare_loop(epochs=1)
        forward = torch.compile(model, backend=backend) if compiled else model
        data = torch.linspace(-1, 1, 18).view(3, 6)
        forward(data).square().sum().backward()
        optimizer.zero_grad()
        assert freezer.step(8).froze == [0, 1]
        forward(data).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, of_compiled = gradients
    assert {name for name, gradient in plain.items() if gradient is not None} == {
        name for name in plain if name.startswith(("2.adapter", "3.adapter", "4."))
    }
    torch.testing.assert_close(of_compiled, plain)


def test_dynamo_forgets_its_graphs_at_a_freeze_event_if_it_has_any(monkeypatch):
    import torch._dynamo

    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(None))
    monkeypatch.setattr(torch._dynamo.utils, "counters", {})
    assert bare_loop(epochs=2)[2].frozen_depth == 2
    assert resets == []
    monkeypatch.undo()

    model, optimizer, freezer, _ = bare_loop(epochs=1)
    torch.compile(model, backend="eager")(torch.ones(2, 6))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(None))
    assert freezer.step(8).froze
    assert len(resets) == 1
    assert not freezer.step(12).froze
    assert len(resets) == 1
    model[0].adapter[0].weight.requires_grad = True
    optimizer.step()
    assert len(resets) == 2


def test_without_freezing_the_loop_is_untouched():
    plain, *_ = bare_loop(freeze=False)
    scored, *_ = bare_loop(rule=FreezingRule(policy="none"))
    rescored, *_ = bare_loop(rule=FreezingRule(metric="sensitivity", final_threshold=1e-30))
    for model in (scored, rescored):
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def test_what_turns_a_frozen_weight_back_on_cannot_move_it(caplog):
    model, optimizer, freezer, history = bare_loop()
    weight = model[0].adapter[0].weight
    before = weight.detach().clone()
    weight.requires_grad = True
    model(torch.randn(3, 6)).sum().backward()
    assert weight.grad is not None
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert torch.equal(weight, before)
    assert not weight.requires_grad
    assert "frozen again" in caplog.text


def test_peft_disable_adapter_does_not_undo_the_freeze():
    base = tiny_model()
    peft_model = attach(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).model
    batch = tiny_batch()
    units = find_units(peft_model, lambda: peft_model(**batch))
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-2)
    freezer = Freezer(
        peft_model,
        units,
        optimizer,
        [batch],
        lambda m, b: m(**b).loss,
        FreezingRule(metric="depth", warmup=0, final=1, final_threshold=2.5),
    )
    peft_model(**batch).loss.backward()
    optimizer.step()
    assert freezer.step(1).froze == [0, 1]
    frozen = [p for unit in units[:2] for p in unit.parameters.values()]
    before = [p.detach().clone() for p in frozen]
    with peft_model.disable_adapter():
        pass
    peft_model(**batch).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))


def test_the_paper_rule_freezes_real_adapters_by_cka_in_a_bare_loop():
    peft_model = attach(tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])).model
    batch = tiny_batch(examples=8)
    units = find_units(peft_model, lambda: peft_model(**batch))
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=5e-2)
    freezer = Freezer(
        peft_model,
        units,
        optimizer,
        [batch],
        lambda m, b: m(**b).loss,
        FreezingRule(normalize="max", warmup=1, final=3, final_threshold=0.9),
    )
    scorings = []
    for step in range(1, 5):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scorings.append(freezer.step(step))
    assert scorings[0].froze == []
    assert freezer.frozen_share > 0
    for scoring in scorings:
        assert scoring.froze == [i for i in scoring.froze if scoring.normalized[i] < scoring.level]


def test_a_weight_that_units_share_freezes_with_the_last_of_them():
    shared = nn.Parameter(torch.ones(3))
    model = nn.ParameterList([shared, nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])
    units = [Unit("a", 0, {"shared": shared, "own": model[1]}), Unit("b", 1, {"shared": shared, "own": model[2]})]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = FreezingRule(metric="depth", warmup=0, final=2, curve="linear", final_threshold=2.5)
    freezer = Freezer(model, units, optimizer, [{"x": torch.ones(1)}], lambda m, b: sum(p.sum() for p in m), rule)
    assert freezer.step(1).froze == [0]
    assert shared.requires_grad
    assert not model[1].requires_grad
    assert freezer.step(2).froze == [1]
    assert not shared.requires_grad


@pytest.mark.parametrize(
    ("policy", "metric", "options"),
    [
        ("safe", "sensitivity", {"smoothing": True}),
        ("safe", "update_norm", {}),
        ("safe", "random", {}),
        ("budget", "sensitivity", {"smoothing": True}),
        ("budget", "random", {}),
    ],
)
def test_resumed_decisions_are_those_of_an_uninterrupted_run(policy, metric, options):
    rule = FreezingRule(
        policy=policy,
        metric=metric,
        metric_options=options,
        normalize="rank",
        warmup="stable",
        stable_share=1e9,
        final=6,
        final_threshold=0.9,
        final_importance=0.6,
    )
    _, _, alone, history = bare_loop(rule=rule, epochs=6)
    model, optimizer, half, _ = bare_loop(rule=rule, epochs=3)
    saved = torch.load(_saved({"model": model.state_dict(), "freezer": half.state_dict()}), weights_only=True)
    fresh, _, resumed, _ = bare_loop(rule=rule, epochs=0)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["freezer"])
    assert resumed.frozen == half.frozen
    for unit, frozen in zip(resumed.units, resumed.frozen, strict=True):
        assert all(p.requires_grad != frozen for p in unit.parameters.values())
    # The same weights, so the same next scoring: by the one that was saved, and by the one that loaded.
    one, other = half.step(16), resumed.step(16)
    assert one.scores == other.scores
    assert one.froze == other.froze
    assert one.update_norms == other.update_norms
    assert history[2][0].t + 1 == other.t


def test_a_saved_state_does_not_change_with_the_run_and_cannot_thaw():
    rule = FreezingRule(
        metric="sensitivity", metric_options={"smoothing": True}, normalize="rank", final=2, final_threshold=0.6
    )
    _, _, freezer, _ = bare_loop(rule=rule, epochs=1)
    state = freezer.state_dict()
    before = {name: value.clone() for name, value in state["memory"].items() if isinstance(value, torch.Tensor)}
    assert freezer.step(8).froze
    assert all(torch.equal(state["memory"][name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="freezing is for good"):
        freezer.load_state_dict(state)


def _saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_of_other_units_is_refused():
    _, _, freezer, _ = bare_loop(epochs=1)
    state = freezer.state_dict() | {"units": ["other"]}
    with pytest.raises(ValueError, match="other units"):
        freezer.load_state_dict(state)


def test_a_nan_score_stops_and_names_unit_and_step_and_freezes_nothing():
    model, _, freezer, _ = bare_loop(
        rule=FreezingRule(metric="gradient_ratio", warmup=0, final=1, final_threshold=100.0), epochs=0
    )
    with torch.no_grad():
        model[2].adapter[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient_ratio of unit layer\d is nan at step 7"):
        freezer.step(7)
    assert not any(freezer.frozen)


def test_warm_up_until_stable_ends_when_no_score_changes():
    _, _, freezer, history = bare_loop(
        rule=FreezingRule(metric="depth", warmup="stable", final=3, curve="linear", final_threshold=2.5), epochs=4
    )
    assert [scoring.warmup_end for scoring, _ in history] == [None, 2, 2, 2]
    assert [scoring.froze for scoring, _ in history] == [[], [], [0, 1], []]


def test_scores_are_kept_from_the_end_of_warm_up_when_not_refreshed():
    rule = FreezingRule(metric="random", warmup=2, final=5, final_threshold=0.5, refresh=False)
    _, _, _, history = bare_loop(rule=rule, epochs=5)
    scores = [scoring.scores for scoring, _ in history]
    assert scores[0] != scores[1]
    assert scores[1] == scores[2] == scores[3] == scores[4]


@pytest.mark.parametrize("normalize", ["none", "max"])
def test_the_budget_rises_on_the_schedule_and_freezes_what_it_covers(normalize):
    # Scores 1, 2, 3, 4: shares 0.1, 0.2, 0.3, 0.4.
    rule = FreezingRule(
        policy="budget", metric="depth", normalize=normalize, warmup=1, final=4, curve="linear", final_importance=0.6
    )
    _, _, freezer, history = bare_loop(rule=rule, epochs=5)
    assert [scoring.level for scoring, _ in history] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.6])
    assert [scoring.froze for scoring, _ in history] == [[], [0], [1], [2], []]
    assert freezer.frozen_depth == 3


def test_the_budget_weighs_the_savings_it_is_given():
    rule = FreezingRule(policy="budget", metric="depth", warmup=0, final=1, final_importance=0.4)
    assert bare_loop(rule=rule, epochs=1)[3][0][0].froze == [0, 1]
    assert bare_loop(rule=rule, epochs=1, savings=ONLY_THE_LAST_PAYS)[3][0][0].froze == [3]


def test_the_budget_keeps_what_the_run_will_need():
    rule = FreezingRule(policy="budget", metric="depth", warmup=0, final=4, curve="linear", final_importance=0.4)
    _, _, freezer, history = bare_loop(rule=rule, savings=ONLY_THE_LAST_PAYS)
    assert [scoring.froze for scoring, _ in history] == [[], [], [], [3]]
    assert (
        "raise final_importance, or lower final"
        in bare_loop(rule=rule, savings=ONLY_THE_LAST_PAYS, epochs=2)[2].explain_idle()
    )


def test_savings_of_other_units_are_refused():
    with pytest.raises(ValueError, match="savings are of 2 units, and there are 4"):
        bare_loop(savings=PredictedSavings([0, 1, 2], [1, 1]))


def test_the_budget_waits_for_scores_to_settle_and_may_keep_them():
    rule = FreezingRule(
        policy="budget",
        metric="random",
        warmup="stable",
        stable_share=1e9,
        final=5,
        final_importance=0.9,
        refresh=False,
    )
    _, _, freezer, history = bare_loop(rule=rule, epochs=5)
    assert [scoring.warmup_end for scoring, _ in history] == [None, 2, 2, 2, 2]
    assert history[1][0].scores == history[4][0].scores
    assert freezer.frozen_share > 0


def test_a_budget_that_decides_nothing_or_everything_is_told(caplog):
    rule = FreezingRule(policy="budget", metric="depth", warmup=1, final=2, final_importance=0.05)
    assert "the budget is 0.05 of all importance, and the smallest share of a unit 0.1;" in (
        bare_loop(rule=rule)[2].explain_idle()
    )
    rule = FreezingRule(policy="budget", metric="depth", warmup=1, final=2, final_importance=0.5)
    assert "would save nothing" in bare_loop(rule=rule, savings=PredictedSavings([0] * 5, [0] * 4))[2].explain_idle()
    with caplog.at_level(logging.WARNING):
        bare_loop(rule=FreezingRule(policy="budget", metric="depth", warmup=1, final=2, final_importance=1.0))
    assert "freezes all 4 units at once: the budget of 1 covers all importance" in caplog.text


def test_a_threshold_that_decides_nothing_or_everything_is_told(caplog):
    _, _, freezer, _ = bare_loop(rule=FreezingRule(metric="depth", warmup=1, final=2, final_threshold=0.5))
    assert "the threshold is 0.5, and the smallest score 1;" in freezer.explain_idle()
    _, _, freezer, _ = bare_loop(rule=FreezingRule(metric="random", warmup="stable", stable_share=1e-6, final=3))
    assert "never settled" in freezer.explain_idle()
    _, _, freezer, _ = bare_loop(rule=FreezingRule(policy="prefix", final=3, final_share=0.0))
    assert "the schedule stands at 0.0" in freezer.explain_idle()
    with caplog.at_level(logging.WARNING):
        _, _, freezer, _ = bare_loop(rule=FreezingRule(metric="depth", warmup=1, final=2, final_threshold=99.0))
    assert "freezes all 4 units at once" in caplog.text
    assert freezer.explain_idle() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalize": "ranks"},
        {"warmup": "stabel"},
        {"warmup": -3},
        {"warmup": 9, "final": 2},
        {"stable_share": -1.0},
        {"stairs": 0},
        {"final_share": 2.0},
        {"final_importance": -0.1},
        {"policy": "prefix", "warmup": "stable"},
        {"metric_options": {"pool": "first"}},
    ],
)
def test_a_rule_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=".+"):
        FreezingRule(**wrong)


def test_an_unknown_name_in_the_rule_is_refused_with_the_near_name():
    with pytest.raises(ValueError, match="'fischer' is no metric; did you mean fisher"):
        FreezingRule(metric="fischer")


def test_policies_without_scores_never_run_the_probe():
    model, _, freezer, history = bare_loop(
        rule=FreezingRule(policy="prefix", warmup=1, final=3, curve="linear", final_share=0.5), epochs=3
    )
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    scoring = freezer.step(99)
    assert calls == []
    assert scoring.scores is None
    assert [s.froze for s, _ in history] == [[], [0], [1]]

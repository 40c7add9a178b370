"""Fold, prefix, cache and memory budget in a run: what changes, and what must not."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_run import bits, config_of
from tiny import save_tiny_model

from safe_lab import config as configuration
from safe_lab.adapters import attach
from safe_lab.byte_size import parse_bytes
from safe_lab.plan.stages import Planner
from safe_lab.resources import Meter
from safe_lab.run import run
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError

FREEZE = {"policy": "prefix", "curve": "constant", "warmup": 1, "final": 3, "final_share": 0.7, "interval": 3}


def trained(tree, variant, **sections):
    """Result, adapter, and rows of a run."""
    config = config_of({"savings": {}, "memory": {}} | tree, variant=variant, **({"freezing": FREEZE} | sections))
    result = run(config)
    return result, load_file(config.run_folder / "adapter" / "adapter_model.safetensors"), config.run_folder


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(params=["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama"])
def family_tree(request, tiny_tree, tmp_path):
    """A run of each family, its dropout as it comes."""
    from tiny import FAMILIES

    tiny_tree["model"] = {"path": str(save_tiny_model(tmp_path / request.param, request.param))}
    tiny_tree["adapter"] = tiny_tree["adapter"] | {"target_modules": FAMILIES[request.param][2]}
    return tiny_tree


def test_a_run_with_the_cache_has_the_bits_of_one_without(family_tree):
    cached, adapter, folder = trained(family_tree, "cached")
    computed, other, _ = trained(family_tree, "computed", savings={"cache": False})
    assert cached.savings["cached_examples"] > 0 == computed.savings["cached_examples"]
    assert same_bits(adapter, other)
    assert cached.metrics == computed.metrics
    assert cached.resources["flops"] < computed.resources["flops"]
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    ("metric", "options", "savings"),
    [
        ("cka", {}, {"cache": False}),
        ("cka", {}, {"cache_limit": "6KiB"}),
        ("cka", {}, {}),
        ("cka", {"pooling": "first"}, {"cache": False}),
        ("cka", {"reference": "without_adapter"}, {"cache": False}),
        ("contribution", {}, {"cache": False}),
        ("fisher", {}, {"cache": False}),
    ],
)
def test_scores_are_the_same_whether_frozen_layers_run_are_skipped_or_read(
    metric, options, savings, tiny_tree, tmp_path
):
    """Two scorings after the first freeze event: what is scored runs above a prefix."""
    folder = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tiny_tree["model"] = {"path": str(folder)}
    freezing = {"metric": metric, "metric_options": options, "interval": 4, "final": 2}

    def scores(variant, **sections):
        _, _, run_folder = trained(tiny_tree, variant, freezing=freezing, **sections)
        events = RunFolder(run_folder).rows("events.jsonl")
        return [row["score"] for row in RunFolder(run_folder).rows("importance.jsonl")], events[0]["scoring"]

    plain, first_event = scores("plain", savings={"fold": False, "prefix": False})
    skipped, _ = scores("skipped", savings=savings | {"fold": False})
    assert first_event < 4
    assert skipped == pytest.approx(plain, rel=1e-3, abs=1e-6)


def test_savings_change_a_run_without_dropout_by_rounding_alone(tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tiny_tree["model"] = {"path": str(folder)}
    with_all, adapter, _ = trained(tiny_tree, "all", memory={"budget": "250KiB"})
    without, other, _ = trained(tiny_tree, "none", savings={"fold": False, "prefix": False})
    assert with_all.savings["folded_layers"] > 0
    for key in adapter:
        assert torch.allclose(adapter[key], other[key], atol=1e-4), key
    assert with_all.steps == without.steps and with_all.tokens == without.tokens
    assert with_all.frozen_depth == without.frozen_depth


@pytest.mark.parametrize("fails", [False, True])
def test_base_weights_have_their_bits_after_a_run_whether_it_ends_or_fails(fails, tiny_tree, monkeypatch):
    from safe_lab.trainer import Trainer

    models, before = [], []

    def remember(*arguments):
        models.append(attach(*arguments))
        before.append({name: p.detach().clone() for name, p in models[-1].model.named_parameters()})
        return models[-1]

    advance = Trainer._advance

    def fail(self):
        if self.progress.step == 8:
            assert self._savings.state.folded_layers > 0
            raise FloatingPointError("on purpose")
        return advance(self)

    monkeypatch.setattr("safe_lab.build.attach", remember)
    if fails:
        monkeypatch.setattr(Trainer, "_advance", fail)
        with pytest.raises(FloatingPointError, match="on purpose"):
            trained(tiny_tree, "failed")
    else:
        trained(tiny_tree, "whole")
    after = dict(models[0].model.named_parameters())
    base = [name for name in after if "base_layer" in name]
    assert base
    assert all(torch.equal(after[name], before[0][name]) for name in base)


def test_a_dropped_cache_does_not_come_back_on_resume(tiny_tree, monkeypatch):
    from test_run import _interrupt

    from safe_lab.prefix import ActivationCache

    tree = tiny_tree | {"savings": {"cache_limit": "20KiB"}}
    config = config_of(tree, variant="full", freezing=FREEZE, training={"save_every": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("safe_lab.prefix.store.os.pwrite", full)
        _interrupt(config, monkeypatch, after_step=8)
    _interrupt(config, monkeypatch, after_step=12, resume=True)
    grown = []
    monkeypatch.setattr(ActivationCache, "_create", lambda self: grown.append(self))
    run(config, resume=True)
    assert not grown


def test_a_cache_in_memory_beside_a_budget_for_it_is_refused(tiny_tree):
    with pytest.raises(ConfigError, match=r"savings\.cache_store: memory would take what memory\.budget leaves"):
        trained(tiny_tree, "both", memory={"budget": "1GiB"}, savings={"cache_store": "memory"})


def test_a_budget_holds_where_the_prefix_pads_its_rows(tiny_tree, tmp_path):
    tiny_tree["data"] = tiny_tree["data"] | {"max_length": 17}
    (tmp_path / "long.csv").write_text(
        "text,label\n" + "".join(f"{' '.join(f'word{(i + j) % 40}' for j in range(15))},{i % 2}\n" for i in range(48))
    )
    tiny_tree["data"]["path"] = str(tmp_path / "long.csv")
    result, _, _ = trained(tiny_tree, "padded", memory={"budget": "400KiB"}, savings={"cache": False})
    assert result.savings["prefix_depth"] > 0
    assert result.resources["memory_peak_bytes"] <= parse_bytes("400KiB")


@pytest.mark.parametrize(
    "settings", [{"cache_store": "memory"}, {"cache_limit": "20KiB"}, {"cache_limit": "1B"}, {"keep_cache": True}]
)
def test_where_and_how_much_is_cached_does_not_change_the_bits(settings, tiny_tree):
    _, adapter, _ = trained(tiny_tree, "plain")
    result, other, folder = trained(tiny_tree, "other", savings=settings)
    assert same_bits(adapter, other)
    if "cache_limit" in settings:
        assert result.savings["cache_bytes"] <= parse_bytes(settings["cache_limit"])
    assert (folder / "cache").exists() == ("keep_cache" in settings)


def test_a_cache_in_half_precision_changes_little(tiny_tree):
    plain, _, _ = trained(tiny_tree, "plain")
    half, _, _ = trained(tiny_tree, "half", savings={"cache_dtype": "bfloat16"})
    assert half.savings["cache_bytes"] == plain.savings["cache_bytes"] / 2
    assert half.metrics["validation/loss"] == pytest.approx(plain.metrics["validation/loss"], rel=0.05)


def test_a_full_disk_costs_the_cache_and_nothing_else(tiny_tree, monkeypatch, caplog):
    _, adapter, _ = trained(tiny_tree, "plain")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safe_lab.prefix.store.os.pwrite", full)
    result, other, folder = trained(tiny_tree, "full")
    assert same_bits(adapter, other)
    assert result.savings["cached_examples"] == 0 and result.savings["prefix_depth"] == 2
    assert sum("activation cache" in record.message for record in caplog.records) == 1
    assert not (folder / "cache").exists()


def test_an_altered_cache_is_dropped_with_one_warning_and_the_bits_stay(tiny_tree, monkeypatch, caplog):
    from safe_lab.trainer import Trainer

    _, adapter, _ = trained(tiny_tree, "plain")
    advance = Trainer._advance

    def spoil(self):
        file = self.folder.path / "cache" / "activations.bin"
        if self.progress.step == 9 and file.exists():
            data = bytearray(file.read_bytes())
            data[::7] = bytes(len(data[::7]))
            file.write_bytes(data)
        return advance(self)

    monkeypatch.setattr(Trainer, "_advance", spoil)
    _, other, _ = trained(tiny_tree, "spoiled")
    assert same_bits(adapter, other)
    assert sum("cut or altered" in record.message for record in caplog.records) == 1


def test_dropout_stays_in_the_prefix_on_request_and_nothing_is_cached(tiny_tree):
    result, adapter, _ = trained(tiny_tree, "dropout", savings={"prefix_eval": False, "fold": False})
    plain, other, _ = trained(tiny_tree, "plain", savings={"prefix": False, "fold": False})
    assert result.savings["prefix_depth"] == result.savings["cached_examples"] == 0
    assert same_bits(adapter, other)


def test_no_cache_is_made_for_a_single_pass(tiny_tree):
    result, _, _ = trained(tiny_tree, "late", training={"epochs": 1}, freezing=FREEZE | {"interval": 2})
    assert result.savings["prefix_depth"] > 0
    assert result.savings["cached_examples"] == 0


def test_trimmed_padding_changes_a_run_without_dropout_by_rounding_and_its_cost_by_more(tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tiny_tree["model"] = {"path": str(folder)}
    whole, adapter, _ = trained(tiny_tree, "whole")
    trimmed, other, _ = trained(tiny_tree, "trimmed", savings={"trim_padding": 2})
    for key in adapter:
        assert torch.allclose(adapter[key], other[key], atol=1e-4), key
    assert (trimmed.steps, trimmed.tokens, trimmed.frozen_depth) == (whole.steps, whole.tokens, whole.frozen_depth)
    passes = [run.resources["traced_micro_steps"] + run.resources["scaled_micro_steps"] for run in (whole, trimmed)]
    assert passes[0] == whole.steps < passes[1]
    for figure in ("forward", "backward"):
        assert trimmed.resources["flops_by_phase"][figure] < whole.resources["flops_by_phase"][figure]
    assert trimmed.resources["memory_mean_bytes"] < whole.resources["memory_mean_bytes"]
    assert trimmed.tokens < trimmed.resources["tokens_computed"] < whole.resources["tokens_computed"]


def test_a_budget_that_scoring_exceeds_is_told(tiny_tree, caplog, monkeypatch):
    summary = Meter.summary
    too_much = {"memory_peak_bytes": 2**30, "memory_peak_in": "scoring"}
    monkeypatch.setattr(Meter, "summary", lambda self: summary(self) | too_much)
    trained(tiny_tree, "exceeded", memory={"budget": "1MiB"})
    assert "memory.budget: 1MiB was exceeded, with 1.00 GiB in scoring" in caplog.text


@pytest.mark.parametrize("trim_padding", [1, 1000])
def test_padding_is_trimmed_within_a_budget(trim_padding, tiny_tree):
    budget = {"budget": "250KiB"}
    tight, _, _ = trained(tiny_tree, "tight", memory=budget)
    free, _, _ = trained(tiny_tree, "free", savings={"trim_padding": 1000})
    trimmed, _, _ = trained(tiny_tree, "trimmed", memory=budget, savings={"trim_padding": trim_padding})
    # With 1000 only the budget cuts.
    assert trimmed.resources["memory_peak_bytes"] <= parse_bytes("250KiB") < free.resources["memory_peak_bytes"]
    flops = [result.resources["flops_by_phase"]["backward"] for result in (trimmed, tight)]
    assert flops[0] < flops[1] if trim_padding == 1 else flops[0] <= flops[1]


def test_a_planned_stage_has_room_for_the_gradients_of_parts_that_were_cut(tiny_tree):
    whole = configuration.build(tiny_tree | {"memory": {"budget": "1GiB"}})
    longest = whole.data.max_length
    frozen = [False] * 2
    peak = Planner(whole, num_labels=2, longest=longest).plan(frozen, kept_bytes=0).peak_bytes
    rows = []
    for trim_padding in (None, 4):
        config = configuration.build(
            tiny_tree | {"memory": {"budget": f"{peak}B"}, "savings": {"trim_padding": trim_padding}}
        )
        rows.append(min(Planner(config, num_labels=2, longest=longest).plan(frozen, kept_bytes=0).most_rows))
    assert rows[1] < rows[0] == whole.training.batch_size


def test_padding_that_cannot_be_trimmed_is_told(tiny_tree, tmp_path, caplog):
    folder = save_tiny_model(tmp_path / "model", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    tiny_tree["model"] = {"path": str(folder)}
    tiny_tree["adapter"] = tiny_tree["adapter"] | {"target_modules": ["q_proj", "v_proj"]}
    trained(tiny_tree, "left", savings={"trim_padding": 1})
    assert "savings.trim_padding has no effect: texts are padded on the left" in caplog.text


def test_live_bytes_stay_within_the_budget_and_micro_batches_grow(tiny_tree):
    freezing = FREEZE | {"curve": "linear", "final": 3, "warmup": 0, "final_share": 1.0}
    free, _, _ = trained(tiny_tree, "free", freezing=freezing)
    budget = int(0.5 * free.resources["memory_peak_bytes"])
    result, _, folder = trained(tiny_tree, "tight", freezing=freezing, memory={"budget": f"{budget}B"})
    assert result.resources["memory_peak_bytes"] <= budget
    rows = [event["micro_batch_rows"] for event in RunFolder(folder).rows("events.jsonl")]
    assert rows == sorted(rows) and rows[0] < rows[-1]
    assert (result.steps, result.tokens) == (free.steps, free.tokens)


def test_folds_that_do_not_fit_the_budget_are_undone_before_the_cache_is_filled(tiny_tree, monkeypatch, caplog):
    from test_run import _interrupt

    plan = Planner.plan

    def without_folds(self, frozen, *, kept_bytes):
        if kept_bytes:
            raise ValueError("what is kept does not fit")
        return plan(self, frozen, kept_bytes=kept_bytes)

    monkeypatch.setattr(Planner, "plan", without_folds)
    sections = {"memory": {"budget": "250KiB"}, "training": {"save_every": 2}}
    alone, adapter, _ = trained(tiny_tree, "alone", **sections)
    assert alone.savings["folded_layers"] == 0 < alone.savings["cached_examples"]
    assert "adapters stay unfolded from here on" in caplog.text
    _, other, _ = trained(tiny_tree, "unfolded", savings={"fold": False}, **sections)
    assert same_bits(adapter, other)
    config = config_of({"savings": {}, "memory": {}} | tiny_tree, variant="cut", freezing=FREEZE, **sections)
    _interrupt(config, monkeypatch, after_step=11)
    run(config, resume=True)
    assert same_bits(adapter, load_file(config.run_folder / "adapter" / "adapter_model.safetensors"))


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_will_do(tiny_tree):
    with pytest.raises(ConfigError, match=r"memory\.budget.*the smallest that will do is") as refusal:
        trained(tiny_tree, "small", memory={"budget": "1KiB"})
    smallest = str(refusal.value).split("will do is ")[1].split(",")[0].replace(" ", "")
    result, _, _ = trained(tiny_tree, "smallest", memory={"budget": smallest})
    assert result.resources["memory_peak_bytes"] <= parse_bytes(smallest)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_out_of_memory_halves_the_rows_once_a_stage_and_keeps_the_batch(
    accumulation, tiny_tree, monkeypatch, caplog
):
    sections = {"memory": {"budget": "1GiB"}, "training": {"gradient_accumulation": accumulation, "batch_size": 4}}
    plain, adapter, _ = trained(tiny_tree, "plain", **sections)
    calls = []

    from safe_lab import model

    def short(network, batch):
        calls.append(len(batch["labels"]))
        loss = model.loss_function(network, batch)
        if torch.is_grad_enabled() and len(calls) > 12 and len(batch["labels"]) > 2:
            loss.backward()  # some gradients are there when memory runs out
            raise torch.OutOfMemoryError("no room")
        return loss

    monkeypatch.setattr("safe_lab.build.loss_function", short)
    result, other, _ = trained(tiny_tree, "short", **sections)
    assert sum("memory ran out" in record.message for record in caplog.records) >= 1
    assert (result.steps, result.tokens) == (plain.steps, plain.tokens)
    assert all(value.isfinite().all() for value in other.values())


def test_running_out_of_memory_twice_in_a_stage_ends_the_run(tiny_tree, monkeypatch):
    def never(network, batch):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room at all")
        from safe_lab import model

        return model.loss_function(network, batch)

    monkeypatch.setattr("safe_lab.build.loss_function", never)
    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        trained(tiny_tree, "never", memory={"budget": "1GiB"})


def test_checkpointing_is_turned_on_only_where_nothing_fits_without(tiny_tree):
    with pytest.raises(ConfigError, match="the smallest that will do is") as refusal:
        trained(tiny_tree, "refused", memory={"budget": "1KiB"})
    smallest = parse_bytes(str(refusal.value).split("will do is ")[1].split(",")[0].replace(" ", ""))
    tight = {"budget": f"{smallest - 4096}B", "gradient_checkpointing": True}
    result, _, folder = trained(tiny_tree, "recomputing", memory=tight)
    assert result.resources["memory_peak_bytes"] <= smallest - 4096
    rows = [row for row in RunFolder(folder).rows("metrics.jsonl") if "train/loss" in row]
    assert rows


def test_the_forecast_of_the_unfrozen_run_is_what_it_costs(tiny_tree):
    frozen, _, _ = trained(tiny_tree, "frozen", freezing=FREEZE | {"interval": "epoch", "warmup": 0})
    plain, _, _ = trained(tiny_tree, "plain", freezing={"policy": "none"})
    spent = plain.resources["flops_by_phase"]
    assert frozen.unfrozen_forecast["flops"] == spent["forward"] + spent["backward"] + spent["evaluation"]
    assert plain.unfrozen_forecast is None
    assert frozen.resources["flops"] < frozen.unfrozen_forecast["flops"]


def test_a_resumed_run_takes_up_the_cache_it_left_behind(tiny_tree, monkeypatch):
    from test_run import _interrupt

    from safe_lab.prefix import ActivationCache

    config = config_of(tiny_tree | {"savings": {}}, variant="cut", freezing=FREEZE, training={"save_every": 1})
    alone = config_of(tiny_tree | {"savings": {}}, variant="alone", freezing=FREEZE, training={"save_every": 1})
    run(alone)
    _interrupt(config, monkeypatch, after_step=8)
    grown = []
    monkeypatch.setattr(ActivationCache, "grow", lambda self, *_, **__: grown.append(self))
    run(config, resume=True)
    assert not grown
    assert bits(config.run_folder)[:2] == bits(alone.run_folder)[:2]


def test_every_saving_can_be_had_through_the_public_names():
    import safe_lab

    for name in ("ActivationCache", "Prefix", "fold", "unfold", "split_batch"):
        assert hasattr(safe_lab, name), name

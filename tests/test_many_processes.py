"""Whole runs on several processes: the same training as on one, decided once, written once."""

import json
import logging

import pytest
import torch
from parallel import FSDP, assert_like_one, in_processes, rows_of, run_up_to, train
from test_run import bits, config_of
from tiny import save_tiny_model, write_csv

from safe_lab import build as building
from safe_lab import run as runs
from safe_lab.importance import METRICS
from safe_lab.prefix import ActivationCache
from safe_lab.prefix.stack import Stack, UnsupportedError
from safe_lab.prefix.store import FileStore
from safe_lab.run_folder import RunFolder


@pytest.mark.parametrize("metric", list(METRICS))
def test_two_processes_train_and_freeze_as_one_does(metric, tree):
    result, alone = assert_like_one(tree, count=2, freezing={"metric": metric})
    assert result.processes["count"] == 2 and alone.processes["count"] == 1


def test_four_processes_do_where_some_have_no_row_of_the_last_batch(tree):
    assert_like_one(tree, count=4)


@pytest.mark.parametrize(
    "sections",
    [
        {"savings": {"fold": False, "prefix": False}},
        {"training": {"gradient_accumulation": 4}, "freezing": {"interval": 1}},
        {
            "savings": {"trim_padding": 2},
            "memory": {"budget": "400KiB"},
            "freezing": {"policy": "budget", "final_importance": 0.6},
        },
        {"freezing": {"policy": "random", "final_share": 0.7}},
        {"freezing": {"warmup": "stable", "stable_share": 5.0}},
        {
            "training": {"gradient_accumulation": 2},
            "savings": {"trim_padding": 2},
            "freezing": {"interval": 2, "policy": "budget", "final_importance": 0.6, "budget_saves": "bytes"},
        },
        {"model": {"gradient_checkpointing": True}, "training": {"num_workers": 1}},
    ],
    ids=["plain", "accumulated", "everything", "random", "settled", "trimmed", "checkpointed"],
)
def test_processes_agree_whatever_is_on(sections, tree):
    assert_like_one(tree, count=2, **sections)


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["copies", "fsdp2"])
@pytest.mark.parametrize(
    "sections",
    [{"training": {"mixed_precision": "bf16"}}, {"model": {"dtype": "bfloat16"}}],
    ids=["autocast", "weights"],
)
def test_processes_agree_in_bfloat16(sections, environment, tree):
    """To the bit with each other; with one process as far as eight bits of mantissa go."""
    config = config_of(tree, **sections)
    results, weights = zip(*in_processes(lambda processes: train(config), environment=environment), strict=True)
    assert results[0] == results[1]
    assert all(torch.equal(others, weight) for others, weight in zip(*map(dict.values, weights), strict=True))
    assert results[0].frozen_depth > 0
    alone = config_of(tree, variant="alone", **sections)
    runs.run(alone)
    losses = [[row["train/loss"] for row in rows_of(one)] for one in (config, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0][:4] == pytest.approx(losses[1][:4], abs=8e-3)


@pytest.mark.parametrize("budget", [None, "2MiB"])
def test_the_head_trains_on_where_all_units_are_frozen(budget, tree):
    result, _ = assert_like_one(
        tree, count=2, freezing={"normalize": "none", "final_threshold": 3.0}, memory={"budget": budget}
    )
    assert result.frozen_share == 1
    head_bytes = 4 * (16 * 2 + 2)
    assert result.processes["last_step_bytes"] == head_bytes < result.processes["first_step_bytes"]


def test_bytes_that_go_between_processes_fall_with_the_live_adapters(tree):
    config = config_of(tree)
    in_processes(lambda processes: runs.run(config))
    rows = rows_of(config)
    for row in rows:
        assert row["resources/gradient_bytes_per_step"] == 4 * row["freezing/trainable_parameters"]
    assert rows[-1]["resources/gradient_bytes_per_step"] < rows[0]["resources/gradient_bytes_per_step"]


def test_every_process_tells_what_it_used_and_the_result_what_all_did(tree):
    config = config_of(tree)
    result = in_processes(lambda processes: runs.run(config))[0]
    by_process = RunFolder(config.run_folder).rows("processes.jsonl")
    assert [(row["step"], row["process"]) for row in by_process[:4]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    flops = [row["resources/flops/backward"] for row in by_process[-2:]]
    assert rows_of(config)[-1]["resources/flops/backward"] == sum(flops)
    assert result.resources["flops_by_phase"]["backward"] == sum(flops) > max(flops) > 0
    for name in ("sum", "mean", "largest"):
        assert result.processes[name]["flops"] > 0
    assert result.processes["sum"]["flops"] == 2 * result.processes["mean"]["flops"] == result.resources["flops"]
    assert result.processes["largest"]["memory_peak_bytes"] == result.resources["memory_peak_bytes"]
    assert sum(result.resources["memory_peak_by_kind"].values()) == result.resources["memory_peak_bytes"]
    assert json.loads((config.run_folder / "environment.json").read_text())["processes"] == 2


def test_out_of_memory_on_one_process_halves_the_rows_on_all(tree):
    config = config_of(tree, memory={"budget": "400KiB"})

    def run_out(processes):
        plain, calls = building.loss_function, []

        def loss_function(model, batch):
            if model.training:
                calls.append(len(batch["labels"]))
            if processes.rank == 1 and len(calls) == 5:
                raise torch.OutOfMemoryError("out of memory, for once")
            return plain(model, batch)

        building.loss_function = loss_function
        records = []
        logging.getLogger("safe_lab.trainer").addFilter(lambda record: records.append(record.getMessage()) or True)
        return train(config), [text for text in records if "memory ran out" in text]

    ((first, weights), told), ((second, others), told_too) = in_processes(run_out)
    assert len(told) == len(told_too) == 1 and "on another process" in told[0]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    plain, _ = train(config_of(tree, variant="plain"))
    assert first == second
    assert first.metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_the_same_words(tree):
    config = config_of(tree, training={"log_every": 3})

    def blow_up(processes):
        plain, calls = building.loss_function, []

        def loss_function(model, batch):
            calls.append(model.training)
            loss = plain(model, batch)
            return loss * float("nan") if processes.rank == 1 and sum(calls) == 8 else loss

        building.loss_function = loss_function
        with pytest.raises(FloatingPointError) as stopped:
            runs.run(config)
        return str(stopped.value)

    first, second = in_processes(blow_up)
    assert first == second and "the loss is nan at step 8" in first
    assert [row["step"] for row in rows_of(config)] == [3, 6]
    assert [path.name for path in (config.run_folder / "checkpoints").iterdir()] == ["step-00000006"]


def test_examples_are_computed_once_for_a_cache_that_all_read(tree):
    config = config_of(tree, savings={"keep_cache": True})
    result = in_processes(lambda processes: runs.run(config))[0]
    alone = runs.run(config_of(tree, variant="one", savings={"keep_cache": True}))
    assert result.savings == alone.savings
    # Each process learns by one row how wide a row is.
    once = alone.resources["flops_by_phase"]["cache"]
    assert once <= result.resources["flops_by_phase"]["cache"] < 1.3 * once
    assert sorted(path.name for path in (config.run_folder / "cache").iterdir()) == [
        "activations.bin",
        "activations.index",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_full_for_one_process_costs_all_of_them_the_cache_and_nothing_else(rank, tree):
    config = config_of(tree)

    def fill(processes):
        def write(self, offset, data):
            raise OSError(28, "No space left on device")

        if processes.rank == rank:
            FileStore.write = write
        return runs.run(config)

    results = in_processes(fill)
    plain = runs.run(config_of(tree, variant="plain", savings={"cache": False}))
    assert results[0] == results[1]
    assert results[0].savings["cached_examples"] == 0
    assert results[0].metrics == pytest.approx(plain.metrics, abs=1e-6)


def test_a_cache_that_one_process_found_altered_is_dropped_by_all_at_the_next_freeze_event(tree):
    config = config_of(tree, training={"epochs": 5})

    def drop(processes):
        if processes.rank == 1:
            ActivationCache._read = lambda self, keys, columns: None
        return runs.run(config)

    results = in_processes(drop)
    assert results[0] == results[1]
    assert results[0].frozen_depth == 2
    assert results[0].savings["cached_examples"] == 0


def test_more_processes_than_examples_in_a_batch_are_refused(tree):
    config = config_of(tree, training={"batch_size": 2})
    with pytest.raises(AssertionError, match="batch_size is 2 of all processes together, and there are 3"):
        in_processes(lambda processes: runs.run(config), count=3)


def test_processes_with_other_weights_are_refused(tree, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    configs = [config_of(tree), config_of(tree, model={"path": str(other)})]
    with pytest.raises(AssertionError, match="weights behind model.path.* is not on process 1 what it is on process 0"):
        in_processes(lambda processes: runs.run(configs[processes.rank]))


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"training": {"epochs": 4}}, "the configuration"),
        ({"data": {"max_train_samples": 40}}, "the configuration"),
        ({"data": {"path": "other.csv"}}, "the training split"),
        ({"output_dir": "elsewhere"}, None),
    ],
)
def test_processes_with_other_settings_or_texts_are_refused(sections, what, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "other.csv", rows=50, seed=1)
    configs = [config_of(tree), config_of(tree, **sections)]
    if what is None:
        first, second = in_processes(lambda processes: runs.run(configs[processes.rank]))
        assert first == second
        return
    with pytest.raises(AssertionError, match=f"{what} is not on process 1 what it is on process 0"):
        in_processes(lambda processes: runs.run(configs[processes.rank]))


def test_weights_that_a_pass_does_not_use_are_no_obstacle(tree):
    """An adapter of the pooler, which a head that reads the first token directly goes past."""
    tree["adapter"] |= {"target_modules": "all-linear"}
    plain = building.loss_function

    def past_the_pooler(model, batch):
        inside = getattr(model, "module", model)
        hidden = inside.base_model.model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        return torch.nn.functional.cross_entropy(inside.base_model.model.classifier(hidden), batch["labels"])

    building.loss_function = past_the_pooler
    try:
        assert_like_one(tree, count=2, savings={"prefix": False}, freezing={"metric": "update_norm"})
    finally:
        building.loss_function = plain


def test_frozen_layers_that_one_process_cannot_skip_are_skipped_by_none(tree):
    config = config_of(tree, training={"epochs": 5})

    def fail(processes):
        look = Stack.look

        def look_or_fail(self, forward):
            if processes.rank == 1 and self.num_frozen:
                raise UnsupportedError("not on this one")
            return look(self, forward)

        Stack.look = look_or_fail
        return runs.run(config)

    first, second = in_processes(fail)
    assert first == second
    assert first.frozen_depth == 2 and first.savings["prefix_depth"] == 0


def test_three_processes_resume_to_the_bits_of_a_run_left_alone(tree):
    """Of three the order of a sum shows in its bits, and with it where in DDP's buckets a gradient lies."""
    whole, resumed = (config_of(tree, variant=variant, training={"epochs": 5}) for variant in ("whole", "resumed"))

    in_processes(lambda processes: runs.run(whole), count=3)
    in_processes(lambda processes: run_up_to(12, resumed), count=3)
    in_processes(lambda processes: runs.run(resumed, resume=True), count=3)
    ours, theirs = (bits(config.run_folder, with_bytes=False) for config in (whole, resumed))
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(count, tree):
    """From the last step; what is not exact is said."""
    whole = runs.run(config_of(tree, variant="whole"))
    config = config_of(tree, variant="resumed")

    def go_on(processes):
        records = []
        logging.getLogger("safe_lab.training_state").addFilter(
            lambda record: records.append(record.getMessage()) or True
        )
        return runs.run(config, resume=True), records

    in_processes(lambda processes: run_up_to(6, config), count=2)
    result, records = in_processes(go_on, count=count)[0]
    assert any(f"the checkpoint is of 2 processes, and {count} go on" in text for text in records)
    assert result.metrics == pytest.approx(whole.metrics, abs=1e-5)
    assert [row["step"] for row in rows_of(config)] == list(range(1, 19))
    assert result.tokens == whole.tokens
    # Where one is gone, and with it what it cost, there is nothing to compare.
    assert result.processes["unaccounted"] == max(0, 2 - count)
    assert (result.unfrozen_forecast is None) == (count == 1)

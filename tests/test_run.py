"""Whole runs on tiny models: what they leave, what they promise, how they stop."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny_model, tiny_model, write_csv

from safe_lab import build as building
from safe_lab import checkpoint
from safe_lab import config as configuration
from safe_lab.memory import KINDS
from safe_lab.plan import stages
from safe_lab.resources import ACTIVITIES
from safe_lab.run import run
from safe_lab.run_folder import RunFolder
from safe_lab.section import ConfigError

# Columns that tell the time and the machine, which differ between two runs of the same bits.
CLOCK = tuple(
    f"resources/{name}"
    for name in (
        "wall_seconds",
        "seconds",
        "cpu_seconds",
        "tokens_per_second",
        "joules",
        "host_",
        "device_",
        "memory_mean",
        "step_memory_mean",
    )
)


def config_of(tree, **sections):
    """The tree with some keys of its sections changed."""
    changed = {key: tree.get(key, {}) | value if isinstance(value, dict) else value for key, value in sections.items()}
    return configuration.build(tree | changed)


def bits(folder, *, with_bytes=True):
    """All that must be the same in two runs of the same bits; without live bytes, of which DDP frees some on another thread."""
    ignored = CLOCK if with_bytes else (*CLOCK, "resources/step_memory", "resources/memory")
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    if result["unfrozen_forecast"]:
        result["unfrozen_forecast"] = result["unfrozen_forecast"]["flops"]
    # What they used tells the clock, and what of it does not is in "resources" too.
    result["processes"] = {key: value for key, value in result["processes"].items() if isinstance(value, int)}
    resources = result.pop("resources")
    result["resources"] = {
        name: value for name, value in resources.items() if not f"resources/{name}".startswith(ignored)
    }
    rows = {
        file: [
            {key: value for key, value in row.items() if not key.startswith(ignored)}
            for row in RunFolder(folder).rows(file)
        ]
        for file in ("metrics.jsonl", "importance.jsonl", "events.jsonl")
    }
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), rows, result


def test_a_run_leaves_a_complete_folder(tiny_tree):
    config = config_of(tiny_tree)
    result = run(config)
    folder = config.run_folder
    assert configuration.load(folder / "config.yaml") == config
    assert {"packages", "command", "commit"} <= json.loads((folder / "environment.json").read_text()).keys()
    metrics = RunFolder(folder).rows("metrics.jsonl")
    assert [row["step"] for row in metrics if "train/loss" in row] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [row["step"] for row in metrics if "validation/accuracy" in row] == [6, 12, 18]
    importance = RunFolder(folder).rows("importance.jsonl")
    assert [(row["scoring"], row["depth"]) for row in importance] == [(t, d) for t in (1, 2, 3) for d in (0, 1, 2)]
    assert all(math.isfinite(row["score"]) and row["update_norm"] > 0 for row in importance)
    events = RunFolder(folder).rows("events.jsonl")
    assert [len(event["units"]) for event in events] == [1, 1]
    assert events[-1]["frozen_share"] == pytest.approx(2 / 3)
    assert json.loads((folder / "result.json").read_text())["frozen_share"] == result.frozen_share
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == [
        "step-00000012",
        "step-00000018",
    ]
    assert json.loads((folder / "adapter" / "labels.json").read_text()) == ["0", "1"]


def test_the_seconds_of_a_run_add_up_to_its_wall_time(tiny_tree):
    config = config_of(tiny_tree)
    began = time.perf_counter()
    result = run(config)
    wall = time.perf_counter() - began
    seconds = result.resources["seconds"]
    # What is not in them: reading the configuration, claiming the folder, writing result.json.
    assert 0.98 * wall - 0.1 <= sum(seconds.values()) <= wall
    assert sum(seconds.values()) == pytest.approx(result.resources["wall_seconds"])
    assert all(seconds[activity] > 0 for activity in ACTIVITIES if activity not in ("cache", "sharpness"))


def test_freezing_shows_in_bytes_and_flops_as_the_drop_it_is(tiny_tree):
    tiny_tree["savings"] = {"fold": False, "prefix": False}

    def resources(variant, **freezing):
        return run(config_of(tiny_tree, variant=variant, freezing=freezing)).resources

    none = resources("none", policy="none")
    prefix = resources("prefix", policy="prefix", curve="constant", final_share=0.7, warmup=0)
    assert prefix["flops_by_phase"]["forward"] == none["flops_by_phase"]["forward"]
    assert prefix["flops_by_phase"]["backward"] < 0.8 * none["flops_by_phase"]["backward"]
    assert prefix["flops_by_phase"]["evaluation"] == none["flops_by_phase"]["evaluation"] > 0
    # It freezes after five steps of full memory: the mean falls, the peak stays (but for the best weights, kept from then on).
    assert prefix["memory_peak_bytes"] == pytest.approx(none["memory_peak_bytes"], rel=0.01)
    assert prefix["memory_mean_step_peak_bytes"] < none["memory_mean_step_peak_bytes"]


def test_rows_carry_resources_and_say_what_was_traced(tiny_tree):
    config = config_of(tiny_tree)
    result = run(config)
    rows = [row for row in RunFolder(config.run_folder).rows("metrics.jsonl") if "train/loss" in row]
    for row in rows:
        by_kind = [row[f"resources/step_memory/{kind}_bytes"] for kind in KINDS]
        assert sum(by_kind) == row["resources/step_memory_peak_bytes"] <= row["resources/memory_peak_bytes"]
        assert sum(row[f"resources/seconds/{activity}"] for activity in ACTIVITIES) <= row["resources/wall_seconds"]
    assert rows[0]["resources/step_traced"] is True
    assert not all(row["resources/step_traced"] for row in rows)
    flops = [row["resources/flops/backward"] for row in rows]
    assert flops == sorted(flops) and flops[-1] == result.resources["flops_by_phase"]["backward"]


def test_every_column_and_key_of_resources_is_documented(tiny_tree):
    config = config_of(tiny_tree)
    result = run(config)
    documented = (Path(__file__).parents[1] / "docs" / "run_folder.md").read_text()
    for key in result.resources:
        assert f"`{key}`" in documented, key
    for row in RunFolder(config.run_folder).rows("metrics.jsonl"):
        for key in row:
            if key.startswith("validation/"):
                continue
            general = re.sub(r"(step_memory|flops|seconds)/\w+", r"\1/", key)
            assert f"`{general}" in documented, key


def test_freezing_off_is_plain_fine_tuning_bit_for_bit(tiny_tree, tiny_folder):
    config = config_of(tiny_tree, freezing={"policy": "none"}, training={"select": "last"})
    run(config)
    ours = load_file(config.run_folder / "adapter" / "adapter_model.safetensors")

    from accelerate.utils import set_seed
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

    from safe_lab.data import Collator, EpochBatchSampler, load_data

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    data = load_data(task="classification", path=tiny_tree["data"]["path"], tokenizer=tokenizer, max_length=16)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]))
    sampler = EpochBatchSampler(data.train["length"], 8, seed=0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad and p.dim() > 1], lr=1e-2, weight_decay=0.01, fused=True
    )
    optimizer.add_param_group(
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() <= 1], "weight_decay": 0.0}
    )
    steps = 3 * len(sampler)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=math.ceil(0.06 * steps), num_training_steps=steps)
    model.train()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for indices in sampler:
            batch = Collator(tokenizer)([data.train[i] for i in indices])
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tiny_tree):
    folders = []
    for variant, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = config_of(tiny_tree, variant=variant, seed=seed)
        run(config)
        folders.append(config.run_folder)
    first, second, other = (bits(folder) for folder in folders)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert first[0] != other[0]


def test_frozen_weights_keep_their_bits_from_the_checkpoint_of_their_event_to_the_end(tiny_tree):
    config = config_of(tiny_tree, training={"keep_checkpoints": 9, "epochs": 4, "save_every": 5})
    run(config)
    event = RunFolder(config.run_folder).rows("events.jsonl")[0]
    then = load_file(config.run_folder / "checkpoints" / f"step-{event['step']:08d}" / "model.safetensors")
    end = load_file(config.run_folder / "checkpoints" / "step-00000024" / "model.safetensors")
    for name in (name for name in then if name.startswith("last.")):
        frozen = any(f".{unit}." in name for unit in event["units"])
        assert torch.equal(then[name], end[name]) == frozen, name


def test_plain_peft_loads_the_adapter_and_predicts_the_same(tiny_tree, tmp_path):
    for name, adapter in {"lora": {}, "pissa": {"options": {"init_lora_weights": "pissa"}}}.items():
        config = config_of(tiny_tree, variant=name, adapter=adapter, training={"epochs": 2, "select": "last"})
        result = run(config)
        program = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
print(json.dumps(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()))
assert "safe_lab" not in sys.modules
"""
        texts = ["word1 word20 word30", "word0 word12 word13 word14"]
        arguments = [tiny_tree["model"]["path"], str(config.run_folder / "adapter"), json.dumps(texts)]
        printed = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        theirs = torch.tensor(json.loads(printed.stdout))
        ours = _logits_of_the_last_checkpoint(config, result, texts)
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def _logits_of_the_last_checkpoint(config, result, texts):
    """The model as it stood in training: base, adapters attached anew, weights of the checkpoint."""
    from accelerate.utils import set_seed

    from safe_lab.adapters import attach, build_peft_config
    from safe_lab.model import load_model, load_tokenizer

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model.path)
    base, heads = load_model(config.model.path, num_labels=2, regression=False, pad_token_id=0)
    attached = attach(base, build_peft_config(**config.adapter.model_dump(), head_modules=heads))
    weights = load_file(config.run_folder / "checkpoints" / f"step-{result.steps:08d}" / "model.safetensors")
    last = {key.removeprefix("last."): weight for key, weight in weights.items() if key.startswith("last.")}
    assert not attached.model.load_state_dict(last, strict=False).unexpected_keys
    with torch.no_grad():
        return attached.model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_trains_and_freezes(name, tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model", name)
    config = config_of(
        tiny_tree,
        model={"path": str(folder)},
        adapter={"target_modules": FAMILIES[name][2]},
        training={"epochs": 2},
        freezing={"final": 2, "final_threshold": 0.8},
    )
    result = run(config)
    assert result.frozen_share == pytest.approx(2 / 3), result.adapters


@pytest.mark.parametrize("method", ["loha", "ia3", "vera", "lokr"])
def test_other_peft_methods_run_and_can_be_loaded_again(method, tiny_tree):
    from peft import PeftModel

    adapter = {"method": method, "rank": None, "alpha": None}
    if method == "ia3":
        adapter["options"] = {"feedforward_modules": []}
    config = config_of(tiny_tree, adapter=adapter, training={"epochs": 2}, freezing={"final": 2})
    assert run(config).frozen_share > 0
    PeftModel.from_pretrained(tiny_model("bert"), str(config.run_folder / "adapter"))


def test_bfloat16_accumulation_checkpointing_and_length_groups_work_together(tiny_tree):
    config = config_of(
        tiny_tree,
        model={"gradient_checkpointing": True},
        data={"group_by_length": True},
        training={
            "mixed_precision": "bf16",
            "gradient_accumulation": 4,
            "batch_size": 4,
            "eval_every": 2,
            "save_every": 2,
        },
        freezing={"interval": 3},
    )
    result = run(config)
    # 43 examples make 11 micro-batches, so 3 optimizer steps an epoch, the last of 3 micro-batches.
    assert result.steps == 9
    rows = RunFolder(config.run_folder).rows("metrics.jsonl")
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [2, 4, 6, 8, 9]
    assert [entry["step"] for entry in result.timeline] == [3, 6]


def test_regression_and_pairs_of_texts_work(tiny_tree, tmp_path):
    lines = ["left,right,score", *(f"word{i % 9} word3,word{i % 7},{(i % 9) / 3}" for i in range(40))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = {
        "task": "regression",
        "path": str(tmp_path / "pairs.csv"),
        "text_column": "left",
        "text_pair_column": "right",
        "label_column": "score",
    }
    result = run(config_of(tiny_tree, data=data))
    assert {"validation/pearson", "validation/spearman", "validation/loss"} <= result.metrics.keys()


def test_early_stopping_ends_a_run_that_gains_nothing_and_keeps_the_best(tiny_tree):
    config = config_of(tiny_tree, training={"epochs": 9, "early_stopping": 2, "learning_rate": 1e-9})
    result = run(config)
    assert (result.epochs, result.selected_step) == (3, 6)
    best = load_file(config.run_folder / "checkpoints" / "step-00000018" / "model.safetensors")
    exported = load_file(config.run_folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(
        best["best.base_model.model.classifier.modules_to_save.default.weight"],
        exported["base_model.model.classifier.weight"],
    )


def test_max_steps_ends_in_mid_epoch_and_is_evaluated(tiny_tree):
    result = run(config_of(tiny_tree, training={"max_steps": 4, "eval_every": "never", "save_every": "never"}))
    assert (result.steps, result.epochs) == (4, 0)
    assert "validation/accuracy" in result.metrics


def test_a_loss_that_is_not_finite_stops_with_step_and_unit_and_leaves_the_last_checkpoint(tiny_tree):
    config = config_of(
        tiny_tree, training={"learning_rate": 1e30, "max_grad_norm": None, "save_every": 1, "warmup_ratio": 0}
    )
    with pytest.raises(FloatingPointError, match=r"step \d+.*(unit|head|weights)"):
        run(config)
    for folder in checkpoint.steps(config.run_folder / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load(folder)[0].values())
    assert not (config.run_folder / "result.json").exists()
    assert not (config.run_folder / "adapter").exists()


def test_weights_that_are_not_finite_are_named_with_their_unit_and_never_kept(tiny_tree, monkeypatch):
    from safe_lab.trainer import Trainer

    advance = Trainer._advance

    def spoil(self):
        ended = advance(self)
        if self.progress.step == 7:
            with torch.no_grad():
                next(iter(self._freezer.units[1].parameters.values()))[0, 0] = float("nan")
        return ended

    monkeypatch.setattr(Trainer, "_advance", spoil)
    config = config_of(tiny_tree, training={"save_every": 1, "keep_checkpoints": 9})
    with pytest.raises(FloatingPointError, match="after step 7: unit bert.encoder.layer.1 is the first"):
        run(config)
    assert checkpoint.steps(config.run_folder / "checkpoints")[-1].name == "step-00000006"


def test_a_last_step_that_explodes_is_no_result(tiny_tree):
    training = {"learning_rate": 1e25, "max_steps": 1, "max_grad_norm": None, "warmup_ratio": 0}
    config = config_of(tiny_tree, training=training)
    with pytest.raises(FloatingPointError, match="finite"):
        run(config)
    assert not (config.run_folder / "result.json").exists()


def train(path, *arguments, **settings):
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "safe_lab", "train", str(path), "--quiet", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_with_the_bits_of_one_left_alone(tiny_tree, monkeypatch):
    training = {
        "epochs": 8,
        "save_every": 4,
        "log_every": 3,
        "eval_every": 5,
        "gradient_accumulation": 2,
        "batch_size": 4,
        "keep_checkpoints": 3,
    }
    # Everything on: fold, prefix and cache are by default.
    everything = {
        "training": training,
        "freezing": {
            "policy": "budget",
            "interval": 4,
            "warmup": 2,
            "final": 8,
            "final_importance": 0.7,
            "normalize": "none",
            "metric": "sensitivity",
            "metric_options": {"smoothing": True},
        },
        "savings": {"trim_padding": 4},
        "memory": {"budget": "180KiB"},
    }
    tiny_tree |= {"savings": {}, "memory": {}}
    # They rehearse the model that the configuration names; what is killed has no part in it.
    for module, name in ((building, "predict_savings"), (stages, "plan_stage")):
        monkeypatch.setattr(module, name, _once_for_all_models(getattr(module, name)))
    alone = config_of(tiny_tree, variant="alone", **everything)
    run(alone)
    events = RunFolder(alone.run_folder).rows("events.jsonl")
    depths = [event["cached_depth"] for event in events]
    assert len(set(depths)) > 1 and min(event["micro_batch_rows"] for event in events) < 4

    killed = config_of(tiny_tree, variant="killed", **everything)
    draw = random.Random(0)
    moments = sorted(draw.sample(range(6, alone_steps(alone) - 4), 10))
    metrics = killed.run_folder / "metrics.jsonl"
    resumed = []
    for step in moments:
        process = _go_on_with(killed)
        while not (metrics.exists() and _last_step(metrics) >= step) and process.is_alive():
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.join()
        resumed.append(process.exitcode)
    assert resumed == [-signal.SIGKILL] * 10
    process = _go_on_with(killed)
    process.join()
    assert process.exitcode == 0
    weights, rows, result = bits(killed.run_folder)
    expected_weights, expected_rows, expected_result = bits(alone.run_folder)
    assert weights == expected_weights
    assert rows == expected_rows
    assert result | {"variant": ""} == expected_result | {"variant": ""}


def _once_for_all_models(function):
    """A function whose answers hang on all but its first argument, and are kept, for forks too."""
    answers = {}

    def answer(first, *others, **options):
        key = repr((others, {name: value for name, value in options.items() if not callable(value)}))
        if key not in answers:
            answers[key] = function(first, *others, **options)
        return answers[key]

    return answer


def _go_on_with(config):
    """The run in a process of its own, forked: what it needs is loaded already."""
    process = get_context("fork").Process(target=_resume, args=(config,))
    process.start()
    return process


def _resume(config):
    code = 1
    try:
        run(config, resume=True)
        code = 0
    except BaseException:  # noqa: BLE001 - told to the test
        traceback.print_exc()
    finally:
        # Not through the exit of pytest's own process, whose fixtures are not this one's to end.
        os._exit(code)


def alone_steps(config):
    return json.loads((config.run_folder / "result.json").read_text())["steps"]


def _last_step(metrics):
    lines = metrics.read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def _interrupt(config, monkeypatch, *, after_step, resume=False):
    """Run in this process until a step is done, then stop as a power cut would: nothing more is written."""
    from safe_lab.trainer import Trainer

    class PowerCut(BaseException):
        pass

    advance = Trainer._advance

    def cut(self):
        ended = advance(self)
        if ended and self.progress.step > after_step:
            raise PowerCut
        return ended

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", cut)
        with pytest.raises(PowerCut):
            run(config, resume=resume)


@pytest.mark.parametrize("metric", ["cka", "update_norm", "fisher"])
def test_resume_in_mid_epoch_gives_the_same_bits(metric, tiny_tree, monkeypatch):
    options = {"fisher": {"source": "adam"}}.get(metric, {})
    sections = {
        "training": {"save_every": 4, "eval_every": 6, "epochs": 4},
        "freezing": {"metric": metric, "metric_options": options, "interval": 4},
    }
    alone, resumed = (config_of(tiny_tree, variant=variant, **sections) for variant in ("alone", "resumed"))
    run(alone)
    _interrupt(resumed, monkeypatch, after_step=14)
    run(resumed, resume=True)
    one, other = bits(alone.run_folder), bits(resumed.run_folder)
    assert one[0] == other[0]
    assert one[1] == other[1]


def test_a_run_may_be_tracked_elsewhere_once_it_is_resumed(tiny_tree, monkeypatch):
    config = config_of(tiny_tree, training={"save_every": 4})
    _interrupt(config, monkeypatch, after_step=6)
    elsewhere = config_of(tiny_tree, training={"save_every": 4}, tracking={"wandb": "offline"})
    run(elsewhere, resume=True)
    assert configuration.load(config.run_folder / "config.yaml") == elsewhere
    assert list(config.run_folder.glob("wandb/offline-run-*"))


@pytest.mark.parametrize("harm", ["cut", "altered"])
def test_resume_names_a_damaged_checkpoint_and_uses_the_one_before(harm, tiny_tree, monkeypatch, caplog):
    alone, resumed = (
        config_of(tiny_tree, variant=variant, training={"save_every": 4}) for variant in ("alone", "resumed")
    )
    run(alone)
    _interrupt(resumed, monkeypatch, after_step=13)
    damaged = resumed.run_folder / "checkpoints" / "step-00000012" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content[:100] if harm == "cut" else content)
    run(resumed, resume=True)
    assert "step-00000012" in caplog.text
    assert bits(alone.run_folder)[:2] == bits(resumed.run_folder)[:2]


def test_a_damaged_checkpoint_never_outlives_whole_ones(tiny_tree, monkeypatch, caplog):
    config = config_of(tiny_tree, training={"save_every": 4, "keep_checkpoints": 1})
    _interrupt(config, monkeypatch, after_step=13)
    folders = config.run_folder / "checkpoints"
    (folders / "step-00000012" / "state.pt").write_bytes(b"")
    _interrupt(config, monkeypatch, after_step=5, resume=True)
    assert "starts anew" in caplog.text
    assert [folder.name for folder in checkpoint.steps(folders)] == ["step-00000004"]
    run(config, resume=True)


def test_rows_lost_in_a_power_cut_send_resume_to_the_checkpoint_before(tiny_tree, monkeypatch, caplog):
    alone, resumed = (
        config_of(tiny_tree, variant=variant, training={"save_every": 4}) for variant in ("alone", "resumed")
    )
    run(alone)
    _interrupt(resumed, monkeypatch, after_step=13)
    metrics = resumed.run_folder / "metrics.jsonl"
    lines = metrics.read_text().split("\n")
    metrics.write_text("\n".join(line for line in lines[:-1] if json.loads(line)["step"] <= 9) + "\n")
    run(resumed, resume=True)
    assert "rows were lost" in caplog.text
    assert bits(alone.run_folder)[:2] == bits(resumed.run_folder)[:2]


def test_a_configuration_that_could_not_be_built_does_not_block_its_correction(tiny_tree):
    with pytest.raises(ConfigError, match="did you mean label"):
        run(config_of(tiny_tree, data={"label_column": "lable"}, training={"max_steps": 1}))
    run(config_of(tiny_tree, training={"max_steps": 1}))


def test_a_pooler_the_checkpoint_lacks_trains_with_the_head_and_is_exported(tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = config_of(tiny_tree, model={"path": str(folder)})
    run(config)
    exported = load_file(config.run_folder / "adapter" / "adapter_model.safetensors")
    assert any("pooler.dense.weight" in name for name in exported)


def test_resume_on_other_base_weights_is_refused(tiny_tree, monkeypatch, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    config = config_of(tiny_tree, model={"path": str(folder)})
    _interrupt(config, monkeypatch, after_step=7)
    save_tiny_model(folder, seed=5)
    with pytest.raises(ConfigError, match="other base weights"):
        run(config, resume=True)


def test_a_golden_step_has_not_moved(tiny_tree):
    config = config_of(tiny_tree, training={"max_steps": 4, "log_every": 1})
    run(config)
    losses = [row["train/loss"] for row in RunFolder(config.run_folder).rows("metrics.jsonl") if "train/loss" in row]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-4)


# Of torch 2.13 on x86-64; what moves them by more than rounding changes the training.
GOLDEN_LOSSES = [0.69409, 0.69222, 0.69197, 0.69481]


BAD = {
    "a missing data file": ({"data": {"path": "nowhere.csv"}}, "nowhere.csv"),
    "a CSV without the label column": ({"data": {"label_column": "lable"}}, "no column 'lable'; did you mean label"),
    "a CSV without the text column": ({"data": {"text_column": "txt"}}, "no column 'txt'"),
    "a label name that is not there": ({"data": {"label_column": "text", "labels": ["no", "yes"]}}, "label"),
    "a target that matches nothing": ({"adapter": {"target_modules": ["querry"]}}, "did you mean query"),
    "an unknown adapter": ({"adapter": {"method": "lorra"}}, "did you mean lora"),
    "a model that is no folder": ({"model": {"path": "./nowhere"}}, "./nowhere is no folder"),
    "a package that is not installed": (
        {"model": {"path": "package://no_such_package/model"}},
        "'no_such_package' is not installed",
    ),
    "texts longer than the model": ({"data": {"max_length": 1000}}, "max_length is 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, tiny_tree):
    sections, message = BAD[case]
    with pytest.raises(ConfigError, match="(?s).*" + message.replace("(", r"\(")) as caught:
        run(config_of(tiny_tree, **sections))
    assert len(str(caught.value).splitlines()) == 1


def test_labels_out_of_range_name_row_and_value(tiny_tree, tmp_path):
    path = write_csv(tmp_path / "bad.csv")
    path.write_text(path.read_text() + "word1 word2,7\n")
    with pytest.raises(ConfigError, match=r"row \d+, column 'label': label '7' is out of range, ids go from 0 to 1"):
        run(config_of(tiny_tree, data={"path": str(path), "labels": ["a", "b"]}))


def test_an_empty_split_is_told(tiny_tree, tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copy(tiny_tree["data"]["path"], folder / "train.csv")
    (folder / "validation.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match="validation.*empty|empty.*validation|no rows"):
        run(config_of(tiny_tree, data={"path": str(folder)}))


def test_a_model_folder_without_weights_is_told(tiny_tree, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.path: no model"):
        run(config_of(tiny_tree, model={"path": str(folder)}))


def test_a_model_folder_with_the_weights_of_another_model_is_told(tiny_tree, tmp_path):
    folder, other = save_tiny_model(tmp_path / "model"), save_tiny_model(tmp_path / "other", "distilbert")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ConfigError, match="lack"):
        run(config_of(tiny_tree, model={"path": str(folder)}))


def test_every_shipped_yaml_loads_and_warns_of_nothing():
    files = [
        file
        for file in Path(__file__).parents[1].joinpath("experiments").rglob("*.yaml")
        # Of other schemas: test_bench, test_launch and test_experiment_file load them.
        if file.parent.name not in ("bench", "accelerate", "ablations", "paper") and file.name != "demo.yaml"
    ]
    assert len(files) >= 10
    for file in files:
        assert configuration.warnings(configuration.load(file)) == [], file

"""The README's Python for a loop of one's own does what it says, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from parallel import in_processes
from tiny import random_batch, tiny_model

from safe_lab.adapters import attach, build_peft_config
from safe_lab.sharding import is_sharded, own_part

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.split("## In a training loop of your own")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture
def loop():
    """The names that the README takes for granted."""
    torch.manual_seed(0)
    base = tiny_model("bert")
    base.requires_grad_(False)
    model = attach(
        base, build_peft_config("lora", rank=2, target_modules=["query", "value"], head_modules=["classifier"])
    ).model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [random_batch(4, 16, seed=seed) for seed in range(3)]

    def loss_function(model, batch):
        return model(**batch).loss

    def train_one_epoch(model, optimizer):
        model.train()
        for batch in batches:
            loss_function(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return {
        "model": model,
        "optimizer": optimizer,
        "batch": batches[0],
        "batches": batches,
        "blocks": batches,
        "probe_batches": batches[:1],
        "step": 1,
        "loss_function": loss_function,
        "train_one_epoch": train_one_epoch,
    }


def test_the_loop_with_a_freezer_runs(loop, capsys):
    exec(BLOCKS[0], loop)
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert len(loop["freezer"].frozen) == len(loop["units"])


def test_the_loop_with_savings_leaves_the_base_weights_as_they_were(loop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = loop["model"]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    # So small a model's scores say little: freeze by schedule.
    exec(BLOCKS[1].replace('metric="cka", final=6', 'policy="prefix", final=2, final_share=0.5'), loop)
    assert loop["freezer"].frozen_depth > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_the_parts_of_a_batch_add_up_to_its_gradient(loop):
    model, batch = loop["model"].eval(), loop["batch"]
    loop["loss_function"](model, batch).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    exec(BLOCKS[2].replace("prefix.loss", "loss_function").replace("trim_padding=32", "trim_padding=1"), loop)
    assert len(loop["part"]["labels"]) < 4
    for name, p in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_a_ledger_tells_of_a_step(loop, capsys):
    exec(BLOCKS[3], loop)
    assert int(capsys.readouterr().out.split()[0]) > 0


@pytest.mark.parametrize("sharded", [False, True])
def test_the_loop_on_several_processes_freezes_alike_and_ends_with_the_same_weights(sharded, loop):
    page = (Path(__file__).parents[1] / "docs" / "multi-gpu.md").read_text()
    block, sharding = re.findall(
        r"```python\n(.*?)```", page.partition("## In a loop of your own\n")[2], flags=re.DOTALL
    )
    if sharded:
        block = re.sub(r"model = accelerator.prepare_model.*\n", sharding, block)
    loop["batches"] = [random_batch(4, 16, seed=seed) for seed in range(4)]

    def run(processes):
        names = dict(loop)
        exec(
            block.replace("FreezingRule(final=6)", "FreezingRule(final=6, normalize='rank', final_threshold=0.6)"),
            names,
        )
        assert is_sharded(names["model"]) == sharded
        trained = {name: p.detach().clone() for name, p in names["model"].named_parameters() if own_part(p) is p}
        return names["freezer"].frozen, trained

    (frozen, weights), (frozen_too, others) = in_processes(run)
    assert frozen == frozen_too and any(frozen)
    assert all(torch.equal(others[name], weight) for name, weight in weights.items())

"""Whole experiments: real processes, what is kept and what is done anew, and what is told of runs that fail."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from forks import command
from sweep_tools import trainings_of, wait_for
from test_tracking import records
from tiny import save_tiny_model

from safe_lab import yaml_core

QUIET = {"NO_COLOR": "1", "COLUMNS": "200"}


class Ablation:
    """An experiment file, and the command that works on it."""

    def __init__(self, folder, base):
        self.path = folder / "experiment.yaml"
        self.folder = folder / "runs" / "experiment"
        self.tree = {
            "name": "experiment",
            "base": base,
            "variants": {"none": {"freezing.policy": "none"}, "cka": {}},
            "seeds": 2,
        }

    def start(self, *arguments, **changes):
        """The command, running in a fresh process."""
        self.tree |= changes
        self.path.write_text(yaml_core.write(self.tree))
        words = [sys.executable, "-m", "safe_lab", "ablate", str(self.path), *arguments]
        pipe = subprocess.PIPE
        environment = os.environ | QUIET
        # Of a shell's background jobs SIGINT is ignored, and so it would be here.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heed)

    def run(self, *arguments, code=0, **changes):
        """What the command prints, and what it says beside it; all its processes are forks of this one."""
        self.tree |= changes
        self.path.write_text(yaml_core.write(self.tree))
        printed, said = (self.path.with_suffix(f".{name}") for name in ("printed", "said"))
        for path in (printed, said):
            path.write_text("")
        with command(["ablate", self.path, *arguments], printed, said, QUIET) as fork:
            fork.wait(timeout=300)
        assert fork.returncode == code, said.read_text()
        return printed.read_text(), said.read_text()

    def run_fresh(self, *arguments, **changes):
        """The same in a fresh process."""
        with self.start(*arguments, **changes) as process:
            printed, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return printed, said

    def ended_at(self):
        """When each run was finished, by variant and seed."""
        return {
            (path.parent.parent.name, path.parent.name): path.stat().st_mtime_ns
            for path in self.folder.glob("*/seed-*/result.json")
        }


@pytest.fixture
def ablation(tiny_tree, tmp_path):
    del tiny_tree["name"]
    tiny_tree["training"]["epochs"] = 1
    return Ablation(tmp_path, tiny_tree)


def test_an_experiment_trains_what_is_missing_and_keeps_the_rest(ablation):
    printed, said = ablation.run("--json")
    found = json.loads(printed)
    assert [row["variant"] for row in found["rows"]] == ["none", "cka"]
    assert [len(row["cells"]["validation/accuracy"]["by_seed"]) for row in found["rows"]] == [2, 2]
    assert json.loads((ablation.folder / "comparison.json").read_text()) == found
    assert "cka, seed 1 (4/4) finished: validation/accuracy" in said
    assert not list(ablation.folder.glob("*/seed-*/checkpoints"))
    assert "WARNING" not in (ablation.folder / "none" / "seed-0.log").read_text()
    before = ablation.ended_at()
    printed, said = ablation.run()
    assert ablation.ended_at() == before
    assert said.count("was there") == 4
    assert "not enough" in printed
    assert re.search(r"cka, seed 1 \(4/4\) was there: validation/accuracy 0\.\d+", said)
    # One more variant, one that has changed, one seed more: the others are left alone.
    variants = {
        "none": {"freezing.policy": "none"},
        "cka": {"freezing.curve": "linear"},
        "all": {"freezing.policy": "all"},
    }
    told, _ = ablation.run("--dry-run", variants=variants, seeds=[0, 1, 2])
    assert "\n9 runs in " in told
    assert ": 2 kept, 2 trained anew, the old one removed, 5 begun\n" in told
    assert "cka, seed 0: trained anew, the old one removed: it is of another configuration: " in told
    assert ablation.ended_at() == before
    _, said = ablation.run(variants=variants, seeds=[0, 1, 2])
    after = ablation.ended_at()
    assert len(after) == 9
    assert {run for run in before if after[run] == before[run]} == {("none", "seed-0"), ("none", "seed-1")}
    assert "cka, seed 0 (2/9) begins, as it is of another configuration: " in said
    assert "freezing.curve: cubic there, linear here" in said
    told, _ = ablation.run("--dry-run", variants={"all": {"freezing.policy": "all"}}, seeds=[0, 1, 2])
    assert told.startswith("3 runs in ") and ": 3 kept\n" in told
    assert "the file does not name them: cka/seed-0, cka/seed-1, cka/seed-2, none/seed-0," in told


def test_what_runs_warn_of_is_told_once_a_variant(ablation):
    ablation.tree["base"]["freezing"]["final"] = 9
    _, said = ablation.run(variants={"cka": {}, "update_norm": {"freezing.metric": "update_norm"}}, seeds=2)
    lines = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert [line.split(": nothing froze: after 1 scorings the threshold is 0")[0] for line in lines] == [
        "warning: cka, seed 0",
        "warning: update_norm, seed 0",
    ]
    kept, _ = ablation.run()
    assert "warning: cka and update_norm warned: nothing froze: after 1 scorings the threshold is 0" in kept
    # What rich has broken is one line again.
    assert all(line.endswith("raise final_threshold, lower final, or normalize the scores") for line in lines)


def test_variants_of_a_seed_begin_with_the_same_head_and_see_the_same_rows(ablation, tmp_path):
    # Adapters of another size draw more when they are made, and so other dropout.
    model = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ablation.tree["base"]["model"] = {"path": str(model)}
    ablation.tree["base"]["training"]["log_every"] = 1
    ablation.run(variants={"small": {}, "large": {"adapter.rank": 4}, "cut": {"freezing.policy": "all"}}, seeds=2)
    losses = {
        path.parent: json.loads(path.read_text().splitlines()[0])["train/loss"]
        for path in ablation.folder.glob("*/seed-*/metrics.jsonl")
    }
    by_seed = [{loss for path, loss in losses.items() if path.name == f"seed-{seed}"} for seed in (0, 1)]
    assert [len(found) for found in by_seed] == [1, 1]
    assert by_seed[0] != by_seed[1]


def test_wandb_has_the_comparison_as_a_table_in_the_group_of_its_runs(ablation):
    ablation.tree["base"]["tracking"] = {"wandb": "offline"}
    ablation.run_fresh(seeds=1)
    told = json.dumps(records(ablation.folder))
    for shown in ("comparison.table.json", "ablation", (ablation.folder / "experiment_id").read_text().strip()):
        assert shown in told, shown
    table = json.loads(next(ablation.folder.glob("wandb/offline-run-*/files/media/table/comparison*.json")).read_text())
    columns = {name: [row[i] for row in table["data"]] for i, name in enumerate(table["columns"])}
    assert set(columns["variant"]) == {"none", "cka"}
    assert {"mean", "difference", "low", "high", "p_corrected"} < set(columns)
    (one,) = (
        value
        for value, verdict in zip(columns["verdict"], columns["variant"], strict=True)
        if verdict == "cka" and value
    )
    assert one == "not enough seeds to say"
    groups = {
        re.search(r'"(?:run_group|runGroup)": "(\w+)"', json.dumps(records(folder))).group(1)
        for folder in (ablation.folder, ablation.folder / "cka" / "seed-0")
    }
    assert groups == {"experiment"}


def test_a_run_that_fails_is_told_and_the_others_go_on(ablation):
    variants = {"none": {"freezing.policy": "none"}, "lost": {"training.learning_rate": 1e30}}
    printed, said = ablation.run(variants=variants, seeds=1)
    assert "lost, seed 0 (2/2) failed: " in said
    assert "lost, seed 0, is not in it: " in printed
    page = (ablation.folder / "report.html").read_text()
    assert "lost, seed 0, is not in it: exit code 1" in page
    assert "no runs to compare" in printed
    # It is tried again, and nothing else is.
    before = ablation.ended_at()
    ablation.run(code=0)
    assert ablation.ended_at() == before
    ablation.run(code=1, variants={"lost": variants["lost"], "more": {"training.learning_rate": 1e29}})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_experiment_that_is_interrupted_goes_on_from_its_checkpoints(ablation, number):
    ablation.tree["base"]["training"] |= {"save_every": 5, "keep_checkpoints": 1, "eval_every": 20}
    # One is long enough to be interrupted.
    ablation.tree["variants"] = {
        "none": {"freezing.policy": "none", "training.epochs": 40},
        "cka": {"training.epochs": 1},
    }
    ablation.tree["keep_checkpoints"] = True
    with ablation.start(seeds=1) as process:
        wait_for(lambda: list(ablation.folder.glob("none/seed-0/checkpoints/step-*")))
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL)
    assert not ablation.ended_at()
    told, _ = ablation.run("--dry-run", "--json", seeds=1)
    assert [(row["variant"], row["outlook"]) for row in json.loads(told)] == [
        ("none", "resumed from its checkpoint"),
        ("cka", "begun"),
    ]
    _, said = ablation.run(seeds=1)
    assert len(ablation.ended_at()) == 2
    rows = [json.loads(line) for line in (ablation.folder / "none/seed-0/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert "starts anew" not in (ablation.folder / "none/seed-0.log").read_text()


def test_two_trainings_go_on_at_a_time_and_two_commands_do_not(ablation):
    ablation.tree["base"]["training"]["epochs"] = 12
    with ablation.start("--workers", "2", seeds=2) as process:
        wait_for(lambda: len(trainings_of(process)) == 2)
        _, said = ablation.run(code=2)
        assert "is being run here by another command" in said
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(ablation.ended_at()) == 4


def test_a_run_that_cannot_be_read_is_not_removed(ablation):
    ablation.run(seeds=1)
    folder = ablation.folder / "cka" / "seed-0"
    (folder / "config.yaml").write_text("freezing: {policy: of-the-future}")
    told, _ = ablation.run("--dry-run", seeds=1)
    assert "cka, seed 0: refused: " in told
    printed, said = ablation.run(seeds=1)
    assert "cka, seed 0 (2/2) failed: " in said
    assert (folder / "adapter").exists()
    assert "config.yaml this version cannot read" in printed


def test_data_that_are_not_there_are_told_before_the_first_run(ablation):
    ablation.tree["base"]["data"]["path"] = "nowhere.csv"
    _, said = ablation.run(code=2)
    assert "data: " in said
    assert not ablation.folder.exists()

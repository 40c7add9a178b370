import errno
import json
import os
import subprocess
import sys

import pytest
from forks import command

from safe_lab import yaml_core
from safe_lab.child import FAULT_OF_MACHINE
from safe_lab.cli import COMMANDS, main
from safe_lab.memory import KINDS

NO_TORCH = """
import sys
from safe_lab.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "wandb", "optuna", "sklearn", "pandas"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.fixture
def path(tiny_tree, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml_core.write(tiny_tree))
    return file


@pytest.fixture
def run_cli(tmp_path):
    """Run a command in a fork of this process."""

    def run(*arguments):
        printed, said = tmp_path / "printed", tmp_path / "said"
        for file in (printed, said):
            file.write_text("")
        with command(arguments, printed, said) as fork:
            fork.wait(timeout=120)
        return subprocess.CompletedProcess(arguments, fork.returncode, printed.read_text(), said.read_text())

    return run


def run_fresh(*arguments, **environment):
    """Run a command in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "safe_lab", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 0),
        (["train", "--help"], 0),
        (["train", "nowhere.yaml"], 2),
        (["plan", "--help"], 0),
        (["plan", "nowhere.yaml"], 2),
    ],
)
def test_help_and_bad_configurations_are_answered_without_torch(arguments, code):
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())


def test_help_lists_every_field(capsys):
    from safe_lab import config as configuration

    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key, *_ in configuration.fields())


def test_all_faults_come_at_once_with_exit_code_2(path, capsys):
    assert main(["train", str(path), "training.epoch=3", "freezing.metric=fischer"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_print_config_prints_yaml_that_loads_to_the_same(path, capsys, tmp_path):
    assert main(["train", str(path), "--print-config", "seed=7"]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert main(["train", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert yaml_core.parse(printed)["seed"] == 7


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "a=1"],
        ["train", "--resume", "--overwrite", "x.yaml"],
        ["trian"],
        ["--nonsense"],
        ["plan"],
        ["plan", "x.yaml", "--fit"],
    ],
)
def test_a_wrong_command_line_exits_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_from_the_command_line_shows_what_happened_and_can_be_repeated_only_on_purpose(path, run_cli):
    done = run_fresh("train", path)
    assert done.returncode == 0, done.stderr
    for part in (
        "train 43, validation 5 examples",
        "freeze at threshold",
        "frozen share",
        "adapter layers folded, ",
        "examples cached behind layer",
        "task metrics",
        "unfrozen, forecast",
        "frozen at epoch",
        "files: ",
    ):
        assert part in done.stderr, part
    again = run_cli("train", path)
    assert (again.returncode, "finished already" in again.stderr) == (2, True)
    assert run_cli("train", path, "--resume").returncode == 0
    other = run_cli("train", path, "freezing.metric=fisher")
    assert (other.returncode, "freezing.metric: cka there, fisher here" in other.stderr) == (2, True)
    assert run_fresh("train", path, "--overwrite", "--quiet", "training.max_steps=1").stderr.count("\n") <= 1


def test_bad_data_exits_2_with_one_line_and_no_traceback(path, run_cli):
    done = run_cli("train", path, "data.label_column=lable")
    assert done.returncode == 2
    assert "did you mean label" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_nan_loss_exits_1_and_says_so(path, run_cli):
    done = run_cli(
        "train", path, "training.learning_rate=1e30", "training.max_grad_norm=null", "training.warmup_ratio=0"
    )
    assert done.returncode == 1
    assert "stopped: the loss is" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_exits_75_and_the_run_can_be_resumed(path, monkeypatch, capsys):
    from safe_lab.run_folder import RunFolder

    append = RunFolder.append

    def full(self, file, row):
        if row["step"] == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, file, row)

    settings = ["training.log_every=1", "training.save_every=4"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", full)
        assert main(["train", str(path), "--quiet", *settings]) == FAULT_OF_MACHINE
    assert "No space left on device" in capsys.readouterr().err
    assert main(["train", str(path), "--quiet", "--resume", *settings]) == 0
    rows = RunFolder(next(path.parent.joinpath("runs").rglob("seed-0"))).rows("metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 19))


def test_environment_names_the_command(path, run_cli):
    run_cli("train", path, "training.max_steps=1")
    environment = json.loads((next((path.parent / "runs").rglob("environment.json"))).read_text())
    assert environment["command"][1:] == ["train", str(path), "training.max_steps=1"]


def test_a_plan_as_json_is_json_and_nothing_else(path, capsys):
    assert main(["plan", str(path), "training.batch_size=3", "freezing.unit=module", "--json"]) == 0
    printed = capsys.readouterr()
    planned = json.loads(printed.out)
    assert printed.err == ""
    assert [row["frozen_depth"] for row in planned["rows"]] == list(range(7))
    for row in planned["rows"]:
        assert set(row["bytes"]) == set(KINDS)
        assert sum(row["bytes"].values()) == row["peak_bytes"]
        assert sum(row["flops"].values()) == row["flops_per_step"]
        assert row["checkpoint_bytes"] > row["optimizer_bytes"] > 0
        assert set(row) >= {"trainable_parameters", "measured"}
    assert planned["model"]["layers"] == 3
    assert (planned["step"]["batch_size"], planned["step"]["tokens"]) == (3, 16)
    assert "fit" not in planned


def test_a_plan_is_a_line_for_each_depth(path):
    done = run_fresh("plan", path)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "3 layers",
        "activations",
        "8 examples x 16 tokens",
        "100%",
        "Not in the figures",
    ):
        assert part in done.stdout, part
    depths = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert depths == ["0", "1", "2", "3"]


def test_a_plan_of_code_that_reads_values_is_measured_with_random_weights(path, tiny_folder, tmp_path):
    (tmp_path / "reading.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class ReadingConfig(BertConfig):\n"
        "    model_type = 'reading'\n"
        "class ReadingModel(BertForSequenceClassification):\n"
        "    config_class = ReadingConfig\n"
        "    def forward(self, input_ids=None, **arguments):\n"
        "        assert input_ids.max().item() >= 0\n"
        "        return super().forward(input_ids, **arguments)\n"
    )
    architecture = json.loads((tiny_folder / "config.json").read_text())
    architecture["model_type"] = "reading"
    architecture["auto_map"] = {
        "AutoConfig": "reading.ReadingConfig",
        "AutoModelForSequenceClassification": "reading.ReadingModel",
    }
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    own_code = {"HF_HOME": str(tmp_path / "home")}
    done = run_fresh("plan", path, f"model.path={tmp_path}", "model.trust_remote_code=true", "--json", **own_code)
    assert done.returncode == 0, done.stderr
    assert any("Real steps were measured" in note for note in json.loads(done.stdout)["notes"])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "24GiBi"], "error: --fit: '24GiBi': there is no unit 'GiBi'; did you mean GiB?"),
        (["--fit", "much"], "error: --fit: 'much' is no size"),
        (
            ["model.path=shape://robert-large"],
            "error: model.path: no shape 'robert-large'; did you mean roberta-large?",
        ),
        (["data.max_length=99"], "error: data.max_length is 99, and the model takes 40 tokens"),
        (["adapter.method=prompt_tuning"], "error: adapter."),
        (["freezing.unit=lair"], "error: freezing.unit: "),
    ],
)
def test_a_plan_that_cannot_be_made_exits_2_with_one_line(path, arguments, message, capsys):
    assert main(["plan", str(path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""

import errno
import json
import subprocess
import sys

import pytest

from safe_lab import yaml_core
from safe_lab.cli import main

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


def run_cli(*arguments):
    return subprocess.run([sys.executable, "-m", "safe_lab", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), ([], 0), (["train", "--help"], 0), (["train", "nowhere.yaml"], 2)],
)
def test_help_and_bad_configurations_are_answered_without_torch(arguments, code):
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


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
    [["train"], ["train", "a=1"], ["train", "--resume", "--overwrite", "x.yaml"], ["trian"], ["--nonsense"]],
)
def test_a_wrong_command_line_exits_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_from_the_command_line_shows_what_happened_and_can_be_repeated_only_on_purpose(path, tiny_tree):
    done = run_cli("train", path)
    assert done.returncode == 0, done.stderr
    for part in (
        "train 43, validation 5 examples",
        "freeze at threshold",
        "frozen share",
        "task metrics",
        "frozen at epoch",
        "files: ",
    ):
        assert part in done.stderr, part
    again = run_cli("train", path)
    assert (again.returncode, "finished already" in again.stderr) == (2, True)
    assert run_cli("train", path, "--resume").returncode == 0
    other = run_cli("train", path, "freezing.metric=fisher")
    assert (other.returncode, "freezing.metric: cka there, fisher here" in other.stderr) == (2, True)
    assert run_cli("train", path, "--overwrite", "--quiet", "training.max_steps=1").stderr.count("\n") <= 1


def test_bad_data_exits_2_with_one_line_and_no_traceback(path):
    done = run_cli("train", path, "data.label_column=lable")
    assert done.returncode == 2
    assert "did you mean label" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_nan_loss_exits_1_and_says_so(path):
    done = run_cli(
        "train", path, "training.learning_rate=1e30", "training.max_grad_norm=null", "training.warmup_ratio=0"
    )
    assert done.returncode == 1
    assert "stopped: the loss is" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_exits_1_and_the_run_can_be_resumed(path, monkeypatch, capsys):
    from safe_lab.run_folder import RunFolder

    append = RunFolder.append

    def full(self, file, row):
        if row["step"] == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, file, row)

    settings = ["training.log_every=1", "training.save_every=4"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", full)
        assert main(["train", str(path), "--quiet", *settings]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(["train", str(path), "--quiet", "--resume", *settings]) == 0
    rows = RunFolder(next(path.parent.joinpath("runs").rglob("seed-0"))).rows("metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 19))


def test_environment_names_the_command(path, tiny_tree):
    run_cli("train", path, "training.max_steps=1")
    environment = json.loads((next((path.parent / "runs").rglob("environment.json"))).read_text())
    assert environment["command"][1:] == ["train", str(path), "training.max_steps=1"]

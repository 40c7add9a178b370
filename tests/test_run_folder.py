import subprocess
import sys

import pytest

from safe_lab import config as configuration
from safe_lab.run_folder import AlreadyFinishedError, RunFolder, RunFolderError, claim, to_json


def make(tiny_tree, **changes):
    return configuration.build(tiny_tree | changes)


def claim_and_leave(config, **settings):
    with claim(config, **({"resume": False, "overwrite": False} | settings)) as folder:
        folder.write("config.yaml", configuration.dump(config))
        return folder


def test_a_run_folder_in_use_is_refused_even_for_overwriting(tiny_tree, tmp_path):
    config = make(tiny_tree)
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump(config))
    program = (
        "import sys, safe_lab.config, safe_lab.run_folder as f\n"
        "with f.claim(safe_lab.config.load(sys.argv[1]), resume=False, overwrite=False):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(path)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="live run"):
            claim_and_leave(config, overwrite=True)
        process.kill()
        process.wait()
        claim_and_leave(config, overwrite=True)


def test_an_unfinished_run_wants_to_be_resumed_or_overwritten(tiny_tree):
    config = make(tiny_tree)
    claim_and_leave(config)
    with pytest.raises(RunFolderError, match="--resume goes on with it, --overwrite starts anew"):
        claim_and_leave(config)
    claim_and_leave(config, resume=True)


def test_a_run_goes_on_with_other_measurements_and_trackers(tiny_tree):
    claim_and_leave(make(tiny_tree, sharpness={"every": "freeze"}))
    claim_and_leave(make(tiny_tree, sharpness={"every": "never"}, tracking={"wandb": "offline"}), resume=True)
    with pytest.raises(RunFolderError, match=r"training\.epochs"):
        claim_and_leave(make(tiny_tree, training=tiny_tree["training"] | {"epochs": 9}), resume=True)


def test_a_finished_run_of_another_configuration_is_refused_and_says_what_differs(tiny_tree):
    folder = claim_and_leave(make(tiny_tree))
    folder.write("result.json", "{}")
    with pytest.raises(AlreadyFinishedError, match="finished already"):
        claim_and_leave(make(tiny_tree))
    other = make(tiny_tree, freezing=tiny_tree["freezing"] | {"metric": "fisher"})
    for resume in (False, True):
        with pytest.raises(
            RunFolderError, match=r"a finished run of another .*freezing\.metric: cka there, fisher here"
        ):
            claim_and_leave(other, resume=resume)
    assert folder.result == {}
    again = claim_and_leave(other, overwrite=True)
    assert again.result is None


def test_a_config_that_cannot_be_read_is_not_run_over(tiny_tree):
    config = make(tiny_tree)
    (claim_and_leave(config).path / "config.yaml").write_text("garbage: [")
    with pytest.raises(RunFolderError, match="cannot read"):
        claim_and_leave(config, resume=True)


def test_overwriting_removes_everything_but_follows_no_link(tiny_tree, tmp_path):
    config = make(tiny_tree)
    folder = claim_and_leave(config)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (folder.path / "link").symlink_to(outside)
    (folder.path / "checkpoints").mkdir()
    claim_and_leave(config, overwrite=True)
    assert (outside / "keep").exists()
    assert {entry.name for entry in folder.path.iterdir()} == {".lock", "config.yaml"}


def test_a_folder_that_cannot_be_made_is_told(tiny_tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        claim_and_leave(make(tiny_tree, output_dir=str(tmp_path / "file")))


def test_rows_are_cut_back_to_a_checkpoint_and_lost_rows_are_told(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1})
    sizes = folder.sizes()
    folder.append("metrics.jsonl", {"step": 2})
    folder.append("events.jsonl", {"step": 2})
    folder.cut(sizes)
    assert folder.rows("metrics.jsonl") == [{"step": 1}]
    assert folder.rows("events.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": x}\n')
    with pytest.raises(RunFolderError, match="a row was altered"):
        folder.cut(sizes)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="rows were lost"):
        folder.cut(sizes)


def test_hostile_text_comes_back_as_it_was(tmp_path):
    folder, row = RunFolder(tmp_path), {"text": "line\nbreak \u2028 \x85 \x00 🦄 </script>"}
    folder.append("events.jsonl", row)
    folder.append("events.jsonl", row)
    assert folder.rows("events.jsonl") == [row, row]


def test_json_has_no_nan_and_keeps_hostile_text_on_one_line():
    line = to_json({"a": float("nan"), "b": [1.5, float("inf")], "c": "line\nbreak \u2028 \x00 🦄"})
    assert "\n" not in line
    assert line.startswith('{"a": null, "b": [1.5, null]')


def test_what_is_left_of_a_run_that_was_being_removed_is_neither_finished_nor_another_runs_beginning(
    tiny_tree, monkeypatch
):
    config = make(tiny_tree)
    folder = claim_and_leave(config).path
    (folder / "result.json").write_text("{}")
    (folder / "checkpoints" / "step-5").mkdir(parents=True)

    def fail(path):
        raise OSError("the disk is gone")

    monkeypatch.setattr("safe_lab.run_folder.shutil.rmtree", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        claim_and_leave(make(tiny_tree, seed=0, training=tiny_tree["training"] | {"epochs": 9}), overwrite=True)
    assert not (folder / "result.json").exists()
    assert configuration.load(folder / "config.yaml") == config

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from safe_lab import checkpoint
from safe_lab.checkpoint import DamagedError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
STATE = {"step": 3, "nested": {"list": [1, 2.5, None, "x"], "tensor": torch.arange(3)}, 7: True}


def save(folders, step):
    folder = folders / f"step-{step:08d}"
    checkpoint.save(folder, TENSORS, STATE | {"step": step})
    return folder


def test_what_is_saved_is_loaded(tmp_path):
    tensors, state = checkpoint.load(save(tmp_path, 3))
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert state["nested"]["list"] == STATE["nested"]["list"]
    assert torch.equal(state["nested"]["tensor"], torch.arange(3))
    assert state[7] is True


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "altered", "removed"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, harm):
    bad = save(tmp_path, 2)
    content = bytearray((bad / name).read_bytes())
    if harm == "cut":
        (bad / name).write_bytes(content[: len(content) // 2])
    elif harm == "altered":
        content[len(content) // 2] ^= 1
        (bad / name).write_bytes(content)
    else:
        (bad / name).unlink()
    with pytest.raises(DamagedError, match="step-00000002"):
        checkpoint.load(bad)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    tensors, _ = checkpoint.load(folder)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    good = save(tmp_path, 1)
    (tmp_path / ".unfinished-step-00000002").mkdir()
    assert checkpoint.steps(tmp_path) == [good]
    save(tmp_path, 2)
    assert not (tmp_path / ".unfinished-step-00000002").exists()


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2)
    assert [folder.name for folder in checkpoint.steps(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_with_a_foreign_object_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = save(tmp_path, 1)
    torch.save({"x": Evil()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {
        "sha256": checkpoint._hash(folder / "state.pt"),
        "bytes": (folder / "state.pt").stat().st_size,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(folder)
    assert not (tmp_path / "owned").exists()


def test_there_is_no_newest_in_an_empty_place(tmp_path):
    assert checkpoint.steps(tmp_path / "none") == []

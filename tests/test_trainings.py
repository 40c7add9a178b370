"""Trainings in processes of their own: the files of one that is watched, and what becomes of one that is killed."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from safe_lab import config as configuration
from safe_lab.child import FAULT_OF_MACHINE
from safe_lab.trainings import _Evaluations, train


def row(step, **values):
    return json.dumps({"step": step} | values) + "\n"


def test_each_evaluation_is_seen_once_though_the_file_is_cut_back_and_grows_again_in_between(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = _Evaluations(tmp_path)
    assert list(rows.read()) == []
    path.write_text(row(1, loss=0.123) + row(2, **{"validation/accuracy": 0.5}) + row(3, loss=0.1))
    assert [found["step"] for found in rows.read()] == [2]
    # Resumed from step 2, with rows of other lengths and past the old end.
    path.write_text(
        row(1, loss=0.123)
        + row(2, **{"validation/accuracy": 0.5})
        + row(3, loss=0.11111)
        + row(4, **{"validation/accuracy": 0.6})
    )
    assert [found["step"] for found in rows.read()] == [4]


def test_half_a_row_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows, whole = _Evaluations(tmp_path), row(1, **{"validation/accuracy": 0.5})
    path.write_text(whole[:-8])
    assert list(rows.read()) == []
    path.write_text(whole)
    assert len(list(rows.read())) == 1


class Ends:
    """Starts nothing, and has commands end as they are told to: exit codes, and what a run leaves behind when it ends well."""

    def __init__(self, config, *codes):
        self.config = config
        self.codes = list(codes)
        self.commands = []
        self.words = []

    @contextmanager
    def start(self, arguments, log):
        command, code = arguments[0], self.codes.pop(0)
        self.commands.append(command)
        self.words.append(arguments)
        log.write_text("stopped: for a reason\n")
        result = self.config.run_folder / "result.json"
        result.parent.mkdir(exist_ok=True)
        (result.parent / "config.yaml").write_text(configuration.dump(self.config))
        if code == 0:
            result.write_text(json.dumps({"sharpness": {"trace": 1} if command == "sharpness" else None}))
        yield SimpleNamespace(returncode=code, poll=lambda: code)

    def train(self):
        """Train with it."""
        return train(self.config, start=self.start, watch=lambda row: False, tick=lambda: None)


@pytest.fixture
def measured(tiny_tree):
    """A run whose sharpness is measured at its end."""
    return configuration.build(tiny_tree | {"sharpness": {"when": "end"}})


def test_a_run_that_was_killed_before_its_sharpness_was_measured_is_measured_later_however_often_that_is_killed(
    measured,
):
    ends = Ends(measured, -9, 0, -9, -9, 0)
    assert ends.train().how == "finished"
    assert ends.commands == ["train", "train", "sharpness", "sharpness", "sharpness"]


def test_what_kills_a_run_again_and_again_fails_it(measured):
    ends = Ends(measured, -9, -9, -9)
    ended = ends.train()
    assert (ended.how, len(ends.commands)) == ("failed", 3)
    assert "3 times without a newer checkpoint" in ended.reason


def test_a_fault_of_the_machine_fails_no_run(measured):
    ends = Ends(measured, FAULT_OF_MACHINE)
    with pytest.raises(OSError, match="for a reason"):
        ends.train()
    assert Ends(measured, 1).train().how == "failed"


def test_each_death_is_told(measured):
    told = []
    ends = Ends(measured, -9, -15, 0, 0)
    train(measured, start=ends.start, watch=lambda row: False, tick=lambda: None, died=told.append)
    assert [line.partition(" (")[0] for line in told] == ["ended by SIGKILL", "ended by SIGTERM"]


def test_another_configurations_run_is_removed_only_if_that_is_asked_for(measured):
    folder = measured.run_folder
    folder.mkdir(parents=True)
    other = measured.model_copy(update={"training": measured.training.model_copy(update={"epochs": 9})})
    (folder / "config.yaml").write_text(configuration.dump(other))
    (folder / "metrics.jsonl").write_text(row(900, **{"validation/accuracy": 0.9}))
    assert "epochs" in Ends(measured, 0).train().reason
    ends, seen = Ends(measured, 0, 0), []

    def watch(evaluation):
        seen.append(evaluation)
        return False

    ended = train(measured, start=ends.start, watch=watch, tick=lambda: None, overwrite=True)
    assert (ended.how, ends.words[0][-2:]) == ("finished", ["--overwrite", "--quiet"])

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import config_of

from safe_lab.freezing import Scoring
from safe_lab.run import run
from safe_lab.run_folder import RunFolder
from safe_lab.tracking import Tracking
from safe_lab.units import Unit


def records(folder):
    """The records of an offline W&B run."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    printed = subprocess.run(
        [wandb, "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in printed.stdout.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_offline_run_holds_config_adapter_states_and_freeze_events(tiny_tree):
    config = config_of(tiny_tree, tracking={"wandb": "offline"})
    run(config)
    found = json.dumps(records(config.run_folder))
    for key in ("adapter/0/score", "adapter/2/frozen", "adapter/1/threshold", "adapter/0/update_norm", "train/loss"):
        assert key in found, key
    for key in (
        "resources/tokens_per_second",
        "validation/accuracy",
        "freeze_events",
        "freeze-schedule-",
        "learning_rate",
        "resources/step_memory/activations_bytes",
        "resources/flops/backward",
        "resources/memory_mean_step_peak_bytes",
        "resources/seconds/data",
    ):
        assert key in found, key
    assert "step_metric" in found


class Broken:
    name = "broken"

    def __init__(self):
        self.calls = 0

    def log(self, values, step):
        self.calls += 1
        raise ConnectionError("the network is down")


class Recorder:
    name = "recorder"

    def __init__(self):
        self.rows = []

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append("finished")


def scoring(froze=()):
    return Scoring(
        t=1,
        step=5,
        scores=[0.1, 0.2],
        normalized=[0.5, 1.0],
        level=0.15,
        update_norms=[1.0, 2.0],
        froze=list(froze),
        frozen=[i in froze for i in range(2)],
        frozen_depth=len(froze),
        warmup_end=1,
        seconds=0.0,
    )


UNITS = [Unit("a", 0, {}), Unit("b", 1, {})]
EFFECT = {"folded_layers": 2, "prefix_depth": 1, "micro_batch_rows": None}


def test_a_tracker_that_fails_is_named_once_and_left(tmp_path, caplog):
    broken, recorder = Broken(), Recorder()
    tracking = Tracking(RunFolder(tmp_path), UNITS, [broken, recorder])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracking.log({"step": step, "epoch": 0.0, "train/loss": 1.0})
    assert broken.calls == 1
    assert caplog.text.count("tracker broken failed and is left: ConnectionError: the network is down") == 1
    assert len(recorder.rows) == 3
    tracking.close()
    assert recorder.rows[-1] == "finished"


def test_a_scoring_is_a_row_a_unit_and_an_event_if_something_froze(tmp_path):
    folder, recorder = RunFolder(tmp_path), Recorder()
    tracking = Tracking(folder, UNITS, [recorder])
    tracking.log_scoring(scoring(), 1.0, EFFECT)
    assert folder.rows("events.jsonl") == []
    tracking.log_scoring(scoring(froze=[0]), 2.0, EFFECT)
    assert [(row["unit"], row["frozen"]) for row in folder.rows("importance.jsonl")] == [
        ("a", False),
        ("b", False),
        ("a", True),
        ("b", False),
    ]
    (event,) = folder.rows("events.jsonl")
    assert (event["units"], event["scores"], event["frozen_depth"]) == (["a"], [0.1], 1)
    assert EFFECT.items() <= event.items()
    assert recorder.rows[1][1]["adapter/0/frozen"] == 1
    assert recorder.rows[1][1]["adapter/1/normalized_score"] == 1.0


def test_replayed_rows_are_those_that_were_sent(tmp_path):
    folder, first, second = RunFolder(tmp_path), Recorder(), Recorder()
    tracking = Tracking(folder, UNITS, [first])
    tracking.log({"step": 5, "epoch": 1.0, "train/loss": 1.0, "device": None})
    tracking.log_scoring(scoring(froze=[0]), 1.0, EFFECT)
    Tracking(folder, UNITS, [second]).replay()

    def merged(rows):
        together = {}
        for step, values in rows:
            together.setdefault(step, {}).update(values)
        return together

    assert merged(first.rows) == merged(second.rows)


def test_tensorboard_is_written_and_an_unknown_backend_does_not_stop_training(tiny_tree, caplog, monkeypatch):
    config = config_of(tiny_tree, training={"max_steps": 2}, tracking={"others": ["tensorboard", "comet_ml"]})
    run(config)
    assert list(config.run_folder.rglob("events.out.tfevents*"))
    assert "tracker comet_ml cannot start" in caplog.text


def test_online_without_a_key_asks_nothing_and_trains_on(tiny_tree, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run(config_of(tiny_tree, training={"max_steps": 2}, tracking={"wandb": "online"}))
    assert "tracker wandb cannot start" in caplog.text

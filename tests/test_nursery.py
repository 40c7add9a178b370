"""Commands that are forked from a process which has imported what they need."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from safe_lab import config as configuration
from safe_lab.nursery import Nursery

FOREVER = {"epochs": 100_000, "save_every": "never", "eval_every": "never"}


@pytest.fixture(scope="module")
def nursery():
    """One for all: where it was killed, the next order starts another."""
    found = Nursery()
    yield found
    found.close()


@pytest.fixture
def endless(tiny_tree, tmp_path):
    """The words of a training that does not end by itself."""
    tiny_tree["training"] |= FOREVER
    (tmp_path / "endless.yaml").write_text(configuration.dump(configuration.build(tiny_tree)))
    return ["train", str(tmp_path / "endless.yaml"), "--quiet"]


def wait_for_pid(running):
    """The process id of what was ordered, once it runs."""
    while running.pid is None:
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.1)
    return running.pid


def test_a_forked_command_tells_its_exit_code_and_its_log(nursery, tmp_path):
    log = tmp_path / "log"
    with nursery.start(["train", str(tmp_path / "nowhere.yaml")], log) as running:
        assert running.wait() == 2
    assert "no such file" in log.read_text()
    # Of the same nursery; the log is begun anew.
    with nursery.start(["--version"], log) as running:
        assert running.wait() == 0
    assert log.read_text().startswith("safe-lab ")


def test_a_forked_command_that_is_left_or_killed_is_gone(nursery, endless, tmp_path):
    with nursery.start(endless, tmp_path / "log") as running:
        pid = wait_for_pid(running)
    assert running.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(pid)
    with nursery.start(endless, tmp_path / "log") as running:
        os.kill(wait_for_pid(running), signal.SIGTERM)
        assert running.wait() == -signal.SIGTERM


def test_what_was_forked_ends_with_its_nursery_and_the_next_is_forked_from_a_new_one(nursery, endless, tmp_path):
    with nursery.start(endless, tmp_path / "log") as running:
        pid = wait_for_pid(running)
        running.nursery.kill()
        assert running.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with nursery.start(["--version"], tmp_path / "log") as running:
        assert running.wait() == 0

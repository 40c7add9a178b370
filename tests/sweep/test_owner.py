"""Workers that are watched by others: which of them are dead."""

import os
import time

import optuna
import psutil
import pytest

from safe_lab.sweep import owner
from safe_lab.sweep.owner import Watch, describe_owner
from safe_lab.sweep.roster import BEAT, OWNER


@pytest.fixture
def trial():
    """A running trial, whose worker is on another machine."""
    study = optuna.create_study()
    running = study.ask()
    running.set_user_attr(OWNER, describe_owner() | {"machine": "elsewhere"})
    running.set_user_attr(BEAT, 1)
    return running


def look(watch, trial):
    return watch.is_dead(trial.study.trials[trial.number])


def test_a_worker_elsewhere_is_dead_after_three_beats_that_were_missed(trial, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(owner.time, "monotonic", lambda: now[0])
    watch = Watch(heartbeat_seconds=10)
    found = []
    for beat, seconds in ((1, 0), (1, 9), (2, 9), (2, 9), (2, 9), (2, 9), (2, 9)):
        now[0] += seconds
        trial.set_user_attr(BEAT, beat)
        found.append(look(watch, trial))
    assert found == [False] * 6 + [True]


def test_time_in_which_nobody_looked_is_no_silence(trial, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(owner.time, "monotonic", lambda: now[0])
    watch = Watch(heartbeat_seconds=10)
    look(watch, trial)
    now[0] += 500
    assert not look(watch, trial)
    for _ in range(2):
        now[0] += 11
        look(watch, trial)
    now[0] += 11
    assert look(watch, trial)


def test_a_worker_on_this_machine_is_dead_once_its_process_is_gone(trial):
    watch = Watch(heartbeat_seconds=1000)
    trial.set_user_attr(OWNER, describe_owner())
    assert not look(watch, trial)
    child = os.fork()
    if child == 0:
        time.sleep(60)
    owner_of_child = describe_owner() | {"process": child}
    trial.set_user_attr(OWNER, owner_of_child | {"since": psutil.Process(child).create_time()})
    assert not look(watch, trial)
    os.kill(child, 9)
    # A zombie until it is waited for.
    time.sleep(0.1)
    assert look(watch, trial)
    os.waitpid(child, 0)
    assert look(watch, trial)
    # Another process with the number of one that is gone.
    trial.set_user_attr(OWNER, describe_owner() | {"since": 1.0})
    assert look(watch, trial)

"""What trainings side by side are given of a machine."""

import pytest

from safe_lab import hardware
from safe_lab.hardware import environments, find_gpus
from safe_lab.section import ConfigError


@pytest.mark.parametrize(
    ("wanted", "workers", "threads"), [(None, 2, "4"), ("16", 2, "4"), ("3", 2, "3"), (None, 9, "1"), ("many", 2, "4")]
)
def test_cores_are_shared_out_and_no_more_than_there_are(monkeypatch, wanted, workers, threads):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    found = environments(workers, [])
    assert [entry["OMP_NUM_THREADS"] for entry in found] == [threads] * workers


def test_one_worker_has_all_of_it():
    assert environments(1, []) == [{}]


def test_each_worker_has_a_gpu_of_its_own():
    found = environments(2, ["4", "7"])
    assert [entry["CUDA_VISIBLE_DEVICES"] for entry in found] == ["4", "7"]
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        environments(3, ["4", "7"])


def test_gpus_are_those_that_may_be_used():
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-8"}) == ["2", "GPU-8"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []

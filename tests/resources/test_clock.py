"""Every moment is booked once."""

import time

import pytest
import torch

from safe_lab.resources import Clock, EnergyMeter

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch):
    """The time, which goes on only as ``now[0]`` is raised."""
    moment = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: moment[0])
    return moment


def test_activities_add_up_to_the_wall_time(now):
    clock = Clock(CPU)
    now[0] += 5
    for _ in clock.each("data", range(20)):
        with clock.on("forward"):
            now[0] += 1
            with clock.on("tracking"):
                now[0] += 2
            now[0] += 4
    clock.switch("other")
    now[0] += 3
    seconds = clock.read()
    assert sum(seconds.values()) == now[0] - 100
    spent = {activity: value for activity, value in seconds.items() if value}
    assert spent == {"setup": 5, "forward": 100, "tracking": 40, "other": 3}


def test_waiting_for_an_item_is_booked_and_work_on_it_is_not(now):
    def slow():
        for i in range(3):
            now[0] += 10
            yield i

    clock = Clock(CPU, "other")
    items = []
    for item in clock.each("data", slow()):
        now[0] += 20
        items.append(item)
    seconds = clock.read()
    assert items == [0, 1, 2]
    assert seconds["data"] == 30 and seconds["other"] == 60


def test_an_exception_gives_the_activity_before_back():
    clock = Clock(CPU, "other")
    with pytest.raises(ValueError), clock.on("forward"):
        raise ValueError
    assert clock.switch("data") == "other"


def test_what_is_moved_is_taken_from_where_it_was(now):
    clock = Clock(CPU, "scoring")
    now[0] += 2
    clock.move("scoring", "freezing", 0.5)
    seconds = clock.read()
    assert seconds["freezing"] == 0.5 and seconds["scoring"] == 1.5


def test_an_earlier_part_of_the_run_counts():
    clock = Clock(CPU)
    clock.add({"forward": 7.0})
    assert clock.read()["forward"] == 7.0


def test_there_are_no_joules_without_a_meter():
    energy = EnergyMeter(CPU)
    energy.add(None)
    assert energy.joules is None


def test_joules_are_the_counters_difference_and_earlier_parts(monkeypatch):
    counter = iter([100.0, 103.0, 110.0])
    monkeypatch.setattr("safe_lab.resources.clock._energy_counter", lambda device: lambda: next(counter))
    energy = EnergyMeter(torch.device("cuda"))
    assert energy.joules == 3.0
    energy.add(50.0)
    assert energy.joules == 60.0


class FakeEvent:
    """A CUDA event on a stream that is 1 s behind for each piece of work queued."""

    stream = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = FakeEvent.stream

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def test_on_cuda_an_activity_is_charged_for_the_work_it_queued(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Clock(torch.device("cuda"), "other")
    with clock.on("forward"):
        FakeEvent.stream += 1
    with clock.on("backward"):
        FakeEvent.stream += 2
    assert not waited  # marks are recorded, not waited for
    seconds = clock.read()
    assert waited and seconds["forward"] == 1.0 and seconds["backward"] == 2.0 and seconds["other"] == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_seconds_add_up_to_the_wall_time():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    clock = Clock(device, "other")
    with clock.on("forward"):
        for _ in range(50):
            x = x @ x / 64
    seconds = clock.read()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - began, rel=0.02)
    assert seconds["forward"] > 0.9 * sum(seconds.values())

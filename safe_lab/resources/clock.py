"""Seconds by activity, and joules."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

Item = TypeVar("Item")

ACTIVITIES = (
    "setup",
    "data",
    "forward",
    "backward",
    "optimizer",
    "scoring",
    "freezing",
    "cache",
    "checkpoint",
    "evaluation",
    "sharpness",
    "tracking",
    "other",
)
# What the training proper consists of.
TRAINING = ("data", "cache", "forward", "backward", "optimizer", "other")


class Clock:
    """Seconds by activity; every moment since it was made is booked on one.

    On CUDA the marks are events in the stream, so that an activity is charged for the work it queued and not for the queueing;
    they are read together, when :meth:`read` waits for the device.
    """

    def __init__(self, device: torch.device, activity: str = "setup") -> None:
        """Begin with ``activity``, on the clock of ``device``."""
        self._device, self._cuda = device, device.type == "cuda"
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = activity, self.mark()
        self._unread: list[tuple[str, Any, Any]] = []

    def switch(self, activity: str) -> str:
        """Book what follows on ``activity``; returns the one before."""
        before, now = self._activity, self.mark()
        self._unread.append((before, self._since, now))
        self._activity, self._since = activity, now
        return before

    @contextmanager
    def on(self, activity: str) -> Iterator[None]:
        """Book a block on ``activity``, and what follows on the one before."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def each(self, activity: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; waiting for each is booked on ``activity``."""
        iterator, nothing = iter(items), object()
        while True:
            with self.on(activity):
                item = next(iterator, nothing)
            if item is nothing:
                return
            yield item  # type: ignore[misc]

    def move(self, source: str, target: str, seconds: float) -> None:
        """Book ``seconds`` that were booked on ``source`` on ``target`` instead."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by activity up to now; on CUDA this waits for the device."""
        self.switch(self._activity)
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for activity, began, ended in self._unread:
            self._seconds[activity] += self.between(began, ended)
        self._unread.clear()
        return dict(self._seconds)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count seconds of an earlier part of the run in."""
        for activity, value in seconds.items():
            self._seconds[activity] += value

    def mark(self) -> Any:
        """This moment, for :meth:`between`."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, began: Any, ended: Any) -> float:
        """Seconds between two marks that the device has passed."""
        return float(began.elapsed_time(ended) / 1000 if self._cuda else ended - began)


class EnergyMeter:
    """Joules that a GPU used since the meter was made, by NVML's own counter.

    The counter is the whole GPU's: what other processes do on it is in it. Without a counter (no NVIDIA GPU, or one before Volta)
    there is no figure.
    """

    def __init__(self, device: torch.device) -> None:
        """Find the counter of ``device``."""
        self._read = _energy_counter(device)
        self._start = None if self._read is None else self._read()
        self._earlier = 0.0

    @property
    def joules(self) -> float | None:
        """Joules so far; None without a counter."""
        return None if self._read is None or self._start is None else self._earlier + self._read() - self._start

    def add(self, joules: float | None) -> None:
        """Count an earlier part of the run in."""
        self._earlier += joules or 0.0


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its identity, as CUDA_VISIBLE_DEVICES renumbers.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # noqa: BLE001 - of a driver that is missing or old NVML raises what it likes
        log.info("no energy counter: %s", error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

"""Timing: medians and spreads of launches taken in turns."""

from __future__ import annotations

import time

import pytest
import torch

from fake_backend import CPU
from fake_platform import Npu
from kernelmux.contract.device import PLATFORMS, Device
from kernelmux.measure import timing
from kernelmux.measure.timing import Timing, time_launches


def test_a_timing_holds_the_median_and_where_tenths_lie():
    found = Timing.of([float(number) for number in range(11)])
    assert (found.p10, found.median, found.p90) == (1.0, 5.0, 9.0)


def test_one_sample_is_its_own_spread():
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0)


def test_a_launch_that_sleeps_takes_as_long():
    found = time_launches([lambda: time.sleep(0.002)] * 2, CPU)
    assert 2000 <= found.p10 <= found.median <= found.p90
    assert found.median < 20_000
    assert not found.captured


def test_every_launch_is_called_equally_often_in_turns():
    order: list[int] = []
    time_launches([lambda number=number: order.append(number) for number in range(3)], CPU)
    assert order == [0, 1, 2] * (timing.REPLAYS + 1)


def test_long_launches_are_sampled_less_often(monkeypatch):
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    calls: list[int] = []
    time_launches([lambda: calls.append(1)], CPU)
    assert len(calls) == 1 + 3


class Clock:
    """A host and one stream of a device, in microseconds; nothing but launches and waits takes time."""

    def __init__(self):
        self.host, self.done = 0.0, 0.0

    def launch(self, host, device):
        """Python takes `host` to enqueue what takes the device so long."""
        self.host += host
        self.done = max(self.host, self.done) + device

    def synchronize(self):
        self.host = max(self.host, self.done)

    def record(self, stream):
        return max(self.host, self.done)


@pytest.fixture
def clock(monkeypatch):
    """An `npu` by that clock, torch's events and Python's `perf_counter` too."""
    made = Clock()

    class Clocked(Npu):
        def stream(self, device):
            return made

        def synchronize(self, device):
            made.synchronize()

        def keep_busy(self, stream):
            made.launch(1.0, 5000.0)

    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = stream.record(stream)

        def elapsed_time(self, other):
            return (other.at - self.at) / 1e3

    monkeypatch.setitem(PLATFORMS, "npu", Clocked())
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.host / 1e6)
    return made


@pytest.mark.parametrize("python", [5.0, 900.0, 6000.0])
def test_what_cannot_be_captured_is_timed_on_a_busy_device_which_does_not_wait_for_python(clock, python):
    calls = [lambda: clock.launch(python, 30.0)] * 4
    found = time_launches(calls, Device("npu"), capturable=False)
    assert found.median == pytest.approx(30.0)
    assert not found.captured

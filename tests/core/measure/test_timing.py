"""Timing: medians and spreads of launches taken in turns."""

from __future__ import annotations

import time

from fake_backend import CPU
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

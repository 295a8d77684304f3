"""How long a launch takes: graphs replayed between events, or a clock around calls where there are no streams."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Launch

REPLAYS = 40
"""Samples of which a median is taken; on the CPU fewer where they would take longer than LONGEST."""
LONGEST = 2.0
"""Seconds."""
REPLAY_SECONDS = 2e-3
"""What one replay should last, so that its own start does not show."""
MOST_CAPTURED = 2000
"""Launches that one captured graph holds at most, unless a single round is more."""
MOST_BUSY = 16
"""Times that the device is kept busy before a run at most: what takes Python longer is timed with Python's part."""
BUSY_SECONDS = 0.3
"""What all runs before which the device is kept busy take, by which there are fewer samples; three at least."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch: the median over replays, and where a tenth and nine tenths of them lie below."""

    median: float
    p10: float
    p90: float
    captured: bool = False
    """Whether a captured graph was replayed."""

    @staticmethod
    def of(samples: Sequence[float], captured: bool = False) -> Timing:
        """From microseconds a launch, one number a replay."""
        ordered = sorted(samples)
        tenth = (len(ordered) - 1) / 10
        p10, p90 = ordered[round(tenth)], ordered[round(9 * tenth)]
        return Timing(statistics.median(ordered), p10, p90, captured)


def time_launches(calls: Sequence[Launch], device: Device, capturable: bool = True, stream: Any = None) -> Timing:
    """Times launches that do the same work on different memory, in turns: give enough of them to outrun the caches.

    `stream` is the one that they were bound to, None for one of its own.
    """
    stream = stream or device.platform.stream(device)

    def one_round() -> None:
        for call in calls:
            call()

    if stream is None:
        return Timing.of([sample / len(calls) for sample in _on_the_clock(one_round)])
    # The operands were made on another stream.
    device.platform.synchronize(device)
    with device.platform.on(stream):
        if not capturable:
            samples = _between_events(one_round, device, stream, *_busy(one_round, device, stream))
            return Timing.of([sample / len(calls) for sample in samples])
        # Rounds in one graph, as many as make a replay long against its own start.
        rounds = max(1, min(round(REPLAY_SECONDS / _seconds(one_round, device)), MOST_CAPTURED // len(calls)))
        graph = device.platform.graph()
        with device.platform.capturing(graph, stream):
            for _ in range(rounds):
                one_round()
        samples = _between_events(graph.replay, device, stream)
        return Timing.of([sample / (rounds * len(calls)) for sample in samples], captured=True)


def _on_the_clock(run: Callable[[], object]) -> list[float]:
    """Microseconds of up to REPLAYS runs on the host; one more comes first."""
    run()
    samples: list[float] = []
    ends = time.perf_counter() + LONGEST
    while len(samples) < REPLAYS and (len(samples) < 3 or time.perf_counter() < ends):
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1e6)
    return samples


def _seconds(run: Callable[[], object], device: Device) -> float:
    """How long a run takes without a graph, the second time: an upper bound, as Python enqueues its launches."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        device.platform.synchronize(device)
    return time.perf_counter() - started


def _busy(run: Callable[[], object], device: Device, stream: Any) -> tuple[int, int]:
    """How many samples to take, and how often the device is kept busy before each: till all of a run is enqueued."""
    run()
    device.platform.synchronize(device)
    started = time.perf_counter()
    run()
    enqueued = time.perf_counter()
    device.platform.synchronize(device)
    waited = time.perf_counter()
    device.platform.keep_busy(stream)
    device.platform.synchronize(device)
    busy = time.perf_counter() - waited
    times = min(1 + round((enqueued - started) / busy), MOST_BUSY)
    return max(3, min(REPLAYS, round(BUSY_SECONDS / (times * busy)))), times


def _between_events(
    run: Callable[[], object], device: Device, stream: Any, samples: int = REPLAYS, times_busy: int = 0
) -> list[float]:
    """Microseconds of each of so many runs, on the device's own clock; three more come first.

    Before each the device is kept busy so many times: it finds the launches in line, and does not wait for Python.
    """
    import torch

    events = [[torch.Event(device.torch, enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for _ in range(3):
        run()
    for start, end in events:
        for _ in range(times_busy):
            device.platform.keep_busy(stream)
        start.record(stream)
        run()
        end.record(stream)
    stream.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]

"""When each launch of a session's walks began and ended, by a clock or by the device's own.

Enters: an observer for the steps. Leaves: a Span for each launch of each walk. On a device launches find it busy, so
that they are in line before it comes to them and Python's time does not show; an event stands between each two.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Launch
from kernelmux.measure.timing import time_launches
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch

IN_LINE = 32
"""Launches that are made while the device is busy: Python makes them within the milliseconds for which it is."""
SAMPLES = 32


@dataclass(frozen=True)
class Span:
    """Microseconds of one launch, and until the next one began; None where that is not known."""

    us: float
    gap: float | None


class Times(Observer, ABC):
    """What is common to both: the spans of each walk that was seen, and the last walk itself."""

    cost = 0.0
    """Microseconds of each span that are not its launch's, as another launch tells."""

    def __init__(self) -> None:
        self.walks: list[list[Span]] = []
        self.walk: Walk | None = None

    def end(self, walk: Walk) -> None:
        self.walk = walk
        self.walks.append(self.spans())

    @abstractmethod
    def spans(self) -> list[Span]:
        """Those of the walk that has just ended."""


class Clock(Times):
    """Where a launch has done its work when it returns."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[int, int]] = []

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        began = time.perf_counter_ns()
        call()
        self._marks.append((began, time.perf_counter_ns()))

    def spans(self) -> list[Span]:
        marks, self._marks = self._marks, []
        following = [began for began, _ in marks[1:]] + [marks[-1][1]]
        return [
            Span((end - began) / 1e3, (after - end) / 1e3) for (began, end), after in zip(marks, following, strict=True)
        ]


class Events(Times):
    """On the device's own clock, with what an event costs between two launches."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._device, self._stream = session.plan.device, session.walker.stream
        self._events: list[tuple[torch.Event, torch.Event]] = []
        self._last: Any = None
        self.cost = event_cost(self._device, self._stream)

    def before(self, walk: Walk, index: int) -> None:
        if index % IN_LINE == 0:
            self._device.platform.keep_busy(self._stream)
            self._last = self._mark()

    def after(self, walk: Walk, index: int) -> None:
        began, self._last = self._last, self._mark()
        self._events.append((began, self._last))

    def _mark(self) -> torch.Event:
        import torch

        event = torch.Event(self._device.torch, enable_timing=True)
        event.record(self._stream)
        return event

    def spans(self) -> list[Span]:
        self._stream.synchronize()
        events, self._events = self._events, []
        return [Span(began.elapsed_time(end) * 1e3, None) for began, end in events]


def times_of(session: Session) -> Times:
    """The observer that fits the session's device."""
    return Clock() if session.walker.stream is None else Events(session)


def event_cost(device: Device, stream: Any) -> float:
    """Microseconds by which a launch between two events takes longer than one of many in a graph."""
    import torch

    one = torch.zeros(1, device=device.torch)

    def launch() -> None:
        one.add_(1)

    alone = time_launches([launch], device, stream=stream).median
    with device.platform.on(stream):
        device.platform.keep_busy(stream)
        events = [torch.Event(device.torch, enable_timing=True) for _ in range(SAMPLES + 1)]
        for event in events:
            event.record(stream)
            launch()
        stream.synchronize()
    between = [began.elapsed_time(end) * 1e3 for began, end in pairwise(events)]
    return max(statistics.median(between) - alone, 0.0)

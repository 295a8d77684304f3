"""Capture: a bound walk as one graph of the device (a CUDA graph), which a single replay runs.

Enters: a Walk of capturable kernels. Leaves: a CapturedWalk on the same memory, or a LaunchError that names the node
whose launch a graph cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device, Platform
from kernelmux.contract.kernel import Planes
from kernelmux.errors import LaunchError
from kernelmux.measure.steps import CAPTURED_ROWS
from kernelmux.run.state import in_line
from kernelmux.run.walk import Walk, launch_error
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    from kernelmux.plan.plan import Plan


def captured_rows(plan: Plan, rows: int) -> int | None:
    """The rows of the captured step that a decode step of `rows` is padded to; None where it runs eagerly.

    A power of two within the bucket of `rows`, so that padding changes no choice of kernels.
    """
    if not plan.device.platform.captures or not 1 <= rows <= min(CAPTURED_ROWS, plan.max_rows):
        return None
    size = min(1 << (rows - 1).bit_length(), plan.bucket(rows))
    return None if plan.schedule(size, size).not_capturable else size


@dataclass(frozen=True, eq=False)
class CapturedWalk:
    """A walk as a graph of the device: a call replays it on torch's current stream, and returns the launches.

    A replay that somebody wants to look at is made launch by launch instead, on the stream that it was captured on, or
    is one of a graph that holds what the observer launches, too.
    """

    walk: Walk
    graph: Any
    tail: Callable[[Walk], object]
    """What the graph holds after the walk."""
    stream: Any
    pool: Any = None
    looked_at: dict[Observer, Any] = field(default_factory=dict)
    """Graphs by the observer that one was recorded before."""

    def __call__(self) -> int:
        observer = self.walk.watch.observer
        if observer is not None and observer.wants(self.walk, rehearsal=False):
            self._observed(observer)
        else:
            self.graph.replay()
        return self.walk.launches

    def _observed(self, observer: Observer) -> None:
        recorded = observer.recorded(self.walk)
        with in_line(self.walk.device, self.stream):
            if recorded is None:
                self.walk.observed(observer)
                self.tail(self.walk)
                return
            if recorded not in self.looked_at:
                self.looked_at[recorded] = _recorded(self.walk, self.stream, self.tail, self.pool, recorded)
            self.looked_at[recorded].replay()
            recorded.end(self.walk)

    @property
    def outputs(self) -> Mapping[str, Planes]:
        """The graph's outputs by name; the next walk overwrites them."""
        return self.walk.outputs


def capture(walk: Walk, device: Device, stream: Any, tail: Callable[[Walk], object], pool: Any = None) -> CapturedWalk:
    """Records a walk, and after it what `tail` launches.

    What `tail` allocates comes from `pool`. The walk runs once before: libraries make their handles and workspaces at
    the first call, which a capture forbids.
    """
    with device.platform.on(stream):
        walk.rehearse()
    return CapturedWalk(walk, _recorded(walk, stream, tail, pool, Observer()), tail, stream, pool)


def _recorded(walk: Walk, stream: Any, tail: Callable[[Walk], object], pool: Any, observer: Observer) -> Any:
    """A graph of the walk's launches before an observer's eyes, and after them what `tail` launches."""
    platform = walk.device.platform
    platform.synchronize(walk.device)
    graph = platform.graph()
    failure: LaunchError | None = None
    try:
        with platform.capturing(graph, stream, pool):
            failure = _record(walk, platform, observer)
            if failure is None:
                tail(walk)
    except RuntimeError as error:
        # A capture that a launch has broken also raises where it ends; the launch is to blame.
        if failure is None:
            names = dict.fromkeys(step.choice.name for step in walk.steps)
            message = f"the walk of {len(walk.steps)} nodes ({', '.join(names)}) cannot be captured: {error}"
            raise LaunchError(message, walk.steps[-1].node.name, walk.steps[-1].choice.name) from error
    if failure is not None:
        raise failure
    return graph


def _record(walk: Walk, platform: Platform, observer: Observer) -> LaunchError | None:
    """Makes each launch while the stream is capturing; the error of the first one that breaks the capture."""
    for index, call in enumerate(walk.calls):
        observer.before(walk, index)
        try:
            observer.launch(walk, index, call)
            if not platform.is_capturing():
                raise RuntimeError("it ended the capture")
        except BaseException as error:
            failure = launch_error(walk.steps, index, walk.device, error)
            failure.args = (f"while a graph was captured: {failure}",)
            failure.reason = f"while a graph was captured: {failure.reason}"
            return failure
        observer.after(walk, index)
    return None

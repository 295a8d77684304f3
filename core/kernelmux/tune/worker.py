"""A process that does what may end it: kernels checked, timed and run in whole steps, asked for through a pipe.

Enters: tasks. Leaves: for each task an answer, and before that a sign whenever a stage begins, for whoever waits to
tell slow from stuck. It takes backends from what is installed, as every process does.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernelmux.conformance import Filter, jobs
from kernelmux.contract import registry
from kernelmux.contract.device import Device, find_device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import contained, named
from kernelmux.measure.ops import bind_once, find_kernels, random_weights, time_kernel
from kernelmux.measure.timing import Timing
from kernelmux.measure.variants import time_variants
from kernelmux.measure.works import Work

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Tell = Callable[[str], object]
"""Told the name of each stage as it begins."""


@dataclass(frozen=True)
class Answer:
    """What came of a task: a value, or why there is none."""

    value: Any = None
    fault: str = ""
    over: bool = False
    """Whether the process is of no further use, as where the device was lost to it."""
    hung: bool = False
    """Whether it is only known that a stage took too long."""


@dataclass
class Bench:
    """What a worker keeps from task to task: its device, an open model with what holds its packed weights, and the
    weights of the node that was last asked about."""

    device: Device
    model: tuple[object, Any] | None = None
    held: object = None
    _weights: tuple[object, PackedWeights] | None = field(default=None)

    def weights(self, work: Work) -> PackedWeights:
        """Random weights for a work's node, kept while the same node is asked about."""
        key = work.node.op, work.node.name, work.node.weights
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            gc.collect()
            self._weights = key, random_weights([work], self.device)
        return self._weights[1]


@dataclass(frozen=True)
class SmokeCases:
    """Runs a kernel's smoke cases of one op: the name of the first that fails, with what failed, or nothing."""

    op: str
    kernel: str

    def run(self, bench: Bench, tell: Tell) -> tuple[str, str] | None:
        """Each case is a stage."""
        name = bench.device.kind if bench.device.index == 0 else f"{bench.device.kind}:{bench.device.index}"
        backend, current = self.kernel.partition(":")[0], registry.current()
        for job in jobs(backend, current, name, Filter(self.op, self.kernel, smoke=True)):
            tell(f"case {job.name}")
            outcome = job.run(current, name)
            if outcome.status == "fail":
                return outcome.case, outcome.failures[0]
        return None


@dataclass(frozen=True)
class Timed:
    """Times a kernel at a work, of its variants the fastest where they are to be tried."""

    work: Work
    kernel: str
    variants: bool

    def run(self, bench: Bench, tell: Tell) -> tuple[Timing, str, str]:
        """What is compiled is compiled in a stage of its own. Leaves the time, the variant and its work."""
        kernel = _found(self.work, self.kernel, bench.device)
        tell("drawing weights")
        weights = bench.weights(self.work)
        variant = ""
        if self.variants:
            tell("variants")
            times = time_variants(self.work, self.kernel, kernel, weights)
            known = {name: us for name, us in times.items() if us is not None}
            if known:
                variant = min(known, key=known.__getitem__)
                kernel = copy(kernel)
                kernel.variant = next(v for v in kernel.variants(self.work.node) if str(v) == variant)
        tell("binding")
        bind_once(self.work, self.kernel, kernel, weights)
        tell("launching")
        timed = time_kernel(self.work, self.kernel, kernel, weights, bench.device.platform.activations)
        return timed.timing, variant, kernel.work(self.work.node) if variant else ""


Task = Any
"""Something with `run(bench, tell)`, that can be sent to another process, as can what it returns."""


def _found(work: Work, name: str, device: Device) -> Kernel:
    kernels, declined = find_kernels(work, registry.current(), device)
    if name not in kernels:
        refusal = declined.get(name)
        raise RuntimeError(f"it is not offered: {refusal.reason if refusal else 'nobody knows it'}")
    return kernels[name]


def serve(connection: Connection, device: str) -> None:
    """Answers tasks until there is no more: sends stages as text, answers as Answer.

    Ctrl-C goes to every process of a terminal: who asks ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench = Bench(find_device(device))
    while (task := connection.recv()) is not None:
        answer = _answer(task, bench, connection.send)
        connection.send(answer)
        if answer.over:
            return


def _answer(task: Task, bench: Bench, tell: Tell) -> Answer:
    try:
        return Answer(task.run(bench, tell))
    except BaseException as error:
        # Of all that a kernel may raise nothing ends tuning.
        said = named(contained(error)).strip().splitlines()[0]
        return Answer(fault=said, over=any(word in str(error) for word in bench.device.platform.lost))

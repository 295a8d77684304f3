"""A walk: a schedule's launches bound to memory, called in order; and who is to blame where one raises."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from kernelmux.contract.device import Device, is_out_of_memory, out_of_memory
from kernelmux.contract.kernel import Launch, Planes, Tensors
from kernelmux.errors import LaunchError, ModelError, contained, named, told, where_raised
from kernelmux.plan.formats import Step
from kernelmux.run.watch import Observer, Watch


@dataclass(frozen=True, eq=False)
class Walk:
    """A schedule bound to memory at exact extents: calling it runs the step and returns the number of launches.

    Its launches go to the walker's stream, whichever is torch's current one.
    """

    steps: Sequence[Step]
    calls: Sequence[Launch]
    """One for each step."""
    outputs: Mapping[str, Planes]
    """The graph's outputs by name; the next walk overwrites them."""
    launches: int
    device: Device
    tensors: Sequence[Tensors] = ()
    """What each step reads and writes, but for packed weights."""
    watch: Watch = field(default_factory=Watch)

    def __call__(self) -> int:
        observer = self.watch.observer
        if observer is not None and observer.wants(self, rehearsal=False):
            return self.observed(observer)
        return self._unobserved()

    def rehearse(self) -> int:
        """A walk of padding alone, for what launches do at their first time."""
        observer = self.watch.observer
        if observer is not None and observer.wants(self, rehearsal=True):
            return self.observed(observer)
        return self._unobserved()

    def _unobserved(self) -> int:
        pending = iter(self._chained)
        try:
            for call in pending:
                call()
        except BaseException as error:
            # The iterator knows how far it got, so that a walk that works pays nothing for this.
            index = len(self._chained) - operator.length_hint(pending) - 1
            raise launch_error(self.steps, self._runs[index][0], self.device, error) from error
        return self.launches

    def observed(self, observer: Observer) -> int:
        """The same launches one by one, each before an observer's eyes."""
        for index, call in enumerate(self.calls):
            observer.before(self, index)
            try:
                observer.launch(self, index, call)
            except BaseException as error:
                raise launch_error(self.steps, index, self.device, error) from error
            observer.after(self, index)
        observer.end(self)
        return self.launches

    @cached_property
    def _runs(self) -> Sequence[Sequence[int]]:
        """The steps that are one call: those beside each other whose kernels have the same `chain`, and all others."""
        chains = [step.choice.kernel.chain for step in self.steps]
        runs = ([*run] for _, run in groupby(range(len(self.steps)), lambda index: chains[index] or index))
        return tuple(runs)

    @cached_property
    def _chained(self) -> Sequence[Launch]:
        return [self._one_call(run) for run in self._runs]

    def _one_call(self, run: Sequence[int]) -> Launch:
        chain = self.steps[run[0]].choice.kernel.chain
        return chain.join([self.calls[index] for index in run]) if chain and len(run) > 1 else self.calls[run[0]]


_SUSPECTS = 4
"""Nodes that the message about a sticky fault names: launches are asynchronous, so an earlier one may be to blame."""


def launch_error(steps: Sequence[Step], index: int, device: Device, error: BaseException) -> LaunchError:
    """What to say when the step at `index` has raised.

    A SystemExit is one of a kernel's errors too, as of a library that gives up. Ctrl-C is not, and goes on; nor is it a
    kernel's that the model file has lost what it held.
    """
    contained(error)
    if isinstance(error, ModelError):
        raise error
    node, choice = steps[index].node, steps[index].choice
    shapes = ", ".join(f"{value.name} {list(value.shape)} {value.format}" for value in (*node.inputs, *node.outputs))
    reason = f"{named(error)} ({where_raised(error)})"
    message = (
        f"{choice.name} raised at {node.name} ({node.op}, step {index + 1} of {len(steps)}) on {device.torch}, "
        f"with {shapes}: {reason}"
    )
    if is_out_of_memory(error):
        message = f"{out_of_memory(device.torch, error)}: {choice.name} wanted it for {node.name} ({node.op})"
    sticky = any(fault in told(error) for fault in device.platform.lost)
    if sticky:
        suspects = ", ".join(
            f"{step.node.name} ({step.choice.name})" for step in reversed(steps[: index + 1][-_SUSPECTS:])
        )
        message += f". The device is lost to this process; suspects, latest first: {suspects}"
    return LaunchError(message, node.name, choice.name, sticky, device.torch, index + 1, reason)

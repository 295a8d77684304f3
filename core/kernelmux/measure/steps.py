"""What a whole step takes beside its calls: values that are stored otherwise than where they were timed, and the host.

Enters: a kernel with its node at some rows; the microseconds and launches of a step. Leaves: microseconds. A call's
time, measured or declared, is that of activations stored as `stored_as` has them: in the platform's `activations` where
its kernel can, else in the format that it likes best. A value that is stored otherwise costs its writer and each reader
the bytes that are more, or fewer, at the rate of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from kernelmux.contract.device import Ceilings, Device
from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.graph import TensorNode

CAPTURED_ROWS = 64
"""Rows of the largest step that is captured: beyond it the device is busy for longer than Python needs to launch."""

Storing = Mapping[str, float]
"""The formats that a kernel takes of a value, best first: the microseconds that each adds to a call's time."""


def storing(
    kernel: Kernel, node: TensorNode, rows: int, activations: str, copied: float
) -> tuple[tuple[Storing, ...], tuple[Storing, ...]]:
    """What it costs to store each input and each output of a node at so many rows, at `copied` bytes a second."""

    def each(values: Sequence[Value], listed: Sequence[Sequence[str]]) -> Iterator[Storing]:
        for value, formats in zip(values, listed, strict=True):
            columns = value.shape[1] if value.convertible else 0
            yield _storing(tuple(formats), rows, int(columns), activations, copied)

    return tuple(each(node.inputs, kernel.inputs(node))), tuple(each(node.outputs, kernel.outputs(node)))


@cache
def _storing(formats: tuple[str, ...], rows: int, columns: int, activations: str, copied: float) -> Storing:
    nbytes = {format: lookup(format).nbytes((rows, columns)) for format in formats}
    timed = nbytes.get(activations, nbytes[formats[0]])
    return {format: (count - timed) / copied * 1e6 for format, count in nbytes.items()}


def is_captured(device: Device, rows: int, capturable: bool) -> bool:
    """Whether a step of so many rows is captured, where all of its kernels are `capturable`."""
    return device.platform.captures and rows <= CAPTURED_ROWS and capturable


def step_time(us: float, launches: int, captured: bool, ceilings: Ceilings) -> float:
    """Microseconds of a step whose calls take `us`: where it is not captured, at least as long as its launches take.

    The host enqueues while the device works, so that only the longer of the two is waited for, and between steps.
    """
    return us if captured else max(us, launches * ceilings.enqueue * 1e6) + ceilings.turn * 1e6

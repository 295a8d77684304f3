"""Second kernels for the steps of a walk, bound to memory of their own, to make launches again beside the first ones.

Enters: whose kernels, a session, a walk of it. Leaves: for each step a Twin, or why there is none. The steps take turns
with a few streams beside the session's, so that their launches overlap, and with a piece of memory for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelmux.contract.answers import bound, checked_workspace, stored
from kernelmux.contract.kernel import Kernel, Launch, Planes, Tensors
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import KernelmuxError, contained, shown
from kernelmux.graph.formats import (
    Value,
    aligned,
    as_planes,
    as_tuple,
    dequantize_planes,
    lookup,
    quantize_planes,
    torch_dtype,
    value_bytes,
)
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.table import Tables
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk

if TYPE_CHECKING:
    import torch

EVERY = 100
"""Of so many walks one is sampled, unless told."""
STREAMS = 4
"""Where there are streams: launches of one row fill a small part of a device, and wait for each other's results."""


@dataclass(frozen=True)
class Second:
    """Whose kernels make launches again, and of how many walks one is sampled."""

    backend: str
    kernel: str = ""
    """Its full name; empty for the first of the backend's that takes a node and is not its own."""
    every: int = EVERY

    @staticmethod
    def parse(text: str) -> Second:
        """Of `BACKEND[:KERNEL][:1/N]`; KernelmuxError where it is none."""
        read = re.fullmatch(r"([^:/\s]+)(?::([^:/\s]+))?(?::1/([1-9]\d{0,8}))?", text)
        if read is None:
            said = f"a shadow is BACKEND[:KERNEL][:1/N], as torch, torch:f32 or torch:1/10, not {shown(text)}"
            raise KernelmuxError(said)
        backend, kernel, every = read.groups()
        return Second(backend, f"{backend}:{kernel}" if kernel else "", int(every or EVERY))


@dataclass(frozen=True, eq=False)
class Twin:
    """A step's second kernel, bound to copies of what the first one reads and to outputs of its own."""

    name: str
    kernel: Kernel
    node: TensorNode
    """In the formats that it reads and writes."""
    tensors: Tensors
    call: Launch
    stream: Any
    """That the call launches on; None where there are none."""

    def give(self, node: TensorNode, inputs: Sequence[Planes]) -> None:
        """Copies what the step of that node reads, converted where this kernel reads it otherwise.

        A kernel that no graph can hold may read step state in host memory: then it waits for that.
        """
        for value, planes, wanted, copies in zip(
            node.inputs, inputs, self.node.inputs, self.tensors.inputs, strict=True
        ):
            parts = as_tuple(planes)
            if value.format == wanted.format:
                for part, copy in zip(parts, as_tuple(copies), strict=True):
                    copy.copy_(part)
            else:
                quantize_planes(wanted.format, dequantize_planes(value.format, parts), as_tuple(copies))
        if not self.kernel.capturable:
            for copy, mirror in zip(self.tensors.inputs, self.tensors.host, strict=True):
                if mirror is not None and mirror is not copy:
                    mirror.copy_(copy)


class Binder:
    """Binds the second kernels of a session's walks; it holds what it packs for itself."""

    def __init__(self, session: Session, second: Second) -> None:
        self.session, self.second = session, second
        self._packed: PackedWeights = session.walker.packed.holder()
        self._tables = Tables(session.plan.device)
        platform = session.plan.device.platform
        self._streams = [platform.stream(session.plan.device) for _ in range(STREAMS if platform.captures else 1)]
        self.missing: dict[str, str] = {}
        """Nodes that have no second kernel, and why."""

    def bind(self, walk: Walk) -> Iterator[Twin | None]:
        """Each step's, in the order of the walk."""
        import torch

        found = [self._choose(walk, index) for index in range(len(walk.steps))]
        rooms = [_room(each[2], each[1]) if each else 0 for each in found]
        count = len(self._streams)
        memories = [
            torch.empty(max(rooms[turn::count], default=0), dtype=torch.uint8, device=walk.device.torch)
            for turn in range(count)
        ]
        for index, each in enumerate(found):
            turn = index % count
            yield self._bound(walk, index, memories[turn], self._streams[turn], *each) if each else None

    def _choose(self, walk: Walk, index: int) -> tuple[str, Kernel, TensorNode] | None:
        """The name of a step's second kernel, the kernel, and the node as near to its stored values as that takes."""
        node, own, asked = walk.steps[index].node, walk.steps[index].choice.name, self.second.kernel
        offer = self.session.plan.registry.offer(node, walk.device, self.second.backend)
        names = [name for name in offer.kernels if asked in ("", name)]
        for name in names:
            if name != own:
                kernel = offer.kernels[name]
                if (picked := self._tables.pick(kernel, node)) is not None:
                    kernel.variant = picked[0]
                return name, kernel, stored(node, kernel, lambda place, value: value.format)
        refusals = [refusal.reason for name, refusal in offer.declined.items() if asked in ("", name)]
        self.missing[node.name] = f"{own} is its own" if own in names else "; ".join(refusals) or "there is none"
        return None

    def _bound(
        self,
        walk: Walk,
        index: int,
        memory: torch.Tensor,
        stream: Any,
        name: str,
        kernel: Kernel,
        node: TensorNode,
    ) -> Twin | None:
        memories = _Memory(memory)
        inputs = [memories.of(value) for value in node.inputs]
        outputs = memories.side_by_side(node.outputs) if kernel.joins(node) else [*map(memories.of, node.outputs)]
        for source, target in node.contract.updates:
            outputs[target] = inputs[source]
        nbytes = kernel.workspace(node)
        try:
            packed = self._packed.get(node, name, kernel)
            workspace = memories.take(nbytes) if nbytes else None
            on_host = walk.device.platform.host_memory
            ports = zip(node.inputs, inputs, strict=True)
            state = [copy if value.format == "i32" else None for value, copy in ports]
            host = tuple(copy if copy is None or on_host else copy.cpu() for copy in state)
            tensors = Tensors(tuple(inputs), tuple(outputs), packed, workspace, host)
            return Twin(name, kernel, node, tensors, bound(kernel, node, tensors, stream), stream)
        except BaseException as error:
            self.missing[node.name] = f"{name} cannot be bound: {contained(error)}"
            return None


class _Memory:
    """Bytes handed out one after another."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory, self._used = memory, 0

    def take(self, nbytes: int) -> torch.Tensor:
        start = self._used
        self._used += aligned(nbytes)
        return self._memory[start : start + nbytes]

    def of(self, value: Value) -> Planes:
        parts = (
            self.take(plane.nbytes(value.extents)).view(torch_dtype(plane.dtype)).view(plane.shape(value.extents))
            for plane in lookup(value.format).planes
        )
        return as_planes(tuple(parts))

    def side_by_side(self, values: Sequence[Value]) -> list[Planes]:
        """Values of one plain format as the columns of one matrix."""
        widths = [value.extents[1] for value in values]
        return list(self.of(Value("", (values[0].extents[0], sum(widths)), values[0].format)).split(widths, dim=1))


def _room(node: TensorNode, kernel: Kernel) -> int:
    """Bytes of a step's copies, of its outputs and of its kernel's scratch."""
    return sum(map(value_bytes, (*node.inputs, *node.outputs))) + aligned(checked_workspace(kernel, node))

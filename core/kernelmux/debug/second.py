"""Second kernels for the steps of a walk, bound to memory of their own, to make launches again beside the first ones.

Enters: whose kernels, a session, a walk of it. Leaves: for each step a Twin, or why there is none. The steps take turns
with a few streams beside the session's, and with a piece of memory for each: what one step's kernel does overlaps with
what others do. Step state is copied once, for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
LASTING = 2**28
"""Bytes of all outputs of a walk's second kernels that each has memory of its own for."""
STREAMS = 4
"""Where there are streams: launches of one row fill a small part of a device (docs/results/h200-debugging.json)."""


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
    state: Collection[int]
    """Of its inputs those that are step state."""
    stream: Any
    """That the call launches on; None where there are none."""
    lasts: bool
    """Whether its outputs stay as they are until the walk has ended: no other twin's are in their memory."""

    def give(self, node: TensorNode, inputs: Sequence[Planes]) -> None:
        """Copies what that node's step reads but for step state, converted where this kernel reads it otherwise."""
        for place, (value, planes) in enumerate(zip(node.inputs, inputs, strict=True)):
            wanted, parts, copies = self.node.inputs[place], as_tuple(planes), as_tuple(self.tensors.inputs[place])
            if place in self.state:
                continue
            if value.format == wanted.format:
                for part, copy in zip(parts, copies, strict=True):
                    copy.copy_(part)
            else:
                quantize_planes(wanted.format, dequantize_planes(value.format, parts), copies)


class StateCopies:
    """Copies of the step state that a walk reads, for all of its steps."""

    def __init__(self, session: Session) -> None:
        self._leaves = session.walker.placement.leaves
        self._on_host = session.plan.device.platform.host_memory
        self._copies: dict[Value, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        """Of each the original, the copy, and the copy's mirror in host memory."""

    def copy(self, value: Value, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of a step's input that is step state its copy and that one's mirror; None of any other."""
        import torch

        if value.format != "i32" or value.name not in self._leaves:
            return None
        if value not in self._copies:
            copy = original.clone()
            mirror = copy if self._on_host else torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True)
            self._copies[value] = original, copy, mirror
        return self._copies[value][1:]

    def take(self, mirrored: bool) -> None:
        """Copies all of it as it is now; the mirrors too where a kernel may read those, which waits for the device."""
        for original, copy, mirror in self._copies.values():
            copy.copy_(original)
            if mirrored and mirror is not copy:
                mirror.copy_(copy)


@dataclass(frozen=True, eq=False)
class Twins:
    """The second kernels of a walk."""

    each: list[Twin | None]
    """In the order of its steps; None of those that have none, or none any more."""
    state: StateCopies

    @property
    def capturable(self) -> bool:
        """Whether a graph can hold their launches."""
        return all(twin is None or twin.kernel.capturable for twin in self.each)


class _Chosen(NamedTuple):
    name: str
    kernel: Kernel
    node: TensorNode


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

    def bind(self, walk: Walk) -> Twins:
        """Those of each step."""
        import torch

        found = [self._choose(walk, index) for index in range(len(walk.steps))]
        rooms = [_room(each.node, each.kernel) if each else 0 for each in found]
        turns, state = len(self._streams), StateCopies(self.session)
        memories = [
            torch.empty(max(rooms[turn::turns], default=0), dtype=torch.uint8, device=walk.device.torch)
            for turn in range(turns)
        ]
        room = sum(value_bytes(value) for each in found if each for value in _made(each.node))
        lasting = _Memory(torch.empty(room, dtype=torch.uint8, device=walk.device.torch)) if room <= LASTING else None
        twins = [
            each and self._bound(walk, index, each, _Memory(memories[index % turns]), lasting, state)
            for index, each in enumerate(found)
        ]
        return Twins(twins, state)

    def _choose(self, walk: Walk, index: int) -> _Chosen | None:
        """A step's second kernel, and the node as near to its stored values as that takes."""
        node, own, asked = walk.steps[index].node, walk.steps[index].choice.name, self.second.kernel
        offer = self.session.plan.registry.offer(node, walk.device, self.second.backend)
        names = [name for name in offer.kernels if asked in ("", name)]
        for name in names:
            if name != own:
                kernel = offer.kernels[name]
                if (picked := self._tables.pick(kernel, node)) is not None:
                    kernel.variant = picked[0]
                return _Chosen(name, kernel, stored(node, kernel, lambda place, value: value.format))
        refusals = [refusal.reason for name, refusal in offer.declined.items() if asked in ("", name)]
        self.missing[node.name] = (
            f"{own} is its own"
            if own in names
            else "; ".join(refusals) or f"no {asked or self.second.backend} for {node.op}"
        )
        return None

    def _bound(
        self, walk: Walk, index: int, chosen: _Chosen, memory: _Memory, lasting: _Memory | None, state: StateCopies
    ) -> Twin | None:
        name, kernel, node = chosen
        originals = walk.tensors[index].inputs
        shared = [state.copy(value, original) for value, original in zip(node.inputs, originals, strict=True)]
        inputs = [each[0] if each else memory.of(value) for each, value in zip(shared, node.inputs, strict=True)]
        written = lasting or memory
        made = iter(written.side_by_side(_made(node)) if kernel.joins(node) else map(written.of, _made(node)))
        updated = {target: source for source, target in node.contract.updates}
        outputs = [inputs[updated[at]] if at in updated else next(made) for at in range(len(node.outputs))]
        nbytes, stream = kernel.workspace(node), self._streams[index % len(self._streams)]
        try:
            packed = self._packed.get(node, name, kernel)
            workspace = memory.take(nbytes) if nbytes else None
            host = tuple(each[1] if each else None for each in shared)
            tensors = Tensors(tuple(inputs), tuple(outputs), packed, workspace, host)
            places = {place for place, each in enumerate(shared) if each}
            call, lasts = bound(kernel, node, tensors, stream), lasting is not None
            return Twin(name, kernel, node, tensors, call, places, stream, lasts)
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


def _made(node: TensorNode) -> list[Value]:
    """A node's outputs but for those that are inputs brought up to date."""
    updated = {target for _, target in node.contract.updates}
    return [value for at, value in enumerate(node.outputs) if at not in updated]


def _room(node: TensorNode, kernel: Kernel) -> int:
    """Bytes of a step's copies, of its outputs and of its kernel's scratch."""
    return sum(map(value_bytes, (*node.inputs, *_made(node)))) + aligned(checked_workspace(kernel, node))

"""A kernel bound to one case's memory: guarded, poisoned, launched as often as the checks ask.

Enters: drawn numbers, and a node whose formats are settled. Leaves: bytes before and after, and the float64 truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from kernelmux.conformance import others
from kernelmux.conformance.draw import DrawnInput
from kernelmux.conformance.guarded import POISONS, Guarded, holding, same
from kernelmux.conformance.located import Layout
from kernelmux.conformance.measure import Measured, compare
from kernelmux.conformance.room import Room
from kernelmux.contract.answers import bound, prepared
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel, Launch, Tensors
from kernelmux.graph.formats import (
    Value,
    Weight,
    dequantize_planes,
    empty_planes,
    lookup,
    planes_of_rows,
    quantize_planes,
)
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import Fused, Operands

CACHED = 0x3F
"""What caches hold while a kernel is bound, and between the pages of huge ones: nothing that a launch would write."""


Once = Callable[[Hashable, Callable[[], Any]], Any]
"""`Drawn.once`."""
FEW = 2**18
"""Weights up to which a case is worth preparing twice: every kernel has such cases."""
NEAR_ZERO = 1e-3
"""Up to which weights may be nothing in a format of fewer bits."""


class Trial:
    """A kernel bound to one case's memory."""

    def __init__(
        self,
        drawn: Sequence[DrawnInput],
        weights: Sequence[Weight],
        node: TensorNode,
        kernel: Kernel,
        device: Device,
        packed: tuple[torch.Tensor, ...] | None = None,
        once: Once = lambda key, make: make(),
    ) -> None:
        """`packed` is given where the weights are prepared already, and the truth is known.

        `once` keeps what other trials of the same numbers need too.
        """
        self._once = once
        self.node, self.kernel, self.device, self.weights = node, kernel, device, weights
        self.planes = [plane for weight in weights for plane in weight.planes]
        self.failures: list[str] = []
        # What the kernel is bound to, and what is torch's current stream while it is launched.
        self.stream, self.elsewhere = (device.platform.stream(device) for _ in range(2))
        self.room = self.new_room()
        for memory, value, planes in zip(self.inputs, node.inputs, drawn, strict=True):
            self._fill(memory, value, planes)
        self.given = [memory.snapshot() for memory in self.inputs]
        self.expected = self._reference() if packed is None else ()
        self.packed = self._prepare() if packed is None else packed
        self.prepared = [part.clone() for part in (*self.packed, *self.planes)]

    @property
    def inputs(self) -> Sequence[Guarded]:
        return self.room.inputs

    @property
    def outputs(self) -> Sequence[Guarded]:
        return self.room.outputs

    def new_room(self, apart: bool = False) -> Room:
        """Memory for another binding of the node; where `apart`, inputs of rows and columns have gaps between rows."""
        return Room.of(self.node, self.kernel, self.device, apart)

    def one_row(self, row: int) -> Trial | None:
        """The same kernel on one row alone; None where the op's values are not all rows of one batch."""
        m = self.node.inputs[0].extents[0]
        values = (*self.node.inputs, *self.node.outputs)
        tables = any(index < len(self.node.inputs) for index in self.node.contract.tables)
        if m == 1 or self.node.contract.updates or tables or any(value.extents[0] != m for value in values):
            return None
        self.room.restore(self.given)
        drawn = [
            (value, planes_of_rows(value.format, memory.parts, slice(row, row + 1)))
            for value, memory in zip(self.node.inputs, self.inputs, strict=True)
        ]
        inputs, outputs = (
            tuple(replace(value, shape=(1, *value.shape[1:])) for value in several)
            for several in (self.node.inputs, self.node.outputs)
        )
        node = replace(self.node, inputs=inputs, outputs=outputs)
        return Trial(drawn, self.weights, node, self.kernel, self.device, self.packed)

    def _fill(self, memory: Guarded, value: Value, planes: DrawnInput) -> None:
        """An input in the format that the kernel reads, drawn in the one that the case states."""
        drawn_as, parts = planes
        if value.format == drawn_as.format:
            for target, part in zip(memory.parts, parts, strict=True):
                target.copy_(part)
        else:
            dense = dequantize_planes(drawn_as.format, parts, torch.float64)
            quantize_planes(value.format, dense.to(self.device.torch), memory.parts)

    def _prepare(self) -> tuple[torch.Tensor, ...]:
        before = [plane.clone() for plane in self.planes]
        packed = prepared(self.kernel, self.weights, self.device)
        own = {plane.untyped_storage().data_ptr() for plane in self.planes}
        # What the model holds already costs nothing, whether it is stated or not.
        total = sum(part.nbytes for part in packed)
        held = sum(part.nbytes for part in packed if part.untyped_storage().data_ptr() not in own)
        if not same(before, self.planes):
            self.failures.append("inputs: prepare changes the model's weights")
        stated = self.kernel.packed_bytes(self.node)
        if held > stated * 1.01 + 256 or stated > total * 1.01 + 256:
            self.failures.append(f"declarations: packed_bytes says {stated}, prepare holds {total}")
        return packed

    def _prepare_others(self) -> tuple[torch.Tensor, ...] | None:
        """Weights that begin as the case's do, packed; None where they are too many."""
        weights = others.weights(self.weights)
        if not weights or sum(math.prod(weight.shape) for weight in weights) > FEW:
            return None
        packed = self.kernel.prepare(weights, self.device)
        told = [w for w, other in zip(self.weights, weights, strict=True) if not same(w.planes, other.planes)]
        # What is packed in fewer bits may have lost numbers near zero.
        known = any(float(weight.dequantize().abs().max()) > NEAR_ZERO for weight in told)
        if known and packed and same(packed, self.packed):
            self.failures.append("repeatable: other weights, of the same first row, are packed as those before them")
        return packed

    def _reference(self) -> tuple[torch.Tensor, ...]:
        """The float64 truth of what the kernel is given, so that conversions before it are not held against it."""
        formats = tuple(value.format for value in (*self.node.inputs, *self.node.outputs))
        truth: tuple[torch.Tensor, ...] = self._once(
            (self.device.torch, formats), lambda: self.node.contract.reference(self.node, self._operands())
        )
        return truth

    def _operands(self) -> Operands:
        node = self.node
        dense = tuple(
            memory.parts[0].clone()
            if value.format == "i32"
            else dequantize_planes(value.format, memory.parts, torch.double)
            for value, memory in zip(node.inputs, self.inputs, strict=True)
        )
        to = self.device.torch
        weights = iter(self._once(to, lambda: [weight.dequantize(torch.double).to(to) for weight in self.weights]))
        weight, bias, gamma = (tuple(next(weights) for _ in part) for part in (node.weight, node.bias, node.gamma))
        return Operands(dense, weight, bias, gamma)

    @cached_property
    def other(self) -> list[torch.Tensor]:
        """Contents of the inputs, none of them like those given."""
        return others.inputs(self.node, self.room, self.given)

    @cached_property
    def rearranged(self) -> dict[str, list[torch.Tensor]]:
        """Contents of the inputs, as given but for one that is step state, by its name."""
        return others.rearranged(self.node, self.room, self.given)

    def bind(self, room: Room | None = None, packed: tuple[torch.Tensor, ...] | None = None) -> Launch:
        """The kernel bound to memory, its own and `self.packed` unless told.

        Inputs are zeros meanwhile: what they hold is known only when the kernel is launched. Binding changes no input.
        """
        room = room or self.room
        updated = {source for source, _ in self.node.contract.updates}
        for index, memory in enumerate(room.inputs):
            memory.poison(CACHED if index in updated else 0)
        room.mirror()
        before = [memory.snapshot() for memory in room.inputs]
        tensors = Tensors(
            inputs=tuple(memory.planes for memory in room.inputs),
            outputs=tuple(memory.planes for memory in room.outputs),
            packed=self.packed if packed is None else packed,
            workspace=room.scratch.planes if self.kernel.workspace(self.node) else None,
            host=tuple(room.host),
        )
        self.synchronize()
        call = bound(self.kernel, self.node, tensors, self.stream)
        self.synchronize()
        for index, (value, memory, old) in enumerate(zip(self.node.inputs, room.inputs, before, strict=True)):
            if (index in updated or memory not in room.outputs) and not same([memory.snapshot()], [old]):
                self.failures.append(f"inputs: binding changes {value.name}")
        return call

    def start(self) -> None:
        """Binds the kernel, and launches it for the first time.

        Between the two it is bound to other memory and other weights, as one kernel is to many nodes: what `bind` and
        `prepare` returned before stays what it is.
        """
        self.call = self.bind()
        self.bind(self.new_room(), self._prepare_others())
        self.first = self.launch()

    def launch(
        self,
        call: Launch | None = None,
        contents: Sequence[torch.Tensor] | None = None,
        room: Room | None = None,
        poison: int = POISONS[0],
        busy: bool = False,
    ) -> list[torch.Tensor]:
        """Inputs as given, or `contents`, the rest poisoned; the call, or another; then the outputs' bytes.

        Another stream than the kernel's is current; where that is `busy`, nothing launched on it has run yet.
        """
        room, call = room or self.room, self.call if call is None else call
        room.restore(contents or self.given)
        for memory in room.outputs:
            if memory not in room.inputs:
                memory.poison(poison)
        room.scratch.poison(poison)
        self.synchronize()
        platform = self.device.platform
        if busy:
            platform.keep_busy(self.elsewhere)
        with platform.on(self.elsewhere):
            try:
                call()
            except BaseException:
                # What it had launched may still run, and the memory that it works on is about to be filled again.
                with suppress(Exception):
                    self.synchronize()
                raise
        if not busy:
            self.synchronize()
        with platform.on(self.stream if busy else None):
            found = [memory.snapshot() for memory in room.outputs]
        self.synchronize()
        return found

    def measure(
        self,
        index: int,
        memory: Guarded,
        wanted: torch.Tensor | None = None,
        peer: tuple[float, float] = (0.0, 0.0),
        batch: torch.Tensor | None = None,
    ) -> Measured:
        """What `memory` holds of output `index`, against the truth; `wanted`, of `batch`, where it is another's."""
        truth = self.expected[index] if wanted is None else wanted
        found = dequantize_planes(self.node.outputs[index].format, memory.parts, torch.double)
        sources = {target: source for source, target in self.node.contract.updates}
        if index in sources:
            # What is left as it was, and is to be, counts for nothing: the error is that of what is written.
            before = self.before(sources[index])
            left = ((truth == before) & (found == before)).all(dim=-1, keepdim=True)
            found, truth = (values.masked_fill(left, 0.0) for values in (found, truth))
        return self.compare(index, found, truth, peer, batch)

    def before(self, source: int) -> torch.Tensor:
        """Input `source` as it was given, in float64."""
        value, memory = self.node.inputs[source], self.inputs[source]
        return dequantize_planes(value.format, self.planes_before(source), torch.double).view(memory.parts[0].shape)

    def planes_before(self, source: int) -> tuple[torch.Tensor, ...]:
        """Its planes as they were given."""
        parts = self.inputs[source].parts
        given = torch.split(self.given[source], [part.nbytes for part in parts])
        return tuple(old.view(part.dtype).view(part.shape) for old, part in zip(given, parts, strict=True))

    def compare(
        self,
        index: int,
        found: torch.Tensor,
        truth: torch.Tensor,
        peer: tuple[float, float] = (0.0, 0.0),
        batch: torch.Tensor | None = None,
    ) -> Measured:
        """Numbers of output `index` against their truth."""
        format, layout = lookup(self.node.outputs[index].format), self.layout(index)
        if format.name == "i32":
            # Ids: another one is wrong however near its number is.
            return compare(found, truth, 0.0, layout=layout)
        bound, precision = self.kernel.precision + format.rounding, self.kernel.precision
        dtype = format.dtype if format.plain else None

        def against(bound: float, kept: torch.Tensor | None = None) -> Measured:
            return compare(found, truth, bound, format.block, peer, batch, layout, dtype, precision, kept)

        measured = against(bound)
        if not measured.failures:
            return measured
        # What takes time to tell: of one outlier in a long row more is lost than its row's root mean square, and what
        # follows products in a fused op makes more of their error.
        kept = None if format.plain else self._kept(index, truth)
        return against(max(bound, self._amplified[index] + format.rounding), kept)

    @cached_property
    def _amplified(self) -> tuple[float, ...]:
        """The NMSE of each output, by the op's pattern, where products are as far off as the kernel says."""
        node, contract = self.node, self.node.contract
        if not isinstance(contract, Fused):
            return (0.0,) * len(node.outputs)
        return contract.amplified(node, self._operands(), self.kernel.precision)

    def _kept(self, index: int, truth: torch.Tensor) -> torch.Tensor:
        """The truth of output `index` as its format's blocks hold it."""
        value = replace(self.node.outputs[index], shape=tuple(truth.shape))
        planes = empty_planes(value, self.device.torch)
        quantize_planes(value.format, truth, planes)
        return dequantize_planes(value.format, planes, torch.double)

    def layout(self, index: int) -> Layout:
        """How messages call output `index` and its places."""
        value = self.node.outputs[index]
        blocks = (lookup(each.format).block for each in (value, *self.node.weight))
        return Layout(value.name, self.node.head_dim, max(*blocks, 1))

    def differing(self, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor] | None = None) -> str:
        """Where outputs' bytes are not those of `wanted`, or of the first launch, in words; empty where they are."""
        for index, (new, old) in enumerate(zip(found, self.first if wanted is None else wanted, strict=True)):
            if not new.equal(old):
                return self.layout(index).differing(*(self._stored(index, given) for given in (new, old)))
        return ""

    def unwritten(self, found: Sequence[torch.Tensor]) -> str:
        """Which elements hold the poison of the first launch there, and the other one in `found`; empty where none."""
        for index, snapshots in enumerate(zip(self.first, found, strict=True)):
            if self.outputs[index] in self.inputs:
                continue
            parts = (self._stored(index, snapshot) for snapshot in snapshots)
            for plane, (one, other) in enumerate(zip(*parts, strict=True)):
                left = holding(one, POISONS[0]) & holding(other, POISONS[1])
                if bool(left.any()):
                    return self.layout(index).unwritten(left, None if plane else self.expected[index], plane)
        return ""

    def _stored(self, index: int, snapshot: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Planes of output `index` from its bytes."""
        parts = self.outputs[index].parts
        held = torch.split(snapshot, [part.nbytes for part in parts])
        return tuple(old.clone().view(part.dtype).view(part.shape) for old, part in zip(held, parts, strict=True))

    def synchronize(self) -> None:
        self.device.platform.synchronize(self.device)

"""A kernel bound to one case's memory: guarded, poisoned, launched as often as the checks ask.

Enters: drawn numbers, and a node whose formats are settled. Leaves: bytes before and after, and the float64 truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kernelmux.conformance.draw import DrawnInput
from kernelmux.conformance.guarded import Guarded
from kernelmux.device import Device
from kernelmux.formats import Value, Weight, dequantize_planes, quantize_planes
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Launch, Tensors
from kernelmux.ops import Operands


class Trial:
    """A kernel bound to one case's memory."""

    def __init__(
        self, drawn: Sequence[DrawnInput], weights: Sequence[Weight], node: TensorNode, kernel: Kernel, device: Device
    ) -> None:
        self.node, self.kernel, self.device = node, kernel, device
        self.failures: list[str] = []
        self._drawn = drawn
        self._weights = weights
        self.inputs = [self._filled(value, planes) for value, planes in zip(node.inputs, drawn, strict=True)]
        self.given = [memory.snapshot() for memory in self.inputs]
        self.outputs = [Guarded.of(value, device.torch) for value in node.outputs]
        for source, target in node.contract.updates:
            self.outputs[target] = self.inputs[source]
        self.scratch = Guarded.scratch(kernel.workspace(node), device.torch)
        self.packed = self._prepare()
        self.expected = self._reference()

    def one_row(self, row: int, kernel: Kernel) -> Trial | None:
        """The same kernel on one row alone; None where the op's values are not all rows of one batch."""
        m = self.node.inputs[0].extents[0]
        values = (*self.node.inputs, *self.node.outputs)
        if m == 1 or self.node.contract.updates or any(value.extents[0] != m for value in values):
            return None
        drawn = [
            (
                replace(value, shape=(1, *value.shape[1:])),
                tuple(part[row : row + 1] if len(part) == m else part for part in parts),
            )
            for value, parts in self._drawn
        ]
        return Trial(drawn, self._weights, one_row_node(self.node), kernel, self.device)

    def _filled(self, value: Value, planes: DrawnInput) -> Guarded:
        """An input in the format that the kernel reads, drawn in the one that the case states."""
        drawn_as, parts = planes
        memory = Guarded.of(value, self.device.torch)
        if value.format == drawn_as.format:
            for target, part in zip(memory.parts, parts, strict=True):
                target.copy_(part)
        else:
            dense = dequantize_planes(drawn_as.format, parts, torch.float64)
            quantize_planes(value.format, dense.to(self.device.torch), memory.parts)
        return memory

    def _prepare(self) -> tuple[torch.Tensor, ...]:
        before = [plane.clone() for weight in self._weights for plane in weight.planes]
        packed = self.kernel.prepare(self._weights, self.device)
        own = {plane.untyped_storage().data_ptr() for weight in self._weights for plane in weight.planes}
        # What the model holds already costs nothing, whether it is stated or not.
        total = sum(part.nbytes for part in packed)
        held = sum(part.nbytes for part in packed if part.untyped_storage().data_ptr() not in own)
        after = [plane for weight in self._weights for plane in weight.planes]
        if not all(old.view(torch.uint8).equal(new.view(torch.uint8)) for old, new in zip(before, after, strict=True)):
            self.failures.append("inputs: prepare changes the model's weights")
        stated = self.kernel.packed_bytes(self.node)
        if held > stated * 1.01 + 256 or stated > total * 1.01 + 256:
            self.failures.append(f"declarations: packed_bytes says {stated}, prepare holds {total}")
        return packed

    def _reference(self) -> tuple[torch.Tensor, ...]:
        """The float64 truth of what the kernel is given, so that conversions before it are not held against it."""
        node = self.node
        dense = tuple(
            memory.parts[0].clone()
            if value.format == "i32"
            else dequantize_planes(value.format, memory.parts, torch.double)
            for value, memory in zip(node.inputs, self.inputs, strict=True)
        )
        weights = iter([weight.dequantize(torch.double).to(self.device.torch) for weight in self._weights])
        weight, bias, gamma = (tuple(next(weights) for _ in part) for part in (node.weight, node.bias, node.gamma))
        return node.contract.reference(node, Operands(dense, weight, bias, gamma))

    def bind(self, outputs: Sequence[Guarded]) -> Launch:
        tensors = Tensors(
            inputs=tuple(memory.planes for memory in self.inputs),
            outputs=tuple(memory.planes for memory in outputs),
            packed=self.packed,
            workspace=self.scratch.planes if self.kernel.workspace(self.node) else None,
        )
        return self.kernel.bind(self.node, tensors, None)

    def launch(self, call: Launch, poison: int) -> list[torch.Tensor]:
        """Everything as given, the rest poisoned; the call; then the outputs' bytes."""
        for memory, given in zip(self.inputs, self.given, strict=True):
            memory.restore(given)
        updated = {target for _, target in self.node.contract.updates}
        for index, memory in enumerate(self.outputs):
            if index not in updated:
                memory.poison(poison)
        self.scratch.poison(poison)
        call()
        self.synchronize()
        return [memory.snapshot() for memory in self.outputs]

    def synchronize(self) -> None:
        if self.device.kind == "cuda":
            torch.cuda.synchronize()


def one_row_node(node: TensorNode) -> TensorNode:
    """A node with every value cut down to one row."""

    def cut(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(value, shape=(1, *value.shape[1:])) for value in values)

    return replace(node, inputs=cut(node.inputs), outputs=cut(node.outputs))

"""One kernel for all ops: decode the operands, call the op's own reference, encode the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from kernelmux.contract import EVERY_OP, CurrentStream, Efficiency, Launch, Planes, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import FORMATS, Value, Weight, as_tuple, dequantize_planes, lookup, quantize_planes
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import Operands

ON_CARD = 32
"""Launches of a call there, about: operands are decoded, results encoded, by one small operation after another."""
ACTIVATIONS = tuple(name for name, fmt in FORMATS.items() if fmt.rounding)


class _Reference(CurrentStream):
    ops = (EVERY_OP,)
    dtype: ClassVar[torch.dtype]
    # A launch reads lengths on the host and allocates.
    capturable = False
    # Some hundred microseconds of small calls, however few rows: a launch saved by a fused op must not pay for them.
    efficiency = Efficiency(reading=0.001, multiplying=0.01)

    @property
    def launches(self) -> int:  # type: ignore[override]
        return ON_CARD if self.device.kind != "cpu" else 1

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [_formats(value) for value in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        if node.op == "convert":
            return super().outputs(node)
        # A cache that is updated keeps its format.
        kept = {target for _, target in node.contract.updates}
        return [[v.format] if index in kept else _formats(v) for index, v in enumerate(node.outputs)]

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(weight.dequantize(self.dtype).to(device.torch) for weight in weights)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        op, weights = node.contract, iter(tensors.packed)
        before = {target: source for source, target in op.updates}
        weight, bias, gamma = (tuple(next(weights) for _ in values) for values in (node.weight, node.bias, node.gamma))

        def launch() -> None:
            inputs = tuple(
                self._decode(value, planes) for value, planes in zip(node.inputs, tensors.inputs, strict=True)
            )
            results = op.reference(node, Operands(inputs, weight, bias, gamma))
            for index, (value, planes, result) in enumerate(zip(node.outputs, tensors.outputs, results, strict=True)):
                if index in before and not lookup(value.format).plain:
                    _store_changed(value.format, result, inputs[before[index]], as_tuple(planes))
                else:
                    quantize_planes(value.format, result, as_tuple(planes))

        return launch

    def _decode(self, value: Value, planes: Planes) -> torch.Tensor:
        if value.format == "i32":
            return planes
        return dequantize_planes(value.format, as_tuple(planes), self.dtype)


class Float32(_Reference):
    name = packed = "f32"
    # Of 65,536 keys that are alike every sum is rounded the same way.
    precision = 1e-9
    dtype = torch.float32


class Float64(_Reference):
    name = packed = "f64"
    precision = 1e-20
    dtype = torch.float64


def _formats(value: Value) -> Sequence[str]:
    """Every activation format that can store the value, its own first; only its own for ids and lengths."""
    if value.format not in ACTIVATIONS:
        return [value.format]
    columns = value.shape[-1]
    assert isinstance(columns, int)
    fitting = [name for name in ACTIVATIONS if columns % lookup(name).block == 0]
    # Only rows of columns have scales; of a cache each element stands for itself.
    if len(value.shape) != 2:
        fitting = [name for name in fitting if lookup(name).plain]
    return [value.format, *(name for name in fitting if name != value.format)]


def _store_changed(format: str, result: torch.Tensor, before: torch.Tensor, planes: tuple[torch.Tensor, ...]) -> None:
    """Only the rows that differ: what is stored already would be rounded again."""
    changed = (result != before).any(dim=-1)
    if not bool(changed.any()):
        return
    rows = tuple(plane[changed] for plane in planes)
    quantize_planes(format, result[changed], rows)
    for plane, part in zip(planes, rows, strict=True):
        plane[changed] = part

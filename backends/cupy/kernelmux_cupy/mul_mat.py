"""mul_mat, mul_mat_add, qkv and gate_up_swiglu of quantised weights by DP4A, and dense ones of few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from kernelmux.contract import Declined, Efficiency, Kernel, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, QUANTIZED, emitted, formats, written
from kernelmux_cupy.launch import Argument, bind
from kernelmux_cupy.pack import TILED, pack, packed_bytes
from kernelmux_cupy.source import function
from kernelmux_cupy.tuning import ROW_COUNTS, Card, Shape, Tuning, tune

DENSE_ROWS = 8
"""Rows up to which the dense kernels are faster than a library's product."""
VECTOR = 8
"""Columns of a weight that a thread loads at once."""


class Product(Kernel):
    """Weights as their kernel wants them, biases in float32."""

    def packed_bytes(self, node: TensorNode) -> int:
        matrices = (packed_bytes(w.format, *w.extents) if w.format in TILED else w.nbytes for w in node.weight)
        return sum(matrices) + sum(4 * bias.extents[0] for bias in node.bias)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(_on_device(weight, device) for weight in weights)


class Dp4a(Product):
    """Integers of weights and activations multiplied by `__dp4a` as they are stored, their sums scaled in float32.

    A residual is added to the sum before it is rounded; several matrices, each of its own format, are one launch.
    Warps, ring and grid follow from shape and card, unless `variant`, a Tuning, says others.
    """

    ops: ClassVar[tuple[str, ...]] = ("mul_mat", "mul_mat_add", "qkv")
    name = "dp4a"
    efficiency = Efficiency(reading=0.9, multiplying=0.3, arithmetic="dp4a")
    precision = 1e-11
    packed = "dp4a"
    # The weights are read once for so many rows.
    takes = {"m": f"..{ROW_COUNTS[-1]}", "weight_format": tuple(TILED), "weight_formats": tuple(TILED)}
    gated = False

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[QUANTIZED], *(FLOATS for _ in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(value) for value in node.outputs]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (integers, scales, sums), *residuals = tensors.inputs
        count = len(node.weight)
        matrices, biases = tensors.packed[:count], tensors.packed[count:]
        (m, k), n = node.inputs[0].extents, tuple(weight.extents[0] for weight in node.weight)
        shape = Shape(tuple(formats(node.weight)), n, k, m, self.gated)
        residual = node.inputs[1].format if residuals else "f32"
        made = _compiled(shape, tuple(formats(node.outputs)), residual, self.variant, self.device)
        args: list[Argument] = []
        for index in range(count):
            # Of a pair both write to one output.
            y = written(tensors.outputs[min(index, len(tensors.outputs) - 1)])
            bias = biases[index] if biases else None
            added = residuals[0] if residuals else None
            args += [matrices[index], bias, added, *y, np.int32(n[index])]
        args += [integers, scales, sums, np.int32(m), np.int32(k)]
        return bind(made.function, (made.grid,), (made.threads,), args, stream, made.shared)


class Dp4aGateUpSwiglu(Dp4a):
    """A block has the same rows of gate and up, so that only their product is written."""

    ops = ("gate_up_swiglu",)
    takes = {"m": Dp4a.takes["m"], "weight_formats": tuple(TILED)}
    gated = True


class Dense(Product):
    """Rows of two-byte weights as the file has them, read once for a few rows of activations."""

    ops = ("mul_mat",)
    efficiency = Efficiency(reading=0.9, multiplying=0.3)
    precision = 1e-11
    output_formats = FLOATS

    def refuses(self, node: TensorNode) -> Declined | None:
        if (k := node.inputs[0].extents[1]) % VECTOR:
            return Declined(f"it loads {VECTOR} columns at once, k is {k}", "alignment")
        return None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [[self.name, *(format for format in FLOATS if format != self.name)]]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,), (weight, *bias) = tensors.inputs, tensors.outputs, tensors.packed
        (n, k), m = node.weight[0].extents, len(x)
        rows = next(count for count in ROW_COUNTS if count >= m)
        # More rows of weights share what is read of the activations.
        outputs, warps = (2, 4) if rows < 4 else (4, 2)
        defines: dict[str, int | str] = {
            "WEIGHT": self.name,
            "INPUT": node.inputs[0].format,
            "OUT": node.outputs[0].format,
            "ROWS": rows,
            "OUTPUTS": outputs,
            "AHEAD": 8 // outputs,
            "WARPS": warps,
        }
        run = function("gemv", "gemv", self.device, **defines)
        args = (weight, bias[0] if bias else None, x, y, np.int32(m), np.int32(n), np.int32(k))
        return bind(run, (-(-n // (outputs * warps)),), (32 * warps,), args, stream)


class Bf16(Dense):
    """Weights in bfloat16."""

    name = packed = "bf16"
    takes = {"m": f"..{DENSE_ROWS}", "weight_format": ("bf16",)}


class F16(Dense):
    """Weights in float16."""

    name = packed = "f16"
    takes = {"m": f"..{DENSE_ROWS}", "weight_format": ("f16",)}


def _on_device(weight: Weight, device: Device) -> torch.Tensor:
    """A matrix in tiles or as it is stored, a bias in float32."""
    if len(weight.shape) == 1:
        return weight.dequantize().to(device.torch)
    if weight.format in TILED:
        return pack(weight, device)
    return weight.planes[0].view(weight.shape).to(device.torch)


@dataclass(frozen=True)
class _Compiled:
    """A function, and what it is launched with: blocks, threads of each, bytes of shared memory of each."""

    function: Any
    grid: int
    threads: int
    shared: int


@cache
def _compiled(
    shape: Shape, outputs: tuple[str, ...], residual: str, tuning: Tuning | None, device: Device
) -> _Compiled:
    """The kernel for a shape, chosen and loaded once: nodes that are alike are bound in microseconds."""
    card = _card(device)
    tuning = tuning or tune(shape, card)
    run = function("dp4a", "dp4a", device, **shape.defines(tuning, outputs, residual))
    return _Compiled(run, shape.grid(tuning, card), 32 * tuning.warps, shape.shared(tuning))


@cache
def _card(device: Device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device.index)
    return Card(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,
        properties.major >= 8,
    )

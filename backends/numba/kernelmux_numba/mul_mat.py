"""mul_mat and the fused ops that begin with it, each weight in panels of its own: several at once are one phase."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from kernelmux.contract import Declined, Device, Efficiency, Tensors
from kernelmux.contract.weights import dense
from kernelmux.graph.formats import Value, Weight
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.elementwise import FLOATS
from kernelmux_numba.kernel import NumbaKernel
from kernelmux_numba.packing import (
    BLOCK,
    PACKINGS,
    packed,
    packed_bytes,
    packing_of,
    panel_count,
    panels_at_once,
    panels_of,
)
from kernelmux_numba.target import outdone
from kernelmux_numba.team import Phase, Piece, shares

PART = 2**17
"""Products of weights that are worth a part: some microseconds."""


class Products(NumbaKernel):
    """What is alike for integers and for plain numbers."""

    ops: tuple[str, ...] = ("mul_mat", "mul_mat_add", "qkv", "mul_mat_pair")
    input_formats: Sequence[str] = ("f32",)
    output_formats: Sequence[str] = ("f32",)
    formats: ClassVar[Sequence[str]]
    """Of weights."""

    def refuses(self, node: TensorNode) -> Declined | None:
        other = [value.format for value in node.weight if value.format not in self.formats]
        if other:
            return Declined(f"it takes weights in {', '.join(self.formats)}, not {other[0]}", "format")
        return None

    def packed_bytes(self, node: TensorNode) -> int:
        return sum(map(self.panel_bytes, node.weight)) + sum(4 * value.extents[0] for value in node.bias)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        return tuple(
            self.panels(weight) if len(weight.shape) == 2 else dense(weight, torch.float32, device)
            for weight in weights
        )

    @abstractmethod
    def panel_bytes(self, weight: Value) -> int:
        """Bytes of a weight [n, k] in panels."""

    @abstractmethod
    def panels(self, weight: Weight) -> torch.Tensor:
        """A weight [n, k] in panels."""

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        matrices, biases = tensors.packed[: len(node.weight)], tensors.packed[len(node.weight) :]
        added = tensors.inputs[1] if node.op == "mul_mat_add" else None
        pieces = []
        for index, (weight, panels, y) in enumerate(zip(node.weight, matrices, tensors.outputs, strict=True)):
            bias = biases[index] if biases else None
            pieces.append(self._product(node, weight, panels, tensors, y, added, bias))
        return [*self.before(node, tensors), pieces]

    def before(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        """What must be done before the products."""
        return []

    @abstractmethod
    def activations(self, node: TensorNode, format: str, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
        """The activations as a weight of that format wants them: themselves, scales, sums of groups."""

    @abstractmethod
    def function(self, format: str) -> tuple[str, Sequence[object]]:
        """What multiplies by weights of that format, and its constants."""

    def _product(
        self,
        node: TensorNode,
        weight: Value,
        panels: torch.Tensor,
        tensors: Tensors,
        y: torch.Tensor,
        added: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> Piece:
        n, k = weight.extents
        together = panels_at_once(self.target)
        count = -(-panel_count(n, self.lanes) // together)
        at_once, parts = shares(count, max(1, PART // (self.lanes * together * k * len(y))))
        name, constants = self.function(weight.format)
        x = self.activations(node, weight.format, tensors)
        inputs = k // BLOCK if x[1] is not None else k
        strides = 4 * y.stride(0), 4 * added.stride(0) if added is not None else 0
        words = (
            *(panels, panels.shape[1], inputs, n, len(y), *x),
            *(y, strides[0], added, strides[1], bias, at_once * together),
        )
        return self.piece(name, constants, words, parts)


class Int16(Products):
    """Activations in 16 bits by the integers of quantised weights: next to no error.

    The first phase of a launch cuts them, the second multiplies and sums exactly for each group of inputs. Eight bits
    would be half the products, but too few: SmolLM2's Q4_1 is 4e-3 (Kullback-Leibler) from float32 with them.
    """

    name = "int16"
    precision = 1e-6
    packed = "panels"
    efficiency = Efficiency(reading=0.8, multiplying=0.6)
    formats = tuple(PACKINGS)

    def reaches(self, node: TensorNode) -> Efficiency:
        # VNNI in whole vectors multiplies integers faster than float32 is multiplied: 1.6 times torch's GEMM.
        if self.lanes == 16:
            return Efficiency(reading=0.8, multiplying=1.4)
        if self.lanes == 4 or self.target.dot == "fours":
            return self.efficiency
        # With AVX2 somewhat faster too where an integer is one field to take apart. That GEMM may have wider vectors.
        share = 0.9 if any(PACKINGS[value.format].bits in (5, 6) for value in node.weight) else 1.1
        return Efficiency(reading=0.8, multiplying=share / 2 if outdone(self.target) else share)

    def panel_bytes(self, weight: Value) -> int:
        return packed_bytes(weight.format, *weight.extents, self.lanes)

    def panels(self, weight: Weight) -> torch.Tensor:
        return packed(weight, self.target)

    def workspace(self, node: TensorNode) -> int:
        return sum(self._sizes(node))

    def before(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        m, k = node.inputs[0].extents
        each, parts = shares(m * k // BLOCK, 512)
        words = (tensors.inputs[0], *self._planes(node, tensors), m * k // BLOCK, each)
        return [[self.piece("convert:sixteen_bits", (), words, parts)]]

    def activations(self, node: TensorNode, format: str, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
        integers, scales, sums, halves = self._planes(node, tensors)
        return integers, scales, halves if PACKINGS[format].parts == 2 else sums

    def function(self, format: str) -> tuple[str, Sequence[object]]:
        return "products:quantised", (packing_of(format, self.target),)

    def _sizes(self, node: TensorNode) -> tuple[int, int, int, int]:
        """Bytes of integers, scales, sums of blocks and of their halves."""
        m, k = node.inputs[0].extents
        blocks = m * (k // BLOCK)
        return 2 * BLOCK * blocks, 4 * blocks, 4 * blocks, 8 * blocks

    def _planes(self, node: TensorNode, tensors: Tensors) -> Sequence[torch.Tensor]:
        assert tensors.workspace is not None
        sizes = self._sizes(node)
        return tensors.workspace[: sum(sizes)].split(sizes)


class Float(Products):
    """Float32 by weights in plain numbers, as they are stored."""

    name = "f32"
    precision = 1e-11
    packed = "float panels"
    formats = FLOATS

    def panel_bytes(self, weight: Value) -> int:
        n, k = weight.extents
        return panel_count(n, self.lanes) * self.lanes * k * (4 if weight.format == "f32" else 2)

    def panels(self, weight: Weight) -> torch.Tensor:
        return panels_of(weight, self.target)

    def activations(self, node: TensorNode, format: str, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
        return (tensors.inputs[0], None, None)

    def function(self, format: str) -> tuple[str, Sequence[object]]:
        return "products:dense", (format,)

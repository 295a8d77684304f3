"""add, mul, silu and swiglu: one CUDA C kernel, in any mix of f32, bf16 and f16; swiglu quantises where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kernelmux.contract.hookspecs import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, emitted, formats, written
from kernelmux_cupy.launch import bind
from kernelmux_cupy.load import function

THREADS = 256
EACH = 4
"""Elements of a thread."""


class _Elementwise(Kernel):
    """In float32, rounded once."""

    name = "f32"
    precision = 1e-11
    op: ClassVar[str]
    """The function of elementwise.cu."""

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS for _ in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Of one input the second is the first: it is not read.
        left, right = (*tensors.inputs, *tensors.inputs)[:2]
        left_format, right_format = (*formats(node.inputs), *formats(node.inputs))[:2]
        (planes,), (y_format,) = tensors.outputs, formats(node.outputs)
        run = function("elementwise", "elementwise", left.device, OP=self.op, A=left_format, B=right_format, Y=y_format)
        args = (left, right, *written(planes), np.int64(left.numel()))
        return bind(run, (-(-left.numel() // (EACH * THREADS)),), (THREADS,), args, stream)


class Add(_Elementwise):
    op = "add"


class Mul(_Elementwise):
    op = "mul"


class Silu(_Elementwise):
    op = "silu"


class Swiglu(_Elementwise):
    op = "swiglu"

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[0])]

"""add, mul, silu and swiglu: one CUDA C kernel, in any mix of f32, bf16 and f16; swiglu quantises where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, emitted, formats, written
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

THREADS = 256
EACH = 4
"""Elements of a thread."""


class Elementwise(Kernel):
    """In float32, rounded once."""

    ops = ("add", "mul", "silu", "swiglu")
    name = "f32"
    precision = 1e-11
    input_formats = FLOATS

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[0]) if node.op == "swiglu" else FLOATS]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Of one input the second is the first: it is not read.
        left, right = (*tensors.inputs, *tensors.inputs)[:2]
        left_format, right_format = (*formats(node.inputs), *formats(node.inputs))[:2]
        (planes,), (y_format,) = tensors.outputs, formats(node.outputs)
        stored = {"A": left_format, "B": right_format, "Y": y_format}
        run = function("elementwise", "elementwise", self.device, OP=node.op, **stored)
        args = (left, right, *written(planes), np.int64(left.numel()))
        return bind(run, (-(-left.numel() // (EACH * THREADS)),), (THREADS,), args, stream)

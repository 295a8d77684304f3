"""rms_norm and add_rms_norm: a block of one CUDA C kernel a row, which also quantises the norm where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, emitted, formats, written
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

WIDE = 4
"""Columns that a thread takes at a time, where rows are multiples of it."""
THREADS = 1024
LONGEST = 16384
"""Columns that a block keeps in registers, 16 a thread."""


class RmsNorm(Kernel):
    """The sum of squares in float32."""

    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    takes = {"hidden_dim": f"..{LONGEST}"}
    input_formats = FLOATS

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [emitted(node.outputs[-1])]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        # Without a sum there is neither a second input nor a total.
        a, b = (*tensors.inputs, None)[:2]
        total, y = (None, *tensors.outputs)[-2:]
        m, columns = a.shape
        wide = WIDE if columns % WIDE == 0 else 1
        threads = min(THREADS, -(-columns // (32 * wide)) * 32)
        # A power of two, so that few functions are compiled.
        chunks = 1 << (-(-columns // (threads * wide)) - 1).bit_length()
        a_format, b_format = (*formats(node.inputs), "f32")[:2]
        total_format, y_format = ("f32", *formats(node.outputs))[-2:]
        stored = {"A": a_format, "B": b_format, "TOTAL": total_format, "Y": y_format}
        run = function("norm", "rms_norm", self.device, **stored, ADD=int(b is not None), WIDE=wide, CHUNKS=chunks)
        args = (a, b, total, *tensors.packed, *written(y), np.float32(node.epsilon), np.int32(columns))
        return bind(run, (m,), (threads,), args, stream)


class AddRmsNorm(RmsNorm):
    """The norm of the unrounded sum."""

    ops = ("add_rms_norm",)

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, *super().outputs(node)]

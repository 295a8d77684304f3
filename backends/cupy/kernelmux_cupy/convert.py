"""convert between the float formats and q8_32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, QUANTIZED
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

THREADS = 256


class Convert(Kernel):
    """Rounded to nearest; q8_32 as core defines it."""

    ops = ("convert",)
    name = "f32"
    precision = 1e-11
    takes = {"source": (*FLOATS, QUANTIZED), "target": (*FLOATS, QUANTIZED)}

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        given, wanted = node.inputs[0].format, node.outputs[0].format
        m, n = node.inputs[0].extents
        planes: Sequence[Any] = (x, y)
        if wanted == QUANTIZED:
            name, planes, count = "quantize", (x, *y), m * n // 4
        elif given == QUANTIZED:
            name, planes, count = "dequantize", (*x[:2], y), m * n // 4
        else:
            name, count = "plain", m * n
        source, target = (format if format in FLOATS else "f32" for format in (given, wanted))
        run = function("convert", name, self.device, FROM=source, TO=target)
        return bind(run, (-(-count // THREADS),), (THREADS,), (*planes, np.int64(count)), stream)

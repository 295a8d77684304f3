"""convert between the float formats and q8_32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, QUANTIZED
from kernelmux_cupy.launch import bind
from kernelmux_cupy.load import function

THREADS = 256


def offer(source: str, target: str) -> Kernel | Declined:
    """The kernel, or which of the two formats it lacks."""
    known = (*FLOATS, QUANTIZED)
    for format in (source, target):
        if format not in known:
            return Declined(f"it knows {', '.join(known)}, not {format}", "format")
    return Convert()


class Convert(Kernel):
    """Rounded to nearest; q8_32 as core defines it."""

    name = "f32"
    precision = 1e-11

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
        run = function("convert", name, planes[0].device, FROM=source, TO=target)
        return bind(run, (-(-count // THREADS),), (THREADS,), (*planes, np.int64(count)), stream)

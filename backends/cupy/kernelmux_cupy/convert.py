"""convert between the float formats and q8_32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux_cupy import launch, source
from kernelmux_cupy.mul_mat import C_TYPES, FLOATS, device_of

THREADS = 256


def offer(source: str, target: str) -> Kernel | Declined:
    """The kernel, or which of the two formats it lacks."""
    for format in (source, target):
        if format not in C_TYPES:
            return Declined(f"it knows {', '.join(C_TYPES)}, not {format}", "format")
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
        if wanted == "q8_32":
            name, planes, count = "quantize", (x, *y), m * n // 4
        elif given == "q8_32":
            name, planes, count = "dequantize", (*x[:2], y), m * n // 4
        else:
            name, count = "plain", m * n
        types = [C_TYPES[format] if format in FLOATS else "float" for format in (given, wanted)]
        module = source.compile("convert", device_of(planes[0]), FROM=types[0], TO=types[1])
        grid = (-(-count // THREADS),)
        return launch.bind(module.get_function(name), grid, (THREADS,), (*planes, np.int64(count)), stream)

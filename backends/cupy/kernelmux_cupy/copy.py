"""copy: keys and values scattered into the paged cache in one launch of a CUDA C kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, formats
from kernelmux_cupy.launch import bind
from kernelmux_cupy.source import function

THREADS = 256


class Copy(Kernel):
    """Rounded once, to the cache's format; the device reads the slots."""

    ops = ("copy",)
    name = "f32"
    precision = 1e-11
    strided = True
    takes = {"cache_format": FLOATS}
    input_formats = FLOATS

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        k, v, *_ = tensors.inputs
        m, columns = k.shape
        # Of a wider matrix rows may begin anywhere.
        begins = (columns, *(at for x in (k, v) for at in (x.stride(0), x.data_ptr() // x.itemsize)))
        wide = 4 if all(at % 4 == 0 for at in begins) else 1
        k_format, v_format, _, k_cache, v_cache = formats(node.inputs)
        stored = {"K": k_format, "V": v_format, "K_CACHE": k_cache, "V_CACHE": v_cache}
        run = function("copy", "copy", self.device, **stored, WIDE=wide)
        grid, extents = (m, -(-columns // (THREADS * wide))), (columns, k.stride(0), v.stride(0))
        return bind(run, grid, (THREADS,), (*tensors.inputs, *map(np.int32, extents)), stream)

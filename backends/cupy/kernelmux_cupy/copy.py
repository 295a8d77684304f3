"""copy: keys and values scattered into the paged cache in one launch of a CUDA C kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelmux.contract.hookspecs import Declined, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_cupy.formats import FLOATS, formats
from kernelmux_cupy.launch import bind
from kernelmux_cupy.load import function

THREADS = 256


def offer(cache_format: str) -> Kernel | Declined:
    """The kernel, or why not."""
    if cache_format not in FLOATS:
        return Declined(f"it writes caches in {', '.join(FLOATS)}, not {cache_format}", "format", Copy.name)
    return Copy()


class Copy(Kernel):
    """Rounded once, to the cache's format; the device reads the slots."""

    name = "f32"
    precision = 1e-11

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS, FLOATS, *([value.format] for value in node.inputs[2:])]

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        k = tensors.inputs[0]
        m, columns = k.shape
        wide = 4 if columns % 4 == 0 else 1
        k_format, v_format, _, k_cache, v_cache = formats(node.inputs)
        stored = {"K": k_format, "V": v_format, "K_CACHE": k_cache, "V_CACHE": v_cache}
        run = function("copy", "copy", k.device, **stored, WIDE=wide)
        grid = (m, -(-columns // (THREADS * wide)))
        return bind(run, grid, (THREADS,), (*tensors.inputs, np.int32(columns)), stream)

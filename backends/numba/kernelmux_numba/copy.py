"""copy: new keys and values into the paged cache, padding rows left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelmux.contract import Tensors
from kernelmux.graph.formats import CACHE_FORMATS, as_tuple
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.kernel import ELEMENTS, NumbaKernel
from kernelmux_numba.team import Phase, shares


class Copy(NumbaKernel):
    ops = ("copy",)
    name = "f32"
    precision = 1e-11
    takes: Mapping[str, object] = {"cache_format": CACHE_FORMATS}
    input_formats: Sequence[str] = ("f32",)

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        k, v, slots, *caches = tensors.inputs
        m, width = k.shape
        each, parts = shares(m, -(-ELEMENTS // (2 * width)))
        planes = (plane for cache in caches for plane in as_tuple(cache))
        words = (m, each, node.num_kv_heads, node.head_dim, slots, k, v, *planes)
        return [[self.piece("copy:copy", (node.inputs[3].format,), words, parts)]]

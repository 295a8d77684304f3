"""rope, alone and with the copy after it: angles in float64 from the positions, at each launch, once for all heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from kernelmux.contract import Tensors
from kernelmux.graph.formats import CACHE_FORMATS, as_tuple
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.kernel import ELEMENTS, NumbaKernel
from kernelmux_numba.team import Phase, Piece, shares


class Rope(NumbaKernel):
    ops: tuple[str, ...] = ("rope",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    input_formats: Sequence[str] = ("f32",)
    output_formats: Sequence[str] = ("f32",)

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        q, k, positions = tensors.inputs
        return [[turned(self, node, tensors.packed, positions, (q, k), tensors.outputs)]]


class RopeCopy(Rope):
    ops = ("rope_copy",)
    takes: Mapping[str, object] = {"cache_format": CACHE_FORMATS}

    def workspace(self, node: TensorNode) -> int:
        # Keys, turned.
        return node.inputs[1].nbytes

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        q, k, v, positions, slots, *caches = tensors.inputs
        copied = (node.inputs[5].format, slots, v, caches)
        to = (tensors.outputs[0], tensors.workspace)
        return [[turned(self, node, tensors.packed, positions, (q, k), to, copied)]]


def turned(
    kernel: NumbaKernel,
    node: TensorNode,
    divisors: Sequence[torch.Tensor],
    positions: torch.Tensor,
    rows: Sequence[torch.Tensor],
    to: Sequence[torch.Tensor | None],
    copied: tuple[str, torch.Tensor, torch.Tensor, Sequence[object]] | None = None,
) -> Piece:
    """Queries and keys turned; these and values copied, where it is told the caches' format, slots, values, caches."""
    rotation = node.rotation
    assert rotation is not None
    m, heads = len(positions), node.num_heads + node.num_kv_heads
    each, parts = shares(m, -(-ELEMENTS // (2 * heads * node.head_dim)))
    sizes = node.num_heads, node.num_kv_heads, node.head_dim, rotation.dims, rotation.magnitude
    words = (m, each, *sizes, positions, *rows, *to)
    kind, constants, further = "rope:rope", (rotation.pairing,), ()
    if copied is not None:
        format, slots, values, caches = copied
        kind, constants = "rope:rope_copy", (rotation.pairing, format)
        further = (slots, values, *(plane for cache in caches for plane in as_tuple(cache)))
    where = len(words) + 1 + len(further)
    return kernel.piece(kind, constants, (*words, where, *further, *_frequencies(node, divisors)), parts)


def _frequencies(node: TensorNode, divisors: Sequence[torch.Tensor]) -> Sequence[float]:
    """Radians a position, one a pair."""
    assert node.rotation is not None
    frequencies = torch.tensor(node.rotation.frequencies(), dtype=torch.float64)
    exact: list[float] = (frequencies / math.prod(divisors, start=torch.ones((), dtype=torch.float64))).tolist()
    return exact

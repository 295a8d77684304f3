"""gate_up_swiglu: the first half of a llama feed-forward layer, from its input to the product."""

from __future__ import annotations

from kernelmux.graph.ops.fused import Part
from kernelmux.graph.ops.qkv import Products, products


class GateUpSwiglu(Products):
    """y = silu(x Wgᵀ) * (x Wuᵀ).

    Axes: m rows, n outputs, k inputs.
    Inputs: x [m, k]; two weights [n, k], of any formats; two biases or none.
    Outputs: y [m, n].
    Numerics: as mul_mat, silu and mul.
    """

    name = "gate_up_swiglu"
    outputs = ("y",)
    pattern = (
        *products("gate", "up"),
        Part("silu", ("gate",), ("gated",)),
        Part("mul", ("gated", "up"), ("y",)),
    )
    told = {**Products.told, "n": lambda node: node.weight[0].shape[0]}
    widths = (96, 96)
    wide = (1536, 1536)
    odd = (257, 257)
    mixed = ("Q4_K", "Q5_K")

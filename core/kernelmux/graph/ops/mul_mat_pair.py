"""mul_mat_pair: two products of one input, as gate and up: what a kernel of two stacked weights makes at once."""

from __future__ import annotations

from kernelmux.graph.ops.qkv import Products, products


class MulMatPair(Products):
    """first = x W1ᵀ; second = x W2ᵀ (each + its bias).

    Axes: m rows; n_1, n_2 outputs; k inputs.
    Inputs: x [m, k]; two weights, of any formats; two biases or none.
    Outputs: first [m, n_1]; second [m, n_2].
    Numerics: as mul_mat.
    """

    name = "mul_mat_pair"
    outputs = ("first", "second")
    pattern = products(*outputs)
    widths = (96, 96)
    wide = (576, 576)
    odd = (512, 128)
    mixed = ("Q4_K", "Q6_K")

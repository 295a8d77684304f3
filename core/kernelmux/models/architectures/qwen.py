"""qwen2, whose queries, keys and values have biases (Yang et al. 2024, arXiv:2407.10671)."""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.blocks import Attention, Blocks


def build_qwen2(t: Blocks) -> Graph:
    how = Attention(t.rotation("halves"))
    x = t.embedding()
    for layer in range(t.shape.layers):
        x = t.pre_norm_layer(layer, x, how)
    return t.logits(x)

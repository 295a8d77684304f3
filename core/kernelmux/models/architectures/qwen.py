"""qwen2, whose queries, keys and values have biases (Yang et al. 2024, arXiv:2407.10671), and qwen3, which has norms of
the heads of queries and keys in their place (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.blocks import Attention, Blocks


def build_qwen2(t: Blocks) -> Graph:
    return _build(t, Attention(t.rotation("halves")))


def build_qwen3(t: Blocks) -> Graph:
    return _build(t, Attention(t.rotation("halves"), norm="head"))


def _build(t: Blocks, how: Attention) -> Graph:
    x = t.embedding()
    for layer in range(t.shape.layers):
        x = t.pre_norm_layer(layer, x, how)
    return t.logits(x)

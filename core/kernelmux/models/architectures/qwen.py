"""qwen2, whose queries, keys and values have biases (Yang et al. 2024, arXiv:2407.10671), and qwen3, which has norms of
the heads of queries and keys in their place (Yang et al. 2025, arXiv:2505.09388)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks, norm: Literal["", "head"]) -> Graph:
    rotation = t.rotation("halves")
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        x = t.pre_norm_layer(layer, x, Attention(rotation, window=window, norm=norm))
    return t.logits(x)


QWEN2 = Architecture(partial(build, norm=""), {"qwen2": Folder()})
QWEN3 = Architecture(partial(build, norm="head"), {"qwen3": Folder()})

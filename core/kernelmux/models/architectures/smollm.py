"""smollm3: a llama of which every fourth layer has no positions (https://huggingface.co/blog/smollm3)."""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks) -> Graph:
    """GGUF stores queries and keys permuted, so that neighbours turn together."""
    rotation, divisors, turns = t.rotation("adjacent"), t.divisors(), t.turning()
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        how = Attention(rotation, divisors, window) if turns[layer] else Attention(None, window=window)
        x = t.pre_norm_layer(layer, x, how)
    return t.logits(x)


_KEYS = {"no_rope_layers": "rope.layers", "no_rope_layer_interval": "rope.layer_interval"}

SMOLLM3 = Architecture(build, {"smollm3": Folder(keys=_KEYS, theta=2e6, tied=True)})

"""olmo2: norms after attention and feed-forward instead of before them, and of whole queries and keys.

OLMo team 2024, arXiv:2501.00656.
"""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks) -> Graph:
    rotation, divisors = t.rotation("halves"), t.divisors()
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        at = f"blk.{layer}"
        mixed = t.attention(layer, x, Attention(rotation, divisors, window, norm="row"))
        x = t.add(f"{at}.attn_add", x, t.norm(f"{at}.post_attention_norm", mixed, layer), layer)
        made = t.feed_forward(layer, x)
        x = t.add(f"{at}.ffn_add", x, t.norm(f"{at}.post_ffw_norm", made, layer), layer)
    return t.logits(x, own_head=True)


_NAMES = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}

OLMO2 = Architecture(build, {"olmo2": Folder(names=_NAMES, own_head=True)})

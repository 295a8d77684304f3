"""granite: a llama whose embeddings, residuals, scores and logits are multiplied by numbers that the file states.

IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models.
"""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks) -> Graph:
    """GGUF stores queries and keys permuted, so that neighbours turn together; logits are divided."""
    rotation, divisors = t.rotation("adjacent"), t.divisors()
    scale, residual = t.keys.number_or_none("attention.scale"), t.keys.number_or_none("residual_scale") or 1.0
    x = t.embedding(t.keys.number_or_none("embedding_scale") or 1.0)
    for layer, window in enumerate(t.windows()):
        at = f"blk.{layer}"
        mixed = t.attention(layer, t.norm(f"{at}.attn_norm", x, layer), Attention(rotation, divisors, window, scale))
        x = t.add(f"{at}.attn_add", x, t.scaled(f"{at}.attn_scale", mixed, residual, layer), layer)
        made = t.feed_forward(layer, t.norm(f"{at}.ffn_norm", x, layer))
        x = t.add(f"{at}.ffn_add", x, t.scaled(f"{at}.ffn_scale", made, residual, layer), layer)
    return t.logits(x, scale=1 / t.keys.number("logit_scale"))


_KEYS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}

GRANITE = Architecture(build, {"granite": Folder(keys=_KEYS)})

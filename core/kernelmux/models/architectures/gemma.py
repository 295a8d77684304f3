"""gemma, gemma2 and gemma3: scaled embeddings and gates of gelu.

From gemma2 on there are norms before and after attention and feed-forward, and layers whose rows see a window; gemma2
caps scores and logits (arXiv:2408.00118), gemma3 norms heads of queries and keys and turns layers that see a window by
a base of their own (arXiv:2503.19786).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks

GEMMA2_CAPS = {"attn": 50.0, "final": 30.0}
"""Of attention's scores, and of logits."""


def build_gemma(t: Blocks) -> Graph:
    how = Attention(t.rotation("halves"))
    x = t.embedding(math.sqrt(t.shape.hidden))
    for layer in range(t.shape.layers):
        x = t.pre_norm_layer(layer, x, how, partial(t.feed_forward, activation="gelu"))
    return t.logits(x)


def build_gemma2(t: Blocks) -> Graph:
    """The first GGUF files of Gemma 2 state neither window nor caps, which are the same of all."""
    rotation, scale = t.rotation("halves"), _scale(t, divided=46)
    cap, last_cap = (t.keys.number_or_none(f"{part}_logit_softcapping", usual) for part, usual in GEMMA2_CAPS.items())
    x = t.embedding(math.sqrt(t.shape.hidden))
    for layer, window in enumerate(t.windows(period=2, usual=4096)):
        x = _layer(t, layer, x, Attention(rotation, window=window, scale=scale, soft_cap=cap))
    return t.logits(x, soft_cap=last_cap)


def build_gemma3(t: Blocks) -> Graph:
    rotation, scale = t.rotation("halves"), _scale(t, divided=62)
    theta = t.keys.number("rope.freq_base_swa", 10_000.0)
    near = replace(rotation, theta=theta, scaling="none", factor=1.0, original_context=0)
    cap = t.keys.number_or_none("attn_logit_softcapping")
    x = t.embedding(math.sqrt(t.shape.hidden))
    for layer, window in enumerate(t.windows(period=6)):
        turned = near if window else rotation
        x = _layer(t, layer, x, Attention(turned, window=window, scale=scale, soft_cap=cap, norm="head"))
    return t.logits(x, soft_cap=t.keys.number_or_none("final_logit_softcapping"))


def _layer(t: Blocks, layer: int, x: Value, how: Attention) -> Value:
    """Attention and feed-forward, each between two norms."""
    at = f"blk.{layer}"
    mixed = t.attention(layer, t.norm(f"{at}.attn_norm", x, layer), how)
    x = t.add(f"{at}.attn_add", x, t.norm(f"{at}.post_attention_norm", mixed, layer), layer)
    made = t.feed_forward(layer, t.norm(f"{at}.ffn_norm", x, layer), "gelu")
    return t.add(f"{at}.ffn_add", x, t.norm(f"{at}.post_ffw_norm", made, layer), layer)


def _scale(t: Blocks, divided: int) -> float:
    """What scores are multiplied by: a folder states it; of GGUF files that with so many layers differs."""
    if "attention.query_pre_attn_scalar" in t.keys:
        return 1 / math.sqrt(t.keys.number("attention.query_pre_attn_scalar"))
    return 1 / math.sqrt(t.shape.hidden / t.shape.heads) if t.shape.layers == divided else 0.0


_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_KEYS = {
    "query_pre_attn_scalar": "attention.query_pre_attn_scalar",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA = Folder(activation="gelu_pytorch_tanh", tied=True, norms_from_zero=True)

GEMMA = Architecture(build_gemma, {"gemma": _GEMMA})
_NONE = {"attention.sliding_window": 0, **{f"{part}_logit_softcapping": 0.0 for part in GEMMA2_CAPS}}
"""What a folder has that does not state them."""
GEMMA2 = Architecture(build_gemma2, {"gemma2": replace(_GEMMA, defaults=_NONE, keys=_KEYS, names=_NAMES)})
GEMMA3 = Architecture(build_gemma3, {"gemma3_text": replace(_GEMMA, keys=_KEYS, names=_NAMES, theta=1e6)})

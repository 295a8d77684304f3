"""gpt-oss: experts of clamped gates, attention sinks, a window in every second layer (OpenAI 2025, arXiv:2508.10925).

Attention, router and experts have biases. yarn blends frequencies between pairs that are no whole numbers.
"""

from __future__ import annotations

from dataclasses import replace

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks

WIDTH = "expert_feed_forward_length"


def build(t: Blocks) -> Graph:
    """GGUF states neither how gates are clamped nor that yarn is not truncated: all files of gpt-oss are so."""
    rotation = t.rotation("halves", truncate=False)
    experts = t.experts(WIDTH if WIDTH in t.keys else "feed_forward_length", renormalize=True)
    if experts is None:
        t.keys.fail("expert_count", "a gpt-oss model has experts")
    limit, alpha = t.keys.number("swiglu_limit", 7.0), t.keys.number("swiglu_alpha", 1.702)
    experts = replace(experts, limit=limit, alpha=alpha)
    x = t.embedding()
    for layer, window in enumerate(t.windows(period=2, usual=None)):
        at = f"blk.{layer}"
        how = Attention(rotation, window=window, sinks=True)
        x = t.add(f"{at}.attn_add", x, t.attention(layer, t.norm(f"{at}.attn_norm", x, layer), how), layer)
        made = t.expert_feed_forward(experts, layer, t.norm(f"{at}.post_attention_norm", x, layer))
        x = t.add(f"{at}.ffn_add", x, made, layer)
    return t.logits(x, own_head=True)


_FOLDER = Folder(
    keys={
        "num_local_experts": "expert_count",
        "experts_per_token": "expert_used_count",
        "num_experts_per_tok": "expert_used_count",
        "swiglu_limit": "swiglu_limit",
        "swiglu_alpha": "swiglu_alpha",
    },
    names={
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks",
        "mlp.router": "ffn_gate_inp",
    },
    experts={
        "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "mlp.experts.down_proj": ("ffn_down_exps",),
    },
    defaults={"attention.sliding_window": 0},
    theta=150_000.0,
    own_head=True,
)

GPT_OSS = Architecture(build, {"gpt_oss": _FOLDER})

"""phi3, whose queries, keys and values are one matrix, as gate and up are (Abdin et al. 2024, arXiv:2404.14219)."""

from __future__ import annotations

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks) -> Graph:
    """The rows of a fused matrix are tensors of their own here, so that products are chosen and fused as any others."""
    s = t.shape
    rotation, divisors = t.rotation("halves"), t.divisors()
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        at = f"blk.{layer}"
        if f"{at}.attn_qkv.weight" in t.tensors:
            heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
            rows = {f"{at}.attn_{part}.weight": count * s.head_dim for part, count in heads.items()}
            t.tensors.split(f"{at}.attn_qkv.weight", s.hidden, rows)
        halves = {f"{at}.ffn_{part}.weight": s.feed_forward for part in ("gate", "up")}
        t.tensors.split(f"{at}.ffn_up.weight", s.hidden, halves)
        x = t.pre_norm_layer(layer, x, Attention(rotation, divisors, window))
    return t.logits(x)


PHI3 = Architecture(build, {"phi3": Folder(names={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"})})

"""qwen2, whose queries, keys and values have biases (Yang et al. 2024, arXiv:2407.10671), and qwen3, which has norms of
the heads of queries and keys in their place (Yang et al. 2025, arXiv:2505.09388), qwen3moe experts too."""

from __future__ import annotations

from functools import partial
from typing import Literal

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks, FeedForward


def build(t: Blocks, norm: Literal["", "head"], feed_forward: FeedForward | None = None) -> Graph:
    rotation = t.rotation("halves")
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        x = t.pre_norm_layer(layer, x, Attention(rotation, window=window, norm=norm), feed_forward)
    return t.logits(x)


def build_moe(t: Blocks) -> Graph:
    """GGUF does not say that weights are renormalised: all files of Qwen3's are so."""
    experts = t.experts("expert_feed_forward_length", t.keys.flag("expert_weights_norm", True))
    if experts is None:
        t.keys.fail("expert_count", "a qwen3moe model has experts")
    return build(t, "head", partial(t.expert_feed_forward, experts))


QWEN2 = Architecture(partial(build, norm=""), {"qwen2": Folder()})
QWEN3 = Architecture(partial(build, norm="head"), {"qwen3": Folder()})
QWEN3MOE = Architecture(
    build_moe,
    {
        "qwen3_moe": Folder(
            {
                "num_experts": "expert_count",
                "num_local_experts": "expert_count",
                "num_experts_per_tok": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "norm_topk_prob": "expert_weights_norm",
            },
            defaults={"expert_weights_norm": False},
        )
    },
)

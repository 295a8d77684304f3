"""llama4's text: experts of one a row beside a shared one, chunks of attention, layers without positions.

Rows of layers with positions see their own chunk, and heads are normed once they have turned; of layers without, all is
seen, and queries grow with the position. A router's sigmoid multiplies what an expert reads.
Meta 2025: https://github.com/meta-llama/llama-models/tree/main/models/llama4
"""

from __future__ import annotations

from dataclasses import replace

from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks

SCALE, SPAN, CHUNK = 0.1, 8192, 8192
"""What GGUF does not state, for all files have it: queries' temperature, and positions of a chunk."""
LARGEST = 128
"""Experts of the model that norms no heads (Maverick), by which GGUF tells it."""


def build(t: Blocks) -> Graph:
    """GGUF and folders store queries and keys so that neighbours turn together."""
    rotation, divisors, layers = t.rotation("adjacent"), t.divisors(), t.shape.layers
    experts = t.experts("expert_feed_forward_length", renormalize=False)
    if experts is None or experts.used != 1:
        t.keys.fail("expert_used_count", "a llama4 model has experts, of which each row is given to one")
    experts, sparse = replace(experts, sigmoid=True), _sparse_layers(t)
    norm = t.keys.truth("attention.use_qk_norm", experts.count != LARGEST)
    tempered = t.keys.truth("attention.temperature_tuning", True)
    temper = t.keys.number("attention.temperature_scale", SCALE), t.keys.count("attention.temperature_length", SPAN)
    turns, chunk = t.turning(), t.keys.count("attention.chunk_size", CHUNK, least=0)
    chunked = t.keys.flags_of_layers("attention.chunk_pattern", layers, turns)
    if (stated := t.keys.count("attention.sliding_window", CHUNK, least=0)) == 0:
        # A smaller model's files say so that all layers turn, and see all.
        turns, chunk = [True] * layers, 0
    elif stated != CHUNK:
        t.keys.fail("attention.sliding_window", f"llama4 has chunks of {CHUNK} positions, or says 0: none")

    def feed_forward(layer: int, x: Value) -> Value:
        if not sparse[layer]:
            return t.feed_forward(layer, x)
        made, shared = t.expert_feed_forward(experts, layer, x), t.shared_expert(layer, x, experts.width)
        return t.add(f"blk.{layer}.ffn_shared_add", made, shared, layer)

    x = t.embedding()
    for layer in range(layers):
        seen = chunk if chunked[layer] else 0
        if turns[layer]:
            how = Attention(rotation, divisors, chunk=seen, norm="turned" if norm else "")
        else:
            how = Attention(None, chunk=seen, temper=temper if tempered else None)
        x = t.pre_norm_layer(layer, x, how, feed_forward)
    return t.logits(x)


def _sparse_layers(t: Blocks) -> list[bool]:
    """Which layers have experts: those that a folder lists, or each of so many."""
    step = t.keys.count("interleave_moe_layer_step", 1)
    if "expert_layers" in t.keys:
        return t.keys.listed_layers("expert_layers", t.shape.layers)
    return [(layer + 1) % step == 0 for layer in range(t.shape.layers)]


_PROJECTIONS = ("gate", "up", "down")
LLAMA4_TEXT = Folder(
    keys={
        "intermediate_size": "expert_feed_forward_length",
        "intermediate_size_mlp": "feed_forward_length",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_layers": "expert_layers",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "no_rope_layers": "rope.layers",
        "no_rope_layer_interval": "rope.layer_interval",
        "attention_chunk_size": "attention.chunk_size",
        "use_qk_norm": "attention.use_qk_norm",
        "attn_temperature_tuning": "attention.temperature_tuning",
        "attn_scale": "attention.temperature_scale",
        "floor_scale": "attention.temperature_length",
    },
    defaults={"attention.use_qk_norm": True},
    names={
        "feed_forward.router": "ffn_gate_inp",
        **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in _PROJECTIONS},
        **{f"feed_forward.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in _PROJECTIONS},
    },
    experts={
        "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "feed_forward.experts.down_proj": ("ffn_down_exps",),
    },
    in_turn=False,
    theta=500_000.0,
    pairing="adjacent",
)
LLAMA4 = Architecture(
    build,
    {"llama4_text": LLAMA4_TEXT, "llama4": replace(LLAMA4_TEXT, within="text_config", prefix="language_model.")},
)

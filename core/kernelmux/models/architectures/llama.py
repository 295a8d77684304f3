"""llama, 1 to 3.x, mistral and mixtral, which GGUF calls llama too: the pre-norm transformer of Touvron et al. 2023.

A layer is rms_norm, q, k, v, rope, copy, attention, o, add, rms_norm, gate, up, silu, mul, down, add
(arXiv:2302.13971); biases are added where a file has them. Mistral's rows see a window of positions
(Jiang et al. 2023, arXiv:2310.06825); Mixtral's have two of eight experts each (Jiang et al. 2024, arXiv:2401.04088).
"""

from __future__ import annotations

from functools import partial

from kernelmux.graph.graph import Graph
from kernelmux.models.architecture import Architecture, Folder
from kernelmux.models.blocks import Attention, Blocks


def build(t: Blocks) -> Graph:
    """GGUF stores llama's queries and keys permuted, so that neighbours turn together."""
    rotation, divisors = t.rotation("adjacent"), t.divisors()
    experts = t.experts("feed_forward_length", renormalize=True)
    feed_forward = partial(t.expert_feed_forward, experts) if experts else None
    x = t.embedding()
    for layer, window in enumerate(t.windows()):
        x = t.pre_norm_layer(layer, x, Attention(rotation, divisors, window), feed_forward)
    return t.logits(x)


MIXTRAL = Folder(
    {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    theta=1e6,
)
LLAMA = Architecture(build, {"llama": Folder(), "mistral": Folder(), "mixtral": MIXTRAL})

"""A transformer's sizes and its rotary embedding, as a file's keys state them.

Enters: the file's hyperparameters. Leaves: a Shape, and Rotations; ModelError where they do not go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kernelmux.errors import shown
from kernelmux.graph.ops import Rotation
from kernelmux.models.hyperparameters import Hyperparameters

Pairing = Literal["adjacent", "halves"]

SCALINGS = ("none", "linear", "yarn", "longrope")
"""What `rope.scaling.type` may be. longrope's divisors are tensors of the file."""

MOST_LAYERS = 4096
"""Some twenty times as many as any model has: to be refused before they are built one by one."""


@dataclass(frozen=True)
class Shape:
    """What the graph, the cache and the batch need to know."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    longest: int
    """Of a model that differs for short and for long contexts what it holds if it is opened for so many tokens."""
    epsilon: float


def read_shape(keys: Hyperparameters) -> Shape:
    """The sizes; ModelError names the key that is missing or does not fit."""
    layers = keys.count("block_count")
    if layers > MOST_LAYERS:
        keys.fail("block_count", f"up to {MOST_LAYERS} layers are built")
    hidden = keys.count("embedding_length")
    heads = keys.count_of_layers("attention.head_count", layers)
    head_dim = keys.count("attention.key_length", hidden // heads)
    kv_heads = keys.count_of_layers("attention.head_count_kv", layers, heads)
    if heads % kv_heads:
        raise keys.file.fault(f"{heads} query heads do not divide over {kv_heads} kv heads")
    # As GGUF has it, even where another length of keys is stated.
    if (value_dim := keys.count("attention.value_length", hidden // heads)) != head_dim:
        told = f"keys have {head_dim} elements, values {value_dim}; values of another size are not built in"
        keys.fail("attention.value_length", told)
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise keys.file.fault(f"tokenizer.ggml.tokens is {shown(tokens)}; a list is needed")
    stated = keys.count("vocab_size", len(tokens) or None)
    return Shape(
        layers=layers,
        hidden=hidden,
        feed_forward=keys.count_of_layers("feed_forward_length", layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=len(tokens) or stated,
        context=(context := keys.count("context_length")),
        longest=context,
        epsilon=keys.number("attention.layer_norm_rms_epsilon"),
    )


def read_rotation(keys: Hyperparameters, shape: Shape, pairing: Pairing, truncate: bool = True) -> Rotation:
    """The rotary embedding of all layers; `pairing` and `truncate` are the architecture's, unless the file says.

    Defaults are llama.cpp's: scaling is linear unless another kind is stated, by a factor of 1.
    """
    scaling = keys.choice("rope.scaling.type", SCALINGS, "linear")
    dims = keys.count("rope.dimension_count", shape.head_dim)
    if dims > shape.head_dim or dims % 2:
        keys.fail("rope.dimension_count", f"an even count up to the head's {shape.head_dim} is needed")
    older = keys.number_or_none("rope.scale_linear")
    factor = keys.number_or_none("rope.scaling.factor") or older or 1.0
    original = keys.count("rope.scaling.original_context_length", shape.context)
    theta = keys.number("rope.freq_base", 10_000.0)
    if theta <= 1:
        keys.fail("rope.freq_base", "a number above 1 is needed")
    return Rotation(
        theta=theta,
        dims=dims,
        pairing=keys.file.pairing or pairing,
        # By a factor of 1 nothing is scaled.
        scaling="yarn" if scaling == "yarn" else "linear" if scaling == "linear" and factor != 1 else "none",
        factor=1.0 if scaling in ("none", "longrope") else factor,
        original_context=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
        truncate=keys.flag("rope.scaling.yarn_truncate", truncate),
    )

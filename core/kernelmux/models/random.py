"""Models without a file: a known shape with seeded random weights, for timing kernels and whole steps.

Enters: a name such as `llama-8b:Q4_K_M`. Leaves: a ModelFile that describes its weights, and a mapping that draws each
when it is asked for, on the device that will use it, and keeps none. Values have the spread that keeps activations
finite; text goes in byte by byte, and what comes out are tokens' numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.errors import ModelError, nearest
from kernelmux.graph.formats import INT4_WEIGHTS, Value, Weight, empty_planes, lookup, quantize_planes
from kernelmux.graph.ops.blocks import random_blocks, random_groups
from kernelmux.graph.ops.cases import FP8_WEIGHTS, WEIGHTS, brought_weights
from kernelmux.models.byte_level import BYTES
from kernelmux.models.gguf import ModelFile
from kernelmux.models.targets import NARROW

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """What a llama's `config.json` states."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    context: int = 131_072
    theta: float = 500_000.0


SHAPES: Mapping[str, Sizes] = {
    "tiny": Sizes(2, 256, 512, 4, 2, 512, tied=True, context=2048),
    "smollm2-135m": Sizes(30, 576, 1536, 9, 3, 49_152, tied=True, context=8192, theta=100_000.0),
    "llama-1b": Sizes(16, 2048, 8192, 32, 8, 128_256, tied=True),
    "llama-8b": Sizes(32, 4096, 14_336, 32, 8, 128_256),
    "llama-70b": Sizes(80, 8192, 28_672, 64, 8, 128_256),
}

MIXED = "Q4_K_M"
"""llama.cpp's mixture: Q4_K, with Q6_K where errors cost most."""

PRODUCTS_ALONE = (*FP8_WEIGHTS, *INT4_WEIGHTS)
"""Formats of core's that no table is stored in."""
STORED = (*dict.fromkeys((*WEIGHTS, *INT4_WEIGHTS)), MIXED)
"""What the matrices of a random model may be stored as, beside formats that backends bring; its norms are f32."""

SHORTER: Mapping[str, str] = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", **NARROW}
"""What is stored where a row is no multiple of 256; llama.cpp makes IQ4_NL of Q2_K and Q3_K, as large as Q4_0."""


def random_file(asked: str, option: str = "--random") -> ModelFile:
    """The model `SHAPE:FORMAT`, its weights without their planes; ModelError names the option, the nearest spelling."""
    shape, _, stored = asked.partition(":")
    if shape not in SHAPES:
        raise ModelError(f"{option} {asked}: unknown shape {shape!r}{nearest(shape, SHAPES)}")
    known = {name.lower(): name for name in dict.fromkeys((*STORED, *brought_weights()))}
    if stored.lower() not in known:
        raise ModelError(f"{option} {asked}: unknown format {stored!r}{nearest(stored, known.values())}")
    sizes, stored = SHAPES[shape], known[stored.lower()]
    if stored != MIXED and stored not in SHORTER and (fault := lookup(stored).check((sizes.hidden,))):
        raise ModelError(f"{option} {asked}: {fault}; ask for another format, or another shape")
    weights = {
        name: Weight(name, extents, stored_as(name, extents, stored, sizes), ())
        for name, extents in _tensors(sizes).items()
    }
    return ModelFile(Path(f"random:{shape}:{stored}"), _metadata(f"{shape} {stored}", sizes), weights)


class RandomWeights(Mapping[str, Weight]):
    """Weights on a torch device, drawn whenever one is looked up: the same each time, and not kept."""

    def __init__(self, described: Mapping[str, Weight], device: str) -> None:
        self._described = described
        self._device = device

    def __getitem__(self, name: str) -> Weight:
        import torch

        weight = self._described[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if len(weight.shape) > 1:
            return replace(
                weight, planes=random_planes(weight.format, weight.shape, generator, weight.shape[-1] ** -0.5)
            )
        noise = torch.randn(weight.shape, generator=generator, device=self._device)
        return replace(weight, planes=((1 + 0.1 * noise).to(lookup(weight.format).dtype),))

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)


def random_planes(
    format: str, shape: tuple[int, ...], generator: torch.Generator, spread: float
) -> tuple[torch.Tensor, ...]:
    """Planes of a tensor whose values lie about zero with standard deviation `spread`, where the generator is."""
    import torch

    stored = lookup(format)
    if stored.draw is not None:
        return stored.draw(shape, generator)
    if format in INT4_WEIGHTS or (stored.gguf is not None and not stored.plain):
        return _centred(format, shape, generator, spread / _unit_spread(format))
    drawn_as = stored.dtype if stored.plain else torch.float32
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=drawn_as).mul_(spread)
    if stored.plain:
        return (values,)
    planes = empty_planes(Value("", shape, format), str(generator.device))
    quantize_planes(format, values, planes)
    return planes


@cache
def _unit_spread(format: str) -> float:
    """The standard deviation of centred random blocks whose largest scale is 1, measured."""
    import torch

    shape = (256, 256)
    planes = _centred(format, shape, torch.Generator().manual_seed(0), 1.0)
    return float(Weight(format, shape, format, planes).dequantize().std())


def _centred(
    format: str, shape: tuple[int, ...], generator: torch.Generator, largest: float
) -> tuple[torch.Tensor, ...]:
    """Random planes of a format of groups or blocks about zero, of scales up to `largest`."""
    if format in INT4_WEIGHTS:
        return random_groups(format, shape, generator, largest, centred=True)
    return (random_blocks(format, shape, generator, largest, centred=True),)


def stored_as(name: str, extents: tuple[int, ...], stored: str, sizes: Sizes) -> str:
    """The format of one tensor of a model stored as `stored`.

    Formats for products alone leave embeddings and logits in bf16, as folders of such weights do.
    """
    if len(extents) == 1:
        return "f32"
    if name in ("token_embd.weight", "output.weight") and stored in (*PRODUCTS_ALONE, *brought_weights()):
        return "bf16"
    if stored == MIXED:
        stored = "Q6_K" if _is_delicate(name, sizes) else "Q4_K"
    return SHORTER[stored] if stored in SHORTER and extents[-1] % lookup(stored).block else stored


def _is_delicate(name: str, sizes: Sizes) -> bool:
    """Whether llama.cpp gives a tensor of Q4_K_M more bits: `use_more_bits` in its src/llama-quant.cpp."""
    if name == ("token_embd.weight" if sizes.tied else "output.weight"):
        return True
    _, _, rest = name.partition("blk.")
    number, _, part = rest.partition(".")
    if part not in ("attn_v.weight", "ffn_down.weight"):
        return False
    layer, eighth = int(number), sizes.layers // 8
    return layer < eighth or layer >= 7 * sizes.layers // 8 or (layer - eighth) % 3 == 2


def _tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and extents."""
    hidden, wide = sizes.hidden, sizes.feed_forward
    narrow = hidden // sizes.heads * sizes.kv_heads
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (narrow, hidden),
        "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (sizes.vocab, hidden), "output_norm.weight": (hidden,)}
    if not sizes.tied:
        tensors["output.weight"] = (sizes.vocab, hidden)
    for number in range(sizes.layers):
        tensors |= {f"blk.{number}.{name}.weight": extents for name, extents in layer.items()}
    return tensors


def _metadata(name: str, sizes: Sizes) -> dict[str, Any]:
    """What a GGUF file of these sizes states, and a vocabulary of the 256 bytes, then numbers."""
    return {
        "general.architecture": "llama",
        "general.name": f"random {name}",
        "llama.block_count": sizes.layers,
        "llama.context_length": sizes.context,
        "llama.embedding_length": sizes.hidden,
        "llama.feed_forward_length": sizes.feed_forward,
        "llama.attention.head_count": sizes.heads,
        "llama.attention.head_count_kv": sizes.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": sizes.theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*BYTES, *(f"<{number}>" for number in range(len(BYTES), sizes.vocab))],
        "tokenizer.ggml.merges": [],
    }

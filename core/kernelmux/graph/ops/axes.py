"""The axes that ops' domains share: what real models have, and the spreads of values that break kernels.

Head counts, widths and bases are those of Llama 2 to 3.2, Qwen 2 to 3, Mistral, Gemma, Phi, SmolLM, StarCoder and GLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from kernelmux.graph.formats import lookup
from kernelmux.graph.ops.cases import Case
from kernelmux.graph.ops.domain import Extent, Point

ROWS = Extent(1, 512, known=(48, 200), counts=(1,))
"""Rows of a step: a decoded batch, a chunk of a prompt."""
COLUMNS = Extent(1, 28_672, known=(576, 2560, 3584, 5120, 7168, 14_336, 20_480))
"""Columns of rows that are normed, gated or added."""
STORED_COLUMNS = replace(COLUMNS, counts=(1,))
"""Of rows that are stored or looked up in formats of blocks: each border is tried with each size of block."""
INPUTS = Extent(1, 16_384, known=(576, 1536, 14_336))
"""Inputs of a linear layer."""
FUSED_INPUTS = Extent(1, 8192, known=(576,), counts=(1,))
"""Of several at once, or of one and what follows: the borders of mul_mat's blocks are that op's to try."""
OUTPUTS = Extent(1, 8192, known=(576, 1536), counts=(1,), plain=32)
"""Its outputs; a vocabulary's are a case of their own."""
CONTEXT = Extent(1, 131_072, counts=(1,))
"""Positions of a sequence."""

HEADS = (
    *((1, 1), (9, 3), (4, 4), (8, 1), (14, 2), (28, 4), (32, 8), (40, 8), (64, 8), (64, 4), (48, 1), (64, 1)),
    *((32, 32), (48, 8), (96, 8), (128, 8)),
)
"""Query heads and kv heads."""
FEW_HEADS = ((1, 1), (9, 3), (4, 4), (8, 1), (28, 4), (64, 8))
KV_HEADS = (1, 2, 3, 8, 32)
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
CACHES = ("f32", "bf16", "f16", "fp8_row")
PAGE_SIZES = (16, 1, 24, 32, 64, 256)
THETAS = (1e4, 1e5, 5e5, 1e6)

STORED: Mapping[str, tuple[Any, ...]] = {"stored": ("f32", "bf16", "f16")}
"""How activations are stored."""
SPREADS = ("noise", "outliers", "denormals", "equal", "uneven", "zeros", "zero-row")
"""Of any op's inputs."""
LOUD = ("outliers", "loud", "large")
"""Spreads of which float16 may not hold the results."""


def fits_f16(point: Point) -> bool:
    """Whether float16, if activations are stored so, holds the results, and they do not vanish."""
    return point["stored"] != "f16" or point["values"] not in (*LOUD, "far-below-zero")


def as_stored(case: Case, format: str) -> Case:
    """The case with activations, inputs and outputs that are left open, in that format."""
    return replace(
        case,
        inputs=tuple(v.stored(format) if v.convertible and v.format == "f32" else v for v in case.inputs),
        format=format,
    )


@cache
def block(format: str) -> int:
    """Columns that a weight format keeps together."""
    return lookup(format).block


def on_blocks(k: int, *formats: str) -> bool:
    """Whether `k` columns, or those but one, are whole blocks of these formats: one more means one block more."""
    widest = max(map(block, formats))
    return k == 1 or (k >= widest and k % widest in (0, 1))


def whole_blocks(k: int, *formats: str) -> int:
    """`k`, up to whole blocks of these formats."""
    widest = max(map(block, formats))
    return -(-k // widest) * widest

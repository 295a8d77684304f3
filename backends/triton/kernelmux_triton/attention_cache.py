"""What the attention kernels share: the formats that they take, the bounds that follow, how pages are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import triton
import triton.language as tl

from kernelmux.formats import as_tuple, lookup
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Planes

FLOATS = ("f32", "bf16", "f16")
CACHES = (*FLOATS, "fp8_row")
"""Formats of the cache; of fp8_row products are made in bfloat16."""
WIDEST = 256
"""Columns of a head at most."""
LOG2E = tl.constexpr(1.4426950408889634)


class Cached(Kernel):
    """Attention over a cache of one format; f32 is multiplied in full, else weights are rounded to two bytes."""

    precision: ClassVar[float] = 1e-5

    def __init__(self, cache_format: str) -> None:
        self.scaled = cache_format == "fp8_row"
        self.multiplied = "bf16" if self.scaled else cache_format
        """The format that queries and keys are multiplied in."""
        self.itemsize = lookup(cache_format).dtype.itemsize
        if cache_format == "f32":
            self.precision = 1e-9  # type: ignore[misc]

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        rest = [name for name in FLOATS if name != self.multiplied]
        return [[self.multiplied, *rest], *([value.format] for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [FLOATS]

    def splits_queries(self, node: TensorNode) -> bool:
        """Whether queries hold more than the format of the products: they are multiplied in two parts then."""
        return node.inputs[0].format != self.multiplied


def planes_of(cache: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache's numbers and their scales; where it has none, the numbers again, which nobody reads as scales."""
    data, *scales = as_tuple(cache)
    return data, scales[0] if scales else data


def pow2(extent: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(extent))


def wide_of(node: TensorNode) -> int:
    """Columns of a tile of heads: a power of two, and no fewer than a product takes; e4m3 is multiplied in halves."""
    return max(32 if node.inputs[1].format == "fp8_row" else 16, pow2(node.head_dim))


@triton.jit
def pages_of(table, start, end, PAGE: tl.constexpr, TILE: tl.constexpr):
    """The page of each of TILE positions from `start`: one number where a page holds whole tiles."""
    if PAGE % TILE == 0:
        pages = tl.load(table + start // PAGE, mask=start < end, other=0)
    else:
        position = start + tl.arange(0, TILE)
        pages = tl.load(table + position // PAGE, mask=position < end, other=0)
    return pages


@triton.jit
def parts(numbers, KIND: tl.constexpr):
    """Numbers rounded to KIND, and what they have beyond it."""
    high = numbers.to(KIND)
    return high, (numbers.to(tl.float32) - high.to(tl.float32)).to(KIND)


@triton.jit
def score(high, low, keys, LOW: tl.constexpr):
    """Products of queries [rows, dim] and keys [positions, dim]; with LOW also of what queries have beyond `high`."""
    scores = tl.dot(high, tl.trans(keys), input_precision="ieee")
    if LOW:
        scores += tl.dot(low, tl.trans(keys), input_precision="ieee")
    return scores

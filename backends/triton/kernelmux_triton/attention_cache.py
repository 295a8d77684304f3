"""What the attention kernels share: formats and the bounds that follow, the lookup of pages, one tile's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import triton
import triton.language as tl

from kernelmux.contract import Declined, Kernel, Tensors
from kernelmux.graph.formats import lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_triton.e4m3 import BACK, UP, halves
from kernelmux_triton.rows import FLOATS, planes

CACHES = (*FLOATS, "fp8_row")
"""Formats of the cache; of fp8_row products are made in bfloat16."""
WIDEST = 256
"""Columns of a head at most."""
LOG2E = tl.constexpr(1.4426950408889634)


class Cached(Kernel):
    """Attention over a cache of one format; f32 is multiplied in full, else weights are rounded to two bytes."""

    ops = ("attention",)
    precision: ClassVar[float] = 1e-5
    packed = "f32"
    takes: Mapping[str, object] = {"cache_format": CACHES[1:], "head_dim": f"..{WIDEST}"}
    output_formats = FLOATS

    def refuses(self, node: TensorNode) -> Declined | None:
        k_format, v_format = node.inputs[1].format, node.inputs[2].format
        if v_format != k_format:
            return Declined(f"it reads keys and values of one format, not {k_format}, {v_format}", "format")
        if k_format == "fp8_row" and node.head_dim % 2:
            return Declined(f"it reads e4m3 in pairs, and heads of {node.head_dim} have an odd one", "alignment")
        return None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        rest = [name for name in FLOATS if name != multiplied(node)]
        return [[multiplied(node), *rest], *([value.format] for value in node.inputs[1:])]

    @staticmethod
    def caches(node: TensorNode, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """Keys, their scales, values, theirs; e4m3 as pairs. Where there are no scales nobody reads them."""
        (keys, k_scales, _), (values, v_scales, _) = (planes(cache) for cache in tensors.inputs[1:3])
        if scaled(node):
            keys, values = keys.view(torch.int16), values.view(torch.int16)
        return keys, k_scales, values, v_scales

    @staticmethod
    def sinks(node: TensorNode, tensors: Tensors) -> tuple[torch.Tensor, bool]:
        """One number a head, and whether there are any; nobody reads them where there are none."""
        return (*tensors.packed, tensors.inputs[0])[0], bool(node.weight)


def scaled(node: TensorNode) -> bool:
    """Whether the cache has scales."""
    return node.inputs[1].format == "fp8_row"


def multiplied(node: TensorNode) -> str:
    """The format that queries and keys are multiplied in."""
    return "bf16" if scaled(node) else node.inputs[1].format


def itemsize(node: TensorNode) -> int:
    """Bytes of a number of the cache."""
    return lookup(node.inputs[1].format).dtype.itemsize


def splits_queries(node: TensorNode) -> bool:
    """Whether queries hold more than the format of the products: they are multiplied in two parts then."""
    return node.inputs[0].format != multiplied(node)


def pow2(extent: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(extent))


def wide_of(node: TensorNode) -> int:
    """Columns of a tile of heads: a power of two, and no fewer than a product takes; e4m3 is multiplied in halves."""
    return max(32 if scaled(node) else 16, pow2(node.head_dim))


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
def first_seen(sees, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that rows see whose sight ends at `sees`, by their window and their chunk."""
    first = sees * 0
    if WINDOW > 0:
        first = tl.maximum(sees - WINDOW, 0)
    if CHUNK > 0:
        first = tl.maximum(first, tl.maximum(sees - 1, 0) // CHUNK * CHUNK)
    return first


@triton.jit
def split_queries(queries, KIND: tl.constexpr, SCALED: tl.constexpr):
    """Queries rounded to KIND and what they have beyond it, of all columns; where SCALED of the even and the odd ones.

    A cache of e4m3 is read in pairs of columns, which are multiplied apart (e4m3.py). Unless SCALED both are the same.
    """
    if SCALED:
        pairs = tl.reshape(queries.to(tl.float32) * UP, [queries.shape[0], queries.shape[1] // 2, 2])
        even, odd = tl.split(pairs)
    else:
        even, odd = queries, queries
    return _parts(even, KIND), _parts(odd, KIND)


@triton.jit
def _parts(numbers, KIND: tl.constexpr):
    high = numbers.to(KIND)
    return high, (numbers.to(tl.float32) - high.to(tl.float32)).to(KIND)


@triton.jit
def nothing_seen(TALL: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr):
    """What `add_values` adds to: the largest scores, the sums of weights, the weighted values, even and odd ones."""
    columns: tl.constexpr = WIDE // 2 if SCALED else WIDE
    peak, total = tl.full([TALL], float("-inf"), tl.float32), tl.zeros([TALL], tl.float32)
    sums = tl.zeros([TALL, columns], tl.float32)
    return peak, total, sums, tl.zeros([TALL, columns if SCALED else 1], tl.float32)


@triton.jit
def score(
    queries, keys, scales, at, valid, SCALED: tl.constexpr, LOW: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """Products of queries and a tile of keys; with LOW also of what queries of another type have beyond the cache's."""
    of_all, of_odd = queries
    if SCALED:
        even, odd = halves(keys, ASSEMBLED)
        scores = _product(of_all, even, LOW) + _product(of_odd, odd, LOW)
        scores *= tl.load(scales + at, mask=valid, other=0.0)[None, :] * BACK
    else:
        scores = _product(of_all, keys, LOW)
    return scores


@triton.jit
def _product(queries, keys, LOW: tl.constexpr):
    high, low = queries
    scores = tl.dot(high, tl.trans(keys), input_precision="ieee")
    if LOW:
        scores += tl.dot(low, tl.trans(keys), input_precision="ieee")
    return scores


@triton.jit
def capped(scores, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Scores scaled, and pressed softly below CAP unless that is 0."""
    scores *= SCALE
    if CAP > 0:
        scores = CAP - 2 * CAP / (tl.exp(2 / CAP * scores) + 1)
    return scores


@triton.jit
def fade(peak, scores, FACTOR: tl.constexpr, MASKED: tl.constexpr):
    """The largest scores with these, what is left of weights until now, and these weights.

    `peak`, and scores times FACTOR, are exponents of two.
    """
    higher = tl.maximum(peak, tl.max(scores, axis=1) * FACTOR)
    # Finite where a row has seen nothing yet.
    level = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    return higher, tl.exp2(peak - level), tl.exp2(scores * FACTOR - level[:, None])


@triton.jit
def add_values(
    sums, odd_sums, faded, each, values, scales, at, valid, SCALED: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """The weighted values, faded, with a tile more."""
    if SCALED:
        each *= tl.load(scales + at, mask=valid, other=0.0)[None, :] * UP
        even, odd = halves(values, ASSEMBLED)
        sums = tl.dot(each.to(even.dtype), even, sums * faded[:, None])
        odd_sums = tl.dot(each.to(odd.dtype), odd, odd_sums * faded[:, None])
    else:
        sums = tl.dot(each.to(values.dtype), values, sums * faded[:, None], input_precision="ieee")
    return sums, odd_sums


@triton.jit
def with_sink(peak, total, sinks, head, there, SINKS: tl.constexpr):
    """The sum of weights with the weight of the head's sink, if it has one and something was seen.

    `peak` is the largest score, times log2(e).
    """
    if SINKS:
        sink = tl.load(sinks + head, mask=there, other=0.0) * LOG2E
        total += tl.where(peak == float("-inf"), 0.0, tl.exp2(sink - peak))
    return total


@triton.jit
def joined(sums, odd_sums, SCALED: tl.constexpr):
    """The weighted values, even and odd columns beside each other again."""
    if SCALED:
        sums = tl.reshape(tl.join(sums, odd_sums), [sums.shape[0], 2 * sums.shape[1]]) * BACK
    return sums

"""What the attention kernels share: which formats of queries and cache they take, and the bounds that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import triton

from kernelmux.formats import as_tuple, lookup
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Kernel, Planes

FLOATS = ("f32", "bf16", "f16")
CACHES = (*FLOATS, "fp8_row")
"""Formats of the cache; of fp8_row products are made in bfloat16."""
WIDEST = 256
"""Columns of a head at most."""


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

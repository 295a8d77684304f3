"""A case's numbers: seeded noise, what the case draws itself, and weights as random valid blocks of their format."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from kernelmux.graph.formats import INT4_WEIGHTS, Value, Weight, empty_planes, lookup, quantize_planes
from kernelmux.graph.graph import Builder, Graph
from kernelmux.graph.ops import Case
from kernelmux.graph.ops.blocks import random_blocks, random_groups
from kernelmux.graph.ops.spreads import Kept

T = TypeVar("T")
DrawnInput = tuple[Value, tuple[torch.Tensor, ...]]
"""An input as the case states it, and its planes."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A case ready to run: a graph of one node, its inputs' planes and its weights."""

    graph: Graph
    inputs: Mapping[str, tuple[torch.Tensor, ...]]
    weights: Mapping[str, Weight]
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made of these numbers, once for all kernels that ask for it by that key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    @property
    def planes(self) -> list[DrawnInput]:
        """The node's inputs in order: each value as the case states it, with its planes."""
        (node,) = self.graph.ops
        return [(value, self.inputs[value.name]) for value in node.inputs]


class LastDrawn:
    """The numbers of one case, for all kernels that run it in a row."""

    def __init__(self) -> None:
        self._last: tuple[Case, Drawn] | None = None

    def draw(self, case: Case) -> Drawn:
        """`draw_case`, unless it was this case the time before."""
        if self._last is None or self._last[0] is not case:
            # Before others take memory.
            self._last = None
            self._last = case, draw_case(case)
        return self._last[1]

    def forget(self) -> None:
        """The next kernel's are drawn anew: a kernel that fails may have written to these."""
        self._last = None


def draw_case(case: Case) -> Drawn:
    """The case's graph and numbers; the same in every process, as the seed is made from the case's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    builder = Builder(case.name, case.format)
    inputs, weights = {}, {}
    for value in case.inputs:
        builder.leaf(value.name, value.shape, value.format, role="state")
        own = case.draw.get(value.name)
        if isinstance(own, Kept):
            inputs[value.name] = own.planes
        else:
            drawn = own(generator) if own else torch.randn(value.extents, generator=generator)
            inputs[value.name] = _quantized(value, drawn)
    for place in ("weight", "bias", "gamma"):
        for value in case.fields.get(place, ()):
            builder.leaf(value.name, value.shape, value.format)
            weights[value.name] = Weight(value.name, value.extents, value.format, _draw_weight(case, value, generator))
    outputs = builder.node(case.op, case.op, *case.inputs, **case.fields)
    return Drawn(builder.build(*outputs), inputs, weights)


def _quantized(value: Value, drawn: torch.Tensor) -> tuple[torch.Tensor, ...]:
    planes = empty_planes(value)
    quantize_planes(value.format, drawn, planes)
    return planes


def _draw_weight(case: Case, value: Value, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    format = lookup(value.format)
    if (own := case.draw.get(value.name)) is not None:
        return own.planes if isinstance(own, Kept) else (own(generator).to(format.dtype),)
    if format.draw is not None:
        return format.draw(value.extents, generator)
    if value.format in INT4_WEIGHTS:
        return random_groups(value.format, value.extents, generator)
    if format.gguf is None:
        return _quantized(value, _uneven_blocks(value.extents, generator))
    if format.plain:
        return (torch.randn(value.extents, generator=generator).to(format.dtype),)
    return (random_blocks(value.format, value.extents, generator),)


def _uneven_blocks(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """[n, k] of noise whose rows, and blocks of 128 by 128, differ in size: so do their scales, and none may move."""
    n, k = shape
    rows = 2.0 ** torch.randint(-2, 3, (n, 1), generator=generator)
    blocks = 2.0 ** torch.randint(-2, 3, (-(-n // 128), -(-k // 128)), generator=generator)
    spread = blocks.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return torch.randn(n, k, generator=generator) * rows * spread

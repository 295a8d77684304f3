"""GGUF's blocks of 4 and 8 bits, and 4-bit groups, in planes that a Triton program loads side by side.

Enters: a weight's blocks [n, bytes], uint8, or its planes. Leaves: planes, as few_rows_kernels.py states them: integers
(nibbles [n, k/2] uint8 or [n, k] int8), scales [n, k/32], of Q4_K also pairs [n, k/256]; of groups scales and zero
points [n, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelmux.graph.formats import ALL, INT4_WEIGHTS, lookup, torch_dtype
from kernelmux.graph.groups import integers

Shapes = Sequence[tuple[int, torch.dtype]]


@dataclass(frozen=True)
class Planes:
    """A format's planes: for each the columns of the weight that one item stands for, and its dtype."""

    weight: str
    """What the kernels call it."""
    items: Shapes
    split: Callable[..., tuple[Tensor, ...]]
    """The format's planes to these; where it has blocks, of [n, blocks, bytes]."""

    def shapes(self, n: int, k: int) -> list[tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each plane of a weight [n, k]."""
        return [((n, 1 if columns == ALL else k // columns), dtype) for columns, dtype in self.items]


def pack(format: str, *stored: Tensor) -> tuple[Tensor, ...]:
    """The planes of a weight's own planes [n, bytes and more], where they lie."""
    size = lookup(format).planes[0].items
    blocks = [stored[0].view(len(stored[0]), -1, size)] if len(stored) == 1 else stored
    return tuple(part.contiguous() for part in PLANES[format].split(*blocks))


def _words(fields: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [n, blocks, bytes of one item] as items [n, blocks]: copied, for they may start at an odd byte."""
    return fields.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)


def _simple(scale: torch.dtype, integers: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Of Q4_0, Q4_1 and Q8_0: one item of scales before the integers, which are in the kernels' order."""
    size = scale.itemsize

    def split(blocks: Tensor) -> tuple[Tensor, ...]:
        return blocks[..., size:].contiguous().view(integers).flatten(1), _words(blocks[..., :size], scale)

    return split


def _split_q4_k(blocks: Tensor) -> tuple[Tensor, ...]:
    """Of 256 columns: a pair of float16, 12 bytes of 6-bit scales and minima, and four times 32 bytes of nibbles.

    Of these the low nibbles are 32 columns and the high ones the next 32.
    """
    n, count, _ = blocks.shape
    pairs, packed, nibbles = blocks.split([4, 12, 128], dim=-1)
    first, second, rest = packed.split(4, dim=-1)
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], dim=-1)
    minima = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], dim=-1)
    together = torch.stack([scales, minima], dim=-1).contiguous().view(torch.int16)
    groups = nibbles.reshape(n, count, 4, 1, 32)
    q = torch.cat([groups & 15, groups >> 4], dim=-2)
    halves = q[..., :16] | q[..., 16:] << 4
    return halves.reshape(n, -1), together.reshape(n, -1), _words(pairs, torch.int32)


def _split_groups(data: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
    """Neighbours share a byte in the file, columns 16 apart in the kernels' order."""
    q = integers(data).view(len(data), -1, 2, 16)
    return (q[:, :, 0] | q[:, :, 1] << 4).flatten(1), scales, zeros


NIBBLES = (2, torch.uint8)
"""Of weights of 4 bits: columns of a stored number, and its dtype."""


def _groups(group: int, scales: torch.dtype) -> Planes:
    return Planes(f"int4_{group or 'row'}", (NIBBLES, (group, scales), (group, torch.uint8)), _split_groups)


_OF_INT4 = {name: lookup(name).planes[1] for name in INT4_WEIGHTS}
PLANES = {
    "Q4_0": Planes("q4_0", (NIBBLES, (32, torch.float16)), _simple(torch.float16, torch.uint8)),
    "Q4_1": Planes("q4_1", (NIBBLES, (32, torch.int32)), _simple(torch.int32, torch.uint8)),
    "Q8_0": Planes("q8_0", ((1, torch.int8), (32, torch.float16)), _simple(torch.float16, torch.int8)),
    "Q4_K": Planes("q4_k", (NIBBLES, (32, torch.int16), (256, torch.int32)), _split_q4_k),
    **{name: _groups(plane.cols, torch_dtype(plane.dtype)) for name, plane in _OF_INT4.items()},
}
"""The formats that can be packed."""

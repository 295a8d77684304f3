"""How weights lie in memory for this backend, and what makes them so.

Panels of as many outputs as a vector has lanes, so that each lane sums an output of its own. Along the inputs a
quantised panel is blocks of 32: first the integers of all blocks, then the scales and the minima of all. An integer is
cut into its low four bits and the rest:

    low four bits   for each 8 inputs a vector: input 8 v + b is the low half of byte b of a lane, 8 v + 4 + b the high
    the fifth       one vector: bit t of byte b of a lane is that of input 4 t + b
    fifth, sixth    two vectors: bits 2 t and 2 t + 1 of the first are those of input 4 t + b, of the second 16 + 4 t + b
    eight bits      for each 4 inputs a vector

Enters: a `Weight` [n, k]. Leaves: one tensor of bytes, [panels, bytes of a panel].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kernelmux.contract.weights import row_ranges
from kernelmux.errors import BackendError
from kernelmux.graph.dequantize import levels_of
from kernelmux.graph.formats import Weight, lookup, planes_of_rows
from kernelmux_numba.target import Target

BLOCK = 32
"""Inputs of a block."""
HALF_MAX = 65504
"""The largest float16."""


@dataclass(frozen=True)
class Packing:
    """How a weight format is held: w = scale * (integer - centre) + minimum, each `group` inputs having their own."""

    bits: int
    group: int
    minimum: bool
    centre: int
    signed: bool = False
    """Whether eight bits are held as int8: where products of bytes need no unsigned ones."""

    @property
    def parts(self) -> int:
        """Groups of a block."""
        return BLOCK // self.group

    def integer_bytes(self, lanes: int) -> int:
        """Of a block of a panel."""
        return BLOCK * lanes * self.bits // 8

    def scale_bytes(self, lanes: int) -> int:
        """Of a block of a panel, minima among them: float16."""
        return 2 * lanes * self.parts * (2 if self.minimum else 1)

    def panel_bytes(self, lanes: int, k: int) -> int:
        """A whole number of cache lines."""
        return -(-k // BLOCK * (self.integer_bytes(lanes) + self.scale_bytes(lanes)) // 64) * 64


PACKINGS: Mapping[str, Packing] = {
    "Q4_0": Packing(4, 32, False, 8),
    "Q4_1": Packing(4, 32, True, 0),
    "Q5_0": Packing(5, 32, False, 16),
    "Q5_1": Packing(5, 32, True, 0),
    "Q8_0": Packing(8, 32, False, 128),
    "Q4_K": Packing(4, 32, True, 0),
    "Q5_K": Packing(5, 32, True, 0),
    "Q6_K": Packing(6, 16, False, 32),
}


def packing_of(format: str, target: Target) -> Packing:
    """How that format is held for a target."""
    packing = PACKINGS[format]
    if packing.bits == 8 and target.dot != "vnni":
        return Packing(8, packing.group, packing.minimum, 0, signed=True)
    return packing


def panel_count(n: int, target: Target) -> int:
    """Panels of so many outputs."""
    return -(-n // target.lanes)


def packed_bytes(format: str, n: int, k: int, target: Target) -> int:
    """Bytes of a packed weight [n, k]."""
    return panel_count(n, target) * packing_of(format, target).panel_bytes(target.lanes, k)


def packed(weight: Weight, target: Target) -> torch.Tensor:
    """A weight [n, k] in panels, made some rows at a time: uint8 [panels, bytes of a panel]."""
    n, k = weight.shape
    packing = packing_of(weight.format, target)
    whole = torch.zeros(panel_count(n, target), packing.panel_bytes(target.lanes, k), dtype=torch.uint8)
    for rows in row_ranges(n, k, target.lanes, 2**20):
        panels = whole[rows.start // target.lanes : panel_count(rows.stop, target)]
        _fill(panels, weight.format, planes_of_rows(weight.format, weight.planes, rows)[0], k, target)
    return whole


def _fill(panels: torch.Tensor, format: str, blocks: torch.Tensor, k: int, target: Target) -> None:
    """Writes the panels of some rows of a weight, whose blocks are [rows, bytes]."""
    lanes, packing, count = target.lanes, packing_of(format, target), k // BLOCK
    levels = levels_of(format, blocks.view(-1, lookup(format).planes[0].items))
    integers = levels.integers.view(torch.uint8).view(len(blocks), count, BLOCK)
    if packing.bits == 8 and not packing.signed:
        integers = integers ^ 128
    fields = [levels.steps, *([-levels.least] if levels.least is not None else [])]
    scales = torch.stack([field.reshape(len(blocks), count, packing.parts) for field in fields], dim=2)
    if bool((scales.abs() > HALF_MAX).any()):
        raise BackendError(f"a weight in {format} has scales beyond {HALF_MAX}, which float16 does not hold")
    short = len(panels) * lanes - len(blocks)
    integers, scales = (
        torch.nn.functional.pad(part, (0, 0) * (part.dim() - 1) + (0, short)) for part in (integers, scales)
    )
    # [panels, blocks, vectors, lanes, 4]: of each vector a lane's four bytes are inputs beside each other.
    vectors = integers.view(len(panels), lanes, count, 8, 4).permute(0, 2, 3, 1, 4)
    stored = torch.cat([part.flatten(2) for part in _bits(vectors, packing.bits)], dim=2).flatten(1)
    panels[:, : stored.shape[1]] = stored
    # [panels, blocks, scale or minimum, part, lanes].
    halves = scales.view(len(panels), lanes, count, -1).permute(0, 2, 3, 1).to(torch.float16).contiguous()
    panels[:, stored.shape[1] :][:, : halves[0].nbytes] = halves.view(len(panels), -1).view(torch.uint8)


def _bits(vectors: torch.Tensor, bits: int) -> Sequence[torch.Tensor]:
    """Integers [panels, blocks, 8, lanes, 4], a byte each, as the parts above: [panels, blocks, vectors, lanes, 4]."""
    if bits == 8:
        return [vectors]
    low = vectors & 15
    parts = [low[:, :, 0::2] | low[:, :, 1::2] << 4]
    if bits == 5:
        parts.append(_gathered(vectors >> 4, 1))
    if bits == 6:
        parts += [_gathered(vectors[:, :, half : half + 4] >> 4, 2) for half in (0, 4)]
    return parts


def _gathered(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """One vector of fields of so many bits of each of several, the first lowest."""
    whole = torch.zeros_like(vectors[:, :, :1])
    for number in range(vectors.shape[2]):
        whole |= vectors[:, :, number : number + 1] << bits * number
    return whole


def panels_of(weight: Weight, target: Target) -> torch.Tensor:
    """A weight [n, k] in plain numbers in panels: [panels, bytes of a panel], of each input the lanes' numbers."""
    n, k = weight.shape
    numbers = weight.planes[0].view(n, k)
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, panel_count(n, target) * target.lanes - n))
    return padded.view(-1, target.lanes, k).mT.contiguous().flatten(1).view(torch.uint8)

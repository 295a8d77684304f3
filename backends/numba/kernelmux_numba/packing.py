"""How weights lie in memory for this backend, and what makes them so.

Panels of as many outputs as a vector has lanes, so that each lane sums an output of its own. Along the inputs a
quantised panel is blocks of 32: first the integers of all blocks, then the scales and the minima of all. These are
float16; or, as K-quants have them, bytes, followed by what one of them is worth in each superblock of eight blocks.
An integer is cut into its low four bits and the rest:

    low four bits   for each 8 inputs a vector: input 8 v + b is the low half of byte b of a lane, 8 v + 4 + b the high
    the fifth       one vector: bit t of byte b of a lane is that of input 4 t + b
    fifth, sixth    two vectors: bits 2 t, 2 t + 1 of the first are those of input 4 t + b, of the second 16 + 4 t + b
    eight bits      for each 4 inputs a vector

Enters: a `Weight` [n, k]. Leaves: one tensor of bytes, [panels, bytes of a panel].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernelmux.errors import BackendError
from kernelmux.graph.formats import Weight
from kernelmux_numba.target import Target
from kernelmux_numba.team import Program, piece, shares

BLOCK = 32
"""Inputs of a block."""
SUPERBLOCK = 8
"""Blocks of a superblock."""


@dataclass(frozen=True)
class Packing:
    """How a weight format is held: w = scale * (integer - centre) + minimum, each `group` inputs having their own."""

    bits: int
    group: int
    minimum: bool
    centre: int
    steps: bool = False
    """Whether scales and minima are bytes, in steps of each superblock."""
    signed: bool = False
    """Whether eight bits are held as int8: where no products want them without a sign."""

    @property
    def parts(self) -> int:
        """Groups of a block."""
        return BLOCK // self.group

    @property
    def fields(self) -> int:
        """Scales and minima of a block."""
        return self.parts * (2 if self.minimum else 1)

    def integer_bytes(self, lanes: int) -> int:
        """Of a block of a panel."""
        return BLOCK * lanes * self.bits // 8

    def scale_bytes(self, lanes: int) -> int:
        """Of a block of a panel, minima among them."""
        return lanes * self.fields * (1 if self.steps else 2)

    def step_bytes(self, lanes: int) -> int:
        """Of a superblock of a panel: float16, of scales and of minima."""
        return 2 * lanes * (2 if self.minimum else 1) if self.steps else 0

    def steps_at(self, lanes: int, blocks: int) -> int:
        """Where in a panel of so many blocks the steps begin."""
        return blocks * (self.integer_bytes(lanes) + self.scale_bytes(lanes))

    def panel_bytes(self, lanes: int, k: int) -> int:
        """A whole number of cache lines."""
        steps = k // BLOCK // SUPERBLOCK * self.step_bytes(lanes)
        return -(-(self.steps_at(lanes, k // BLOCK) + steps) // 64) * 64


PACKINGS: Mapping[str, Packing] = {
    "Q4_0": Packing(4, 32, False, 8),
    "Q4_1": Packing(4, 32, True, 0),
    "Q5_0": Packing(5, 32, False, 16),
    "Q5_1": Packing(5, 32, True, 0),
    "Q8_0": Packing(8, 32, False, 128),
    "Q4_K": Packing(4, 32, True, 0, steps=True),
    "Q5_K": Packing(5, 32, True, 0, steps=True),
    "Q6_K": Packing(6, 16, False, 32, steps=True),
}


def packing_of(format: str, target: Target) -> Packing:
    """How that format is held for a target."""
    packing = PACKINGS[format]
    if packing.bits == 8 and target.dot == "pairs":
        return Packing(8, packing.group, packing.minimum, 0, signed=True)
    return packing


def panel_count(n: int, lanes: int) -> int:
    """Panels of so many outputs."""
    return -(-n // lanes)


def panels_at_once(target: Target) -> int:
    """Quantised panels that are multiplied together: two share what is loaded of activations where that is apart."""
    return 1 if target.dot == "fours" else 2


def packed_bytes(format: str, n: int, k: int, lanes: int) -> int:
    """Bytes of a packed weight [n, k]."""
    return panel_count(n, lanes) * PACKINGS[format].panel_bytes(lanes, k)


def packed(weight: Weight, target: Target) -> torch.Tensor:
    """A weight [n, k] in panels: uint8 [panels, bytes of a panel]. BackendError where a scale is no finite number."""
    n, k = weight.shape
    packing, (blocks,) = packing_of(weight.format, target), weight.planes
    count, size = panel_count(n, target.lanes), packing.panel_bytes(target.lanes, k)
    whole = torch.zeros(count, size, dtype=torch.uint8)
    each, parts = shares(count)
    words = (blocks, blocks.stride(0), n, k // BLOCK, whole, size, each)
    Program([[piece("packing:pack", target, (weight.format,), words, parts)]], target)()
    integers, steps = k // BLOCK * packing.integer_bytes(target.lanes), packing.steps_at(target.lanes, k // BLOCK)
    halves = whole[:, steps:] if packing.steps else whole[:, integers:steps]
    if not bool(halves.view(torch.float16).isfinite().all()):
        raise BackendError(f"{weight.name} has a scale that is infinite, or no number")
    return whole


def panels_of(weight: Weight, target: Target) -> torch.Tensor:
    """A weight [n, k] in plain numbers in panels: [panels, bytes of a panel], of each input the lanes' numbers."""
    n, k = weight.shape
    numbers = weight.planes[0].view(n, k)
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, panel_count(n, target.lanes) * target.lanes - n))
    return padded.view(-1, target.lanes, k).mT.contiguous().flatten(1).view(torch.uint8)

"""What the kernels of this backend share: they are bound to programs, which can be chained."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kernelmux.contract import Chain, Efficiency, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.loaded import address_of
from kernelmux_numba.target import Target, target_of
from kernelmux_numba.team import Phase, Piece, Program, chained

PARTS_A_THREAD = 4
"""Parts of a phase for each thread, at most: so that whoever is late has little left to do."""


class NumbaKernel(Kernel):
    """A kernel of phases of compiled functions."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    efficiency = Efficiency(reading=0.8, multiplying=0.5)
    chain = Chain(chained)

    @property
    def target(self) -> Target:
        """What it is compiled for."""
        return target_of(self.device)

    @abstractmethod
    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        """What a launch does, one phase after the other."""

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return Program(self.phases(node, tensors), self.target)

    def piece(
        self, made: str, constants: Sequence[Any], words: Sequence[torch.Tensor | float | None], parts: int
    ) -> Piece:
        """The function that `module:function` of `code` makes with these constants, and the words that it is given.

        Of a tensor a word is its address, 0 where there is none; a float is given by its bits.
        """
        given = torch.tensor([_word(value) for value in words], dtype=torch.int64)
        return Piece(address_of(made, self.target, *constants), given, parts)


def _word(value: torch.Tensor | float | None) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return int(bits)
    return int(value or 0)


def shares(count: int, least: int = 1) -> tuple[int, int]:
    """How many of `count` things a part has, `least` or more, and how many parts there are."""
    each = max(least, -(-count // (PARTS_A_THREAD * torch.get_num_threads())))
    return each, -(-count // each)

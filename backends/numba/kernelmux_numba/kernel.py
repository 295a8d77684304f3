"""What the kernels of this backend share: they are bound to programs, which can be chained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kernelmux.contract import Chain, Efficiency, Kernel, Launch, Tensors
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.target import Target, lanes_of, target_of
from kernelmux_numba.team import Phase, Piece, Program, chained, piece

ELEMENTS = 2**15
"""Numbers that are worth a part, where each is touched once: some microseconds."""


class NumbaKernel(Kernel):
    """A kernel of phases of compiled functions."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    efficiency = Efficiency(reading=0.8, multiplying=0.5)
    chain = Chain(chained)

    @property
    def lanes(self) -> int:
        """Numbers of 32 bits in a vector."""
        return lanes_of(self.device)

    @property
    def target(self) -> Target:
        """What it is compiled for, on this machine: nothing that is asked of a kernel depends on it."""
        return target_of(self.device)

    @abstractmethod
    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        """What a launch does, one phase after the other."""

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return Program(self.phases(node, tensors), self.target, tensors)

    def piece(
        self, made: str, constants: Sequence[Any], words: Sequence[torch.Tensor | float | None], parts: int
    ) -> Piece:
        """A piece of a phase, compiled for this kernel's target: see `team.piece`."""
        return piece(made, self.target, constants, words, parts)

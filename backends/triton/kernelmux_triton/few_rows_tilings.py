"""How programs of few rows may take a matrix: which tilings there are, for which form of weights and how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 4
"""Rows up to which float32 arithmetic keeps pace with memory."""
MOST_SPLITS = 16
BLOCK = 32
"""Columns that share a scale."""


@dataclass(frozen=True)
class Gemv:
    """Rows of W a program, bytes of each that it loads at once, loads under way, warps."""

    tall: int
    nbytes: int
    stages: int
    warps: int

    def __str__(self) -> str:
        return f"gemv {self.tall}x{self.nbytes} stages {self.stages} warps {self.warps}"

    def wide(self, k: int, most: int) -> int:
        """Columns at once, at most so many: all k, but so many that each thread has a block of 32 of its own.

        Threads that share one would store the same numbers to the same place of shared memory: a race, by its rules.
        """
        return min(most, max(1 << (k - 1).bit_length(), BLOCK * 32 * self.warps // self.tall))


@dataclass(frozen=True)
class Dot:
    """Rows of W a program, columns at once, loads under way, warps, programs for each multiprocessor."""

    tall: int
    wide: int
    stages: int
    warps: int
    programs: int

    def __str__(self) -> str:
        return f"dot {self.tall}x{self.wide} stages {self.stages} warps {self.warps} programs {self.programs}"

    def splits(self, rows: int, k: int, multiprocessors: int) -> tuple[int, int]:
        """How many programs share the columns of W's `rows` rows, and how many columns each has."""
        tiles = -(-rows // self.tall)
        wanted = min(MOST_SPLITS, self.programs * multiprocessors // tiles, k // (4 * self.wide))
        span = -(-k // (max(1, wanted) * self.wide)) * self.wide
        return -(-k // span), span


GEMV = (Gemv(8, 1024, 3, 4), Gemv(4, 1024, 4, 4), Gemv(16, 512, 4, 4), Gemv(4, 2048, 3, 4), Gemv(16, 1024, 3, 8))
DOT = (
    Dot(64, 128, 4, 4, 3),
    Dot(64, 128, 5, 4, 2),
    Dot(64, 256, 3, 4, 2),
    Dot(64, 256, 2, 4, 3),
    Dot(64, 128, 4, 4, 6),
    Dot(128, 128, 4, 8, 2),
)
Tiling = Gemv | Dot


@dataclass(frozen=True)
class Weights:
    """How the kernels read a form of weights and the activations beside it; names as in few_rows_kernels.py."""

    weight: str
    scaled: str = "no"
    fast: bool = True
    """Whether e4m3 products are summed as the tensor cores do by themselves."""

    @property
    def name(self) -> str:
        """What a shape is called by."""
        return self.weight if self.scaled == "no" else f"{self.weight} by fp8 {self.scaled}"

    def tilings(self, m: int) -> Sequence[Tiling]:
        """Those that take m rows, the one to try first in front."""
        if self.scaled != "no":
            return [tiling for tiling in DOT if self.scaled != "block" or tiling.wide == 128]
        return (*GEMV, DOT[0]) if m <= FEWEST else DOT

"""How the DP4A kernel's work is spread over a card: warps, ring, rows; what it is compiled with follows from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernelmux_cupy.pack import ROWS, TILED, lane_bytes, tile_blocks

ROW_COUNTS = (1, 2, 4, 8, 16)
"""Rows of activations that the kernel is compiled for; it takes fewer."""
RESERVED = 1024
"""Bytes of shared memory that each block costs beside its own."""
MATRIX_ROWS = 4
"""Rows of activations from which the matrix unit is the faster one."""
BANKS = 128
"""Bytes of shared memory that are read and written at once."""
MOST_STAGES = 2


@dataclass(frozen=True)
class Card:
    """What a card has: multiprocessors, and bytes of shared memory of each and of one block at most."""

    multiprocessors: int
    shared: int
    shared_per_block: int
    ampere: bool = True
    """Compute capability 8.0: it copies to shared memory behind the threads' back, and multiplies int8 matrices of
    16 x 32 by 32 x 8."""


H100 = Card(132, 228 * 1024, 227 * 1024)


@dataclass(frozen=True)
class Tuning:
    """A choice for one launch.

    `warps` of a block share a group's columns; `groups` of 32 rows (1 or 2) share activations; a warp has `stages`
    tiles under way; `chunk` blocks of columns are held in registers at once; `resident` blocks a multiprocessor.
    `loop`: no more blocks than run at once, each with several sets of rows, so that its ring never empties. `matrix`:
    products by the matrix unit, not by `__dp4a`.
    """

    warps: int
    stages: int
    groups: int
    chunk: int
    resident: int
    loop: bool = True
    matrix: bool = False


@dataclass(frozen=True)
class Shape:
    """One launch's work: matrices of these formats with k columns, a pair of them for one output where `gated`."""

    formats: tuple[str, ...]
    n: tuple[int, ...]
    k: int
    m: int
    gated: bool = False

    @property
    def rows(self) -> int:
        """Rows that the kernel is compiled for."""
        return next(count for count in ROW_COUNTS if count >= self.m)

    @property
    def tiles(self) -> int:
        """Tiles along k."""
        return self.k // (32 * tile_blocks(self.k))

    @property
    def several(self) -> bool:
        """Whether it has several outputs."""
        return len(self.formats) > 1 and not self.gated

    def tiles_at_once(self, groups: int) -> int:
        """Tiles of weights in a slot."""
        return 2 if self.gated else groups

    def sets(self, groups: int) -> int:
        """Sets of groups that blocks take."""
        matrices = self.n[:1] if self.gated else self.n
        return sum(-(-n // (ROWS * groups)) for n in matrices)

    def slot(self, groups: int) -> int:
        """Bytes of one stage: the tiles of the largest format, and the rows' activations beside them."""
        tiles = [ROWS * lane_bytes(format, self.k) for format in self.formats]
        # An odd number of 16 bytes: eight rows of activations meet in no bank of shared memory.
        staged = (-(-40 * tile_blocks(self.k) // 16) | 1) * 16
        held = (sum(tiles) if self.gated else groups * max(tiles)) + self.rows * staged
        # Slots that begin amid the banks would cost an eighth of the speed.
        return -(-held // BANKS) * BANKS

    def shared(self, tuning: Tuning) -> int:
        """Bytes of shared memory of a block."""
        sums = self.tiles_at_once(tuning.groups) * self.rows
        places = 1 if sums > 2 else 2
        pitch = ROWS + 4 if tuning.matrix else ROWS
        return tuning.warps * (tuning.stages * self.slot(tuning.groups) + 4 * pitch * sums * places)

    def grid(self, tuning: Tuning, card: Card) -> int:
        """Blocks: one for each set, or as many as run at once."""
        sets = self.sets(tuning.groups)
        return min(sets, card.multiprocessors * tuning.resident) if tuning.loop else sets

    def defines(self, tuning: Tuning, outputs: Sequence[str], residual: str) -> dict[str, int | str]:
        """The kernel's macros: `outputs` and `residual` are names of formats."""
        return {
            "PARTS": len(self.formats),
            "GATED": int(self.gated),
            "BLOCKS": tile_blocks(self.k),
            "CHUNK": tuning.chunk,
            "WARPS": tuning.warps,
            "GROUPS": tuning.groups,
            "STAGES": tuning.stages,
            "SLOT": self.slot(tuning.groups),
            "ROWS": self.rows,
            "RESIDENT": tuning.resident,
            "MATRIX": int(tuning.matrix),
            "RESIDUAL": residual,
            **{f"FORMAT{index}": format for index, format in enumerate(self.formats)},
            **{f"OUT{index}": output for index, output in enumerate(outputs)},
        }


def tune(shape: Shape, card: Card) -> Tuning:
    """The choice for a shape: what `variants` of tests/bench/cupy_cuda.py says of an H100, and what fits the card."""
    matrix = shape.rows >= MATRIX_ROWS and card.ampere
    # By dp4a activations are read for every row of weights that a lane has: two rows halve that.
    wide = shape.rows >= 4 and not matrix and not shape.gated and shape.sets(2) >= card.multiprocessors
    groups = 2 if wide else 1
    sums = shape.rows * shape.tiles_at_once(groups)
    # One block with all of the shared memory, but two where a second set would leave most of the card waiting, and for
    # several matrices, since a ring runs empty between them.
    crowded = card.multiprocessors < shape.sets(groups) <= 2 * card.multiprocessors
    crowded = crowded and sums <= (8 if shape.several else 4)
    for resident in (2, 1) if crowded else (1,):
        limit = min(card.shared // resident - RESERVED, card.shared_per_block)
        # 65,536 registers: 128 each for 512 threads.
        most = 8 if sums > (8 if resident == 1 else 2) or shape.gated else 16
        chunk = _chunk(shape, groups, matrix, resident)
        while most:
            warps = _even(shape.tiles, most)
            for stages in range(_most_stages(card, matrix, warps), 0, -1):
                tuning = Tuning(warps, stages, groups, chunk, resident, matrix=matrix)
                # Two blocks are for shapes, and cards, that have room for as many tiles in each as in one; and for
                # several matrices.
                enough = resident == 1 or shape.several or warps * stages >= min(16, shape.tiles)
                if shape.shared(tuning) <= limit and enough:
                    return tuning
            most //= 2
    raise AssertionError(f"{shape} does not fit {card}")


def _most_stages(card: Card, matrix: bool, warps: int) -> int:
    if not card.ampere:
        return 1
    return max(1, 16 // warps) if matrix else MOST_STAGES


def _chunk(shape: Shape, groups: int, matrix: bool, resident: int) -> int:
    """Blocks of columns at once: the more, the more loads from shared memory are on their way; registers end it."""
    tiles = shape.tiles_at_once(groups)
    if matrix and shape.several and resident == 2:
        return 1
    if not matrix and shape.rows <= 2:
        tiles, most = 1, 8
    else:
        most = 32 // shape.rows if matrix else 2 * tiles if shape.rows * tiles < 8 else 1
    wide = any(TILED[format].bits > (4 if matrix else 6) for format in shape.formats)
    return min(tile_blocks(shape.k), max(1, most // tiles // (2 if wide else 1) // resident))


def _even(tiles: int, most: int) -> int:
    """Warps, `most` or fewer but more than half, that leave the fewest idle in the last turn."""
    counts = range(min(tiles, most), min(tiles, most) // 2, -1)
    return min(counts, key=lambda count: -(-tiles // count) * count - tiles)

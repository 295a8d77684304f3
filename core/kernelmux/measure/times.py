"""Times of kernels that were measured, and what they say of sizes and row counts that were not.

Enters: kernels with their nodes, what a table holds. Leaves: microseconds, and the size that they are from. A table has
them by family (op, kernel), size (`4096x14336x5.0`: outputs, inputs and bits of a weight; heads; columns) and rows.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import lookup
from kernelmux.graph.graph import TensorNode

Times = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Microseconds by family, size and rows: `{"mul_mat dp4a": {"4096x14336x5.0": {"1": 9.0, "8": 16.6}}}`."""
Size = tuple[float, ...]


@dataclass(frozen=True)
class Known:
    """What times say of a node: microseconds, and how they are known."""

    us: float
    other_size: str = ""
    """The size that they are from, where it is another."""
    rows: int = 0
    """The row count that they are of, where fewer or more are asked for than were measured."""

    @property
    def doubt(self) -> tuple[bool, bool]:
        """The less, the better they are known."""
        return bool(self.other_size), bool(self.rows)


def family(kernel: Kernel, node: TensorNode) -> str:
    """What times are compared within: nodes of one op and kernel, with one kind of cache, or of conversion."""
    words = [node.op, kernel.name]
    if node.op == "attention":
        words += [f"head {node.head_dim}", node.inputs[1].format]
    elif node.op == "convert":
        source, target = node.inputs[0].format, node.outputs[0].format
        # What quantises is timed with whatever floats it is given.
        words.append(f"{'f32' if lookup(source).plain and not lookup(target).plain else source} to {target}")
    return " ".join(words)


def size(kernel: Kernel, node: TensorNode, context: int) -> Size:
    """What a node's time grows with beside rows: outputs, inputs and packed bits of its weights; heads and context;
    or columns.

    How the file stores a weight does not show where a kernel packs it otherwise. `context` are the cached tokens of
    each sequence that decodes.
    """
    matrices = [value for value in node.weight if len(value.shape) == 2]
    if matrices and node.op != "embed":
        n, k = sum(value.extents[0] for value in matrices), matrices[0].extents[1]
        nbytes = kernel.packed_bytes(node) or sum(value.nbytes for value in matrices)
        return n, k, round(8 * nbytes / (n * k), 1)
    if node.op == "attention":
        return node.num_heads, node.num_kv_heads, context
    return (sum(value.extents[1] for value in (*node.inputs, *node.outputs) if len(value.shape) == 2),)


def look_up(times: Times, kernel: Kernel, node: TensorNode, rows: int, context: int) -> Known | None:
    """How long a node takes at so many rows; None where its kernel was not measured.

    Of another size in proportion, of rows between two that were measured by a power of them; beyond all as long as at
    the nearest. A size of which such row counts were measured tells more than a nearer one of which they were not.
    """
    measured = times.get(family(kernel, node), {})
    if not measured:
        return None
    wanted = size(kernel, node, context)
    sizes = {_parse(written): written for written in measured}
    nearest = min(sizes, key=lambda other: (_is_beyond(measured[sizes[other]], rows), _distance(wanted, other), other))
    by_rows = measured[sizes[nearest]]
    least, most = _bounds(tuple(by_rows))
    edge = min(max(rows, least), most)
    us = _growth(node, wanted) / _growth(node, nearest) * _at(by_rows, edge)
    return Known(us, "" if nearest == wanted else sizes[nearest], 0 if edge == rows else edge)


def _growth(node: TensorNode, size: Size) -> float:
    """What a node's time is in proportion to; attention computes by its heads, and reads by those of its cache."""
    if node.op == "attention":
        heads, kv_heads, context = size
        return math.sqrt(heads * kv_heads) * context
    return math.prod(size)


def _is_beyond(by_rows: Mapping[str, float], rows: int) -> bool:
    """Whether fewer or more rows are asked for than were measured."""
    least, most = _bounds(tuple(by_rows))
    return not least <= rows <= most


@cache
def _bounds(by_rows: tuple[str, ...]) -> tuple[int, int]:
    return min(map(int, by_rows)), max(map(int, by_rows))


def written(size: Size) -> str:
    """As a table has it."""
    return "x".join(map(str, size))


@cache
def _parse(written: str) -> Size:
    return tuple(float(part) for part in written.split("x"))


def _distance(one: Size, other: Size) -> float:
    return sum(abs(math.log(mine / theirs)) for mine, theirs in zip(one, other, strict=True))


def _at(by_rows: Mapping[str, float], rows: int) -> float:
    """Interpolated in the logarithms, of rows that are not beyond all that were measured."""
    known = sorted((int(count), us) for count, us in by_rows.items())
    place = bisect.bisect_left(known, (rows, 0.0))
    high, above = known[place]
    if high == rows:
        return above
    low, below = known[place - 1]
    share = math.log(rows / low) / math.log(high / low)
    return float(below ** (1 - share) * above**share)

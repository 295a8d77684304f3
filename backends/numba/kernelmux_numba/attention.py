"""attention: the keys of a few queries in pieces that several threads share, those of many by tiles of both.

How work is cut follows from what the sequences hold and from nothing else, so that results do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kernelmux.contract import Declined, Efficiency, Tensors
from kernelmux.graph.formats import CACHE_FORMATS, as_tuple, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.kernel import NumbaKernel
from kernelmux_numba.target import Target
from kernelmux_numba.team import Phase, shares

QUERIES = 64
"""Queries of one kv head that are a tile: rows by the query heads that read it."""
PIECE = 128
"""Keys of a piece, at least; the keys of one row, or of one tile of queries, are cut into pieces."""
PIECES = 32
"""Pieces of a sequence, at most."""
ROWS = 64
"""Rows of a step by pieces of each, at most: its workspace."""


@dataclass(frozen=True)
class Shape:
    """What attention is compiled for."""

    format: str
    """Of the cache."""
    heads: int
    kv_heads: int
    dim: int
    scale: float
    soft_cap: float
    output: str
    """The format of what it writes."""

    @property
    def group(self) -> int:
        """Query heads that read one kv head."""
        return self.heads // self.kv_heads

    @property
    def whole_rows(self) -> bool:
        """Whether blocks of the output span heads, so that a row is written when all its heads are known."""
        return self.dim % lookup(self.output).block != 0

    def few(self, target: Target) -> int:
        """Queries up to which a vector is better filled with columns than with queries."""
        return target.lanes + target.lanes // 2

    def found_floats(self, lanes: int) -> int:
        """Of what is found in a piece for one query: its sums, in whole vectors, the maximum and the sum of powers."""
        return -(-self.dim // lanes) * lanes + lanes


class Attention(NumbaKernel):
    """Sums and powers in float32, whatever the cache is stored as."""

    ops = ("attention",)
    name = "f32"
    precision = 1e-10
    takes: Mapping[str, object] = {"cache_format": CACHE_FORMATS}
    efficiency = Efficiency(reading=0.5, multiplying=0.5)

    def refuses(self, node: TensorNode) -> Declined | None:
        keys, values = node.inputs[1].format, node.inputs[2].format
        if keys != values:
            return Declined(f"it reads keys and values of one format, not {keys}, {values}", "format")
        if node.chunk:
            return Declined("it reads no chunks apart", "unsupported")
        return Declined("it has no sinks", "unsupported") if node.weight else None

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [("f32",), *((value.format,) for value in node.inputs[1:])]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        blocked = lookup("q8_32").check((node.num_heads * node.head_dim,)) is None
        return [("f32", "bf16", "q8_32") if blocked else ("f32", "bf16")]

    def workspace(self, node: TensorNode) -> int:
        return 4 * sum(self._sizes(node))

    def phases(self, node: TensorNode, tensors: Tensors) -> Sequence[Phase]:
        q, keys, values, starts, lengths, table = tensors.inputs
        shape, (found, row) = self._shape(node), self._sizes(node)
        (keys, *key_scales), (values, *value_scales) = as_tuple(keys), as_tuple(values)
        (y, *y_rest) = as_tuple(tensors.outputs[0])
        m, seqs, page_size = len(q), len(lengths), keys.shape[1]
        pieces = most_pieces(m)
        scratch = tensors.workspace.view(torch.float32) if tensors.workspace is not None else None
        whole = scratch[found:] if scratch is not None and row else None
        units = (m * shape.group // QUERIES + seqs) * shape.kv_heads * pieces
        _, parts = shares(units)
        words = (
            *(q, keys, *(key_scales or [None]), values, *(value_scales or [None]), starts, lengths, table),
            *(seqs, m, table.shape[1], page_size, node.window or 0),
            *(y, *(y_rest or [None, None]), scratch, pieces, whole),
        )
        phases = [[self.piece("attention:attend", (shape,), (*words, parts), parts)]]
        if pieces > 1 or row:
            items = m if row else m * shape.heads
            each, parts = shares(items, max(1, 2**15 * items // max(1, found + row)))
            phases.append([self.piece("attention:gather", (shape,), (*words, each), parts)])
        return phases

    def _shape(self, node: TensorNode) -> Shape:
        cap = float(node.soft_cap or 0.0)
        heads = (node.num_heads, node.num_kv_heads, node.head_dim)
        return Shape(node.inputs[1].format, *heads, float(node.scale), cap, node.outputs[0].format)

    def _sizes(self, node: TensorNode) -> tuple[int, int]:
        """Floats of what is found in pieces, and of rows that are not yet in blocks."""
        shape, (m, columns) = self._shape(node), node.inputs[0].extents
        # Of fewer rows more pieces are kept: as many floats for any number of rows.
        return ROWS * shape.heads * shape.found_floats(self.lanes), m * columns if shape.whole_rows else 0


def most_pieces(rows: int) -> int:
    """Pieces that a sequence's keys are cut into where a step has so many rows: many rows are work for all threads.

    Neither how many sequences these are of nor how long they may be is known before a step is bound.
    """
    return max(1, min(PIECES, ROWS // rows))

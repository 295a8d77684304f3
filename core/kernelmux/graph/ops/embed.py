"""embed: rows of a table by id: token embeddings, and the rows of a step whose logits are wanted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.graph.formats import BLOCK_WEIGHTS, SUPERBLOCK_WEIGHTS, Value, lookup
from kernelmux.graph.ops.axes import ROWS, STORED, STORED_COLUMNS, as_stored, block, on_blocks, whole_blocks
from kernelmux.graph.ops.blocks import TinyBlocks
from kernelmux.graph.ops.cases import PLAIN_WEIGHTS, ROW_COUNTS, Case, all_weights
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.op import Op, Operands, row_count
from kernelmux.graph.ops.spreads import Draw, Listed

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


VOCABULARY = Extent(1, 151_936, known=(32_000, 49_152, 128_256), counts=(1,))
"""Rows of a table."""


class Embed(Op):
    """y[i] = table[ids[i]].

    Axes: m ids, k columns.
    Inputs: ids [m], i32, each a row of the table; the table, either the weight [rows, k] or a second input [rows, k].
    Outputs: y [m, k].
    Numerics: exact, but for the rounding to y's format.
    """

    name = "embed"
    inputs = ("ids", "table")
    outputs = ("y",)
    optional_inputs = 1
    optional = ("weight",)
    tables = (1,)
    told = {
        "m": row_count,
        "k": lambda node: (*node.inputs, *node.weight)[1].shape[1],
        "table_format": lambda node: (*node.inputs, *node.weight)[1].format,
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        ids, *tables = (*node.inputs, *node.weight)
        self.require(len(ids.shape) == 1, node, f"ids must be [m], {ids.name} is {ids.shape}")
        self.require(len(tables) == 1, node, f"one table is needed, weight or second input; {len(tables)} were given")
        (table,) = tables
        self.require(ids.format == "i32", node, f"ids must be i32, {ids.name} is {ids.format}")
        self.require(len(ids.shape) == 1, node, f"ids must be [m], {ids.name} is {ids.shape}")
        self.require(len(table.shape) == 2, node, f"the table must be [rows, k], {table.name} is {table.shape}")
        return (self.output(node, 0, (ids.shape[0], table.shape[1]), format),)

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        ids, table = (*operands.inputs, *operands.weight)
        return (table[ids.long()],)

    def flops(self, node: TensorNode) -> int:
        return 0

    def ids_below(self, node: TensorNode) -> int:
        return (*node.inputs, *node.weight)[1].extents[0]

    def unread(self, node: TensorNode) -> int:
        table = (*node.inputs, *node.weight)[1]
        return table.nbytes - lookup(table.format).nbytes((node.inputs[0].extents[0], table.extents[1]))

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            m, rows, format = point["m"], point["rows"], point["format"]
            k = whole_blocks(point["k"], format)
            made = self._case(label, m, k, format, rows, as_input=point["as_input"])
            # The last row and the first are always among them.
            source = random.Random(m)
            ids = [rows - 1, 0, *(source.randrange(rows) for _ in range(m))][:m]
            draw: dict[str, Draw] = {"ids": Listed(ids)}
            if point["tiny"]:
                draw["table"] = TinyBlocks(Value("table", (rows, k), format))
            return as_stored(replace(made, draw=draw), point["stored"])

        def holds(point: Point) -> bool:
            format = point["format"]
            sound = not point["as_input"] or (format == "f32" and not point["tiny"])
            blocks = format in (*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS)
            return sound and (blocks or not point["tiny"]) and on_blocks(point["k"], format)

        return Domain(
            case,
            {"format": all_weights(), **STORED, "as_input": (False, True), "tiny": (False, True)},
            {"m": ROWS, "k": STORED_COLUMNS, "rows": VOCABULARY},
            work=lambda point: (point["rows"] + 2 * point["m"]) * whole_blocks(point["k"], point["format"]),
            holds=holds,
            groups={"block": ("k", "format", block)},
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            for format in all_weights() if m in (1, 2, 17, 64, 200) else ("f32", "Q8_0", "Q4_K"):
                yield self._case(f"{format}-m{m}-k512", m, 512, format)
            yield self._case(f"rows-m{m}", m, 64, as_input=True)
        for format in (*PLAIN_WEIGHTS, *BLOCK_WEIGHTS):
            yield from (self._case(f"{format}-m5-k{k}", 5, k, format) for k in (576, 32))
        for format in PLAIN_WEIGHTS:
            yield from (self._case(f"{format}-m3-k{k}", 3, k, format) for k in (1, 127))
        for format in (*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS):
            case = self._case(f"{format}-tiny-scales", 5, 512, format)
            (weight,) = case.fields["weight"]
            yield replace(case, draw={**case.draw, "table": TinyBlocks(weight)})
        # More rows than 16 bits count.
        for format in ("f32", "Q8_0"):
            yield self._case(f"{format}-far", 3, 32, format, rows=70_000, ids=(65_535, 65_536, 69_999))
        yield self._case("bf16-vocabulary", 4, 8, "bf16", rows=262_144, ids=(0, 199_999, 200_000, 262_143))
        for format in ("f32", "Q8_0", "Q4_K"):
            yield self._case(f"{format}-ends", 5, 256, format, ids=(0, 299, 0, 299, 1))
        yield self._case("rows-ends", 3, 64, as_input=True, ids=(299, 0, 299))

    def _case(
        self,
        label: str,
        m: int,
        k: int,
        format: str = "f32",
        rows: int = 300,
        ids: Sequence[int] = (),
        as_input: bool = False,
    ) -> Case:
        """`ids`: which rows, random ones unless given; `as_input`: the table is the second input, not a weight."""
        import torch

        def draw(generator: torch.Generator) -> torch.Tensor:
            if ids:
                return torch.tensor(ids, dtype=torch.int32)
            return torch.randint(rows, (m,), generator=generator, dtype=torch.int32)

        asked, table, drawn = Value("ids", (m,), "i32"), Value("table", (rows, k), format), {"ids": draw}
        if as_input:
            return self.make_case(label, [asked, table], draw=drawn)
        return self.make_case(label, [asked], {"weight": (table,)}, drawn, weights=rows * k)

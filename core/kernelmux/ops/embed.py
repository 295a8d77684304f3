"""embed: rows of a table by id: token embeddings, and the rows of a step whose logits are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelmux.formats import Value
from kernelmux.ops.op import WEIGHTS, Case, Op, Operands, marks

if TYPE_CHECKING:
    import torch

    from kernelmux.graph import TensorNode


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

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        ids, *tables = (*node.inputs, *node.weight)
        self.require(len(ids.shape) == 1, node, f"ids must be [m], {ids.name} is {ids.shape}")
        self.require(len(tables) == 1, node, f"one table is needed, weight or second input; {len(tables)} were given")
        (table,) = tables
        self.require(ids.format == "i32", node, f"ids must be i32, {ids.name} is {ids.format}")
        self.require(len(ids.shape) == 1, node, f"ids must be [m], {ids.name} is {ids.shape}")
        self.require(len(table.shape) == 2, node, f"the table must be [rows, k], {table.name} is {table.shape}")
        return (self.output(node, 0, (ids.shape[0], table.shape[1]), format),)

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        table = (*node.inputs, *node.weight)[1]
        return {"m": node.inputs[0].shape[0], "k": table.shape[1], "table_format": table.format}

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        ids, table = (*operands.inputs, *operands.weight)
        return (table[ids.long()],)

    def flops(self, node: TensorNode) -> int:
        return 0

    def cases(self) -> Iterator[Case]:
        import torch

        rows = 300
        for m in (1, 2, 17, 64, 200):
            draw = {"ids": lambda generator, m=m: torch.randint(rows, (m,), generator=generator, dtype=torch.int32)}
            ids = Value("ids", (m,), "i32")
            for format in WEIGHTS:
                fields = {"weight": (Value("weight", (rows, 512), format),)}
                yield Case(f"embed-{format}-m{m}-k512", self.name, (ids,), fields, draw, marks=marks(m))
            yield Case(f"embed-rows-m{m}", self.name, (ids, Value("table", (rows, 64))), {}, draw, marks=marks(m))
        far = {"ids": lambda generator: torch.tensor([65_535, 65_536, 69_999], dtype=torch.int32)}
        fields = {"weight": (Value("weight", (70_000, 32), "f32"),)}
        yield Case("embed-f32-far", self.name, (Value("ids", (3,), "i32"),), fields, far)
        ends = {"ids": lambda generator: torch.tensor([0, rows - 1, 0, rows - 1, 1], dtype=torch.int32)}
        for format in ("f32", "Q8_0", "Q4_K"):
            fields = {"weight": (Value("weight", (rows, 256), format),)}
            yield Case(f"embed-{format}-ends", self.name, (Value("ids", (5,), "i32"),), fields, ends, marks=marks(5))

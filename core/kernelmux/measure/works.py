"""Which nodes to time: those of a known model at some row counts, with sequences as a step would have them.

Enters: a graph, row counts, a context. Leaves: nodes without symbols, the step state that goes with them, and what each
must compute and move at least. Nothing is allocated or launched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from kernelmux.contract.answers import stored
from kernelmux.contract.kernel import Kernel
from kernelmux.errors import KernelmuxError, nearest
from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.graph import PAGE_SIZE, Graph, TensorNode, make_node, nameless
from kernelmux.graph.ops import OPS, fused_ops
from kernelmux.graph.rewrite import find_fusions

PROMPT = 128
"""Rows from which a step is one sequence's prompt; fewer are decoded by a sequence each."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length: `rows` new rows each, of `length` cached tokens, these included."""

    sequences: int
    rows: int
    length: int

    @staticmethod
    def of(m: int, context: int) -> Batch:
        """m rows: a prompt of m tokens, or m sequences that decode at `context`."""
        return Batch(1, m, m) if m >= PROMPT else Batch(m, 1, context)

    @property
    def pages(self) -> int:
        """Pages of each sequence."""
        return -(-self.length // PAGE_SIZE)

    @property
    def dims(self) -> Mapping[str, int]:
        """The extents of a graph's symbols."""
        m, pages = self.sequences * self.rows, self.sequences * self.pages
        return {
            **{"m": m, "outs": m, "seqs": self.sequences, "seqs+1": self.sequences + 1},
            **{"width": self.pages, "pages": pages, "page_size": PAGE_SIZE},
        }

    def state(self) -> Mapping[str, list[int]]:
        """The step state by name, flat; `tokens` and `logit_rows` are whatever rows their table has."""
        firsts = [sequence * self.pages * PAGE_SIZE for sequence in range(self.sequences)]
        positions = range(self.length - self.rows, self.length)
        return {
            "positions": [position for _ in firsts for position in positions],
            "slots": [first + position for first in firsts for position in positions],
            "query_start": list(range(0, self.sequences * self.rows + 1, self.rows)),
            "kv_len": [self.length] * self.sequences,
            "block_table": list(range(self.sequences * self.pages)),
        }


@dataclass(frozen=True)
class Work:
    """A node to time, its extents known, with the sequences that its step state describes."""

    label: str
    node: TensorNode
    batch: Batch

    @property
    def m(self) -> int:
        return self.node.inputs[0].extents[0]

    @cached_property
    def flops(self) -> int:
        """As the op counts them; of attention only what a causal mask leaves."""
        if self.node.op != "attention":
            return self.node.contract.flops(self.node)
        rows, length = self.batch.rows, self.batch.length
        seen = rows * length - rows * (rows - 1) // 2
        return 4 * self.node.num_heads * self.node.head_dim * seen * self.batch.sequences

    def nbytes(self, node: TensorNode) -> int:
        """Bytes of every operand, once; `node` has them as a kernel stores them. Of tables and caches the rows used."""
        updated = {node.inputs[source].name for source, _ in node.contract.updates}
        updated |= {node.outputs[target].name for _, target in node.contract.updates}
        total = sum(value.nbytes for value in (*node.inputs, *node.weights, *node.outputs) if value.name not in updated)
        for _, target in node.contract.updates:
            cache = node.outputs[target]
            total += lookup(cache.format).nbytes((self.m, *cache.extents[2:]))
        return total - node.contract.unread(node)


def stored_as(node: TensorNode, kernel: Kernel, activations: str) -> TensorNode:
    """The node in formats that the kernel declares: caches and ids as they are, all else as `activations` if it can."""

    def wanted(place: str, value: Value) -> str:
        return activations if value.convertible else value.format

    return stored(node, kernel, wanted)


def work_of(node: TensorNode, m: int, context: int) -> Work:
    """A graph's node at m rows, its sequences of `context` cached tokens where they decode."""
    batch = Batch.of(m, context)
    resolved = node.resolve(batch.dims)
    return Work(_label(resolved, batch), resolved, batch)


def model_works(graph: Graph, ops: Iterable[str], m: int, context: int) -> Iterator[Work]:
    """One work for each kind of node that a graph has of the ops, fused ones too, at m rows."""
    batch, asked = Batch.of(m, context), list(ops)
    for op in asked:
        if op not in OPS:
            raise KernelmuxError(f"--op {op}: unknown op{nearest(op, OPS)}")
    fusions = find_fusions(graph, [op for op in fused_ops() if op.name in asked])
    seen = set()
    for node in (*graph.ops, *(fusion.node for fusion in fusions)):
        resolved = node.resolve(batch.dims)
        kind = nameless(resolved)
        if node.op in asked and kind not in seen:
            seen.add(kind)
            yield Work(_label(resolved, batch), resolved, batch)
    if "convert" in asked:
        yield from _conversions(graph, batch)


def matrix_work(n: int, k: int, format: str, m: int) -> Work:
    """A mul_mat of m rows, n outputs and k inputs, its weight stored as `format`."""
    name = f"{n}x{k} {lookup(format).name}"
    node = make_node("mul_mat", "mul_mat", Value("x", (m, k)), weight=(Value(name, (n, k), lookup(format).name),))
    return Work(name, node, Batch.of(m, 1))


def convert_work(k: int, format: str, m: int) -> Work:
    """A convert of m rows and k columns to `format`, from whatever floats its kernel is given."""
    node = make_node("convert", "convert", Value("x", (m, k)), format=lookup(format).name)
    return Work(f"{k} to {format}", node, Batch.of(m, 1))


def _conversions(graph: Graph, batch: Batch) -> Iterator[Work]:
    """From floats to what the inputs of fast mul_mats are, for every width that the graph multiplies."""
    m = batch.dims["m"]
    for k in sorted({node.weight[0].extents[1] for node in graph.ops if node.op == "mul_mat"}):
        for format in ("fp8_tensor", "fp8_row", "fp8_block", "q8_32"):
            if lookup(format).check((m, k)) is None:
                yield convert_work(k, format, m)


def _label(node: TensorNode, batch: Batch) -> str:
    """`ffn_down 4096x14336 Q6_K`: the node without its layer, and what sets its cost."""
    name = re.sub(r"^blk\.\d+\.", "", node.name).removesuffix(".weight")
    if node.op == "attention":
        return f"{name} {batch.sequences} x {batch.rows} rows at {batch.length}"
    if not node.weight:
        return f"{name} {'x'.join(str(extent) for extent in node.inputs[0].extents)}"
    parts = [f"{'x'.join(str(extent) for extent in value.extents)} {value.format}" for value in node.weight]
    return f"{name} {' + '.join(parts)}"

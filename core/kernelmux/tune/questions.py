"""What a plan's choice depends on: every kernel that may run a node, at every row count, and the conversions between.

Enters: a graph, a selector, row counts. Leaves: questions, those first that weigh most in a step. Nothing is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions
from kernelmux.measure.table import Tables, package_of
from kernelmux.measure.times import family, size, written
from kernelmux.measure.works import PROMPT, Work, work_of
from kernelmux.plan.selection import Selector
from kernelmux.policy.grammar import AUTO

HOPELESS = 10.0
"""Kernels that are predicted to take so many times as long as the fastest are not measured."""


@dataclass(frozen=True)
class Question:
    """How long one kernel takes for one work."""

    work: Work
    kernel: str
    package: str
    """Where the kernel is from, whose table the answer goes to."""
    family: str
    """What the table knows it by, with the size and the rows."""
    size: str
    weight: float
    """Microseconds of a step that the fastest kernel is predicted to take for all nodes of this kind."""
    variants: bool = False
    """Whether the kernel has several at this work."""
    known: bool = False
    """Whether it was measured on such a card, though not on this machine."""
    alone: bool = False
    """Whether no other kernel is in question for the work."""

    @property
    def subject(self) -> str:
        """What is left out where a kernel fails: `mul_mat torch:int4`."""
        return f"{self.work.node.op} {self.kernel}"


def find_questions(
    graph: Graph, selector: Selector, counts: Sequence[int], tables: Tables, context: int
) -> list[Question]:
    """All that is not in this machine's tables, by weight; of one work its kernels follow each other."""
    asking = _Asking(selector, tables, context)
    groups: dict[tuple[int, int], list[Question]] = {}
    for node, count, parts in _kinds(graph, selector):
        for rows in counts:
            if node.rows_in({"m": rows, "outs": 0}) == 0 and rows >= PROMPT:
                # Of a prompt one row's logits are asked for, and that of decoding is the same.
                continue
            groups[selector.offers.kind(node), rows] = list(asking.about(node, count, rows, parts))
    for node, count in asking.conversions():
        for rows in counts:
            groups[selector.offers.kind(node), rows] = list(asking.about(node, count, rows))
    of_kind: dict[int, float] = {}
    for (kind, _), group in groups.items():
        of_kind[kind] = of_kind.get(kind, 0.0) + sum(question.weight for question in group[:1])
    # All rows of a node in turn: its weights are drawn and packed once.
    heaviest = sorted(groups, key=lambda key: (-of_kind[key[0]], key))
    first: dict[tuple[str, str, str, int], Question] = {}
    for question in (question for key in heaviest for question in groups[key]):
        # Nodes that a table does not tell apart are one question.
        first.setdefault((question.package, question.family, question.size, question.work.m), question)
    # Where nothing else may run, a time says how long a step takes, and decides little.
    return sorted(first.values(), key=lambda question: (question.alone, question.known))


def _kinds(graph: Graph, selector: Selector) -> Iterator[tuple[TensorNode, int, Sequence[TensorNode]]]:
    """One node of each kind, how many such there are, and of a fused one its parts."""
    plain = {node.name: node for node in graph.ops}
    first: dict[int, tuple[TensorNode, Sequence[TensorNode]]] = {}
    counts: Counter[int] = Counter()
    fused = ((fusion.node, [plain[part] for part in fusion.parts]) for fusion in find_fusions(graph, fused_ops()))
    for node, parts in (*((node, ()) for node in graph.ops), *fused):
        kind = selector.offers.kind(node)
        first.setdefault(kind, (node, parts))
        counts[kind] += 1
    for kind, (node, parts) in first.items():
        yield node, counts[kind], parts


class _Asking:
    """Asks about nodes, and remembers in which formats their kernels read and write."""

    def __init__(self, selector: Selector, tables: Tables, context: int) -> None:
        self._selector, self._tables, self._context = selector, tables, context
        self._read: dict[tuple[Value, str], int] = {}
        self._written: dict[Value, set[str]] = {}

    def about(self, node: TensorNode, count: int, rows: int, parts: Sequence[TensorNode] = ()) -> Iterator[Question]:
        """A question for each kernel that may run a node, unless it is answered or hopeless.

        A fused kernel is hopeless beside its parts too.
        """
        work, kernels = work_of(node, rows, self._context), self._kernels(node, rows)
        predicted = {name: self._selector.predict(name, kernel, node, rows) for name, kernel in kernels.items()}
        least = min((each.us for each in predicted.values()), default=0.0)
        bar = HOPELESS * (min(least, sum(self._least(part, rows) for part in parts)) if parts else least)
        hopeful = sorted((predicted[name].us, name) for name in kernels if predicted[name].us <= bar)
        for _, name in hopeful:
            kernel = kernels[name]
            self._note_formats(node, kernel, count)
            if not self._tables.is_measured_here(kernel, work.node, rows, self._context):
                several = len(kernel.variants(work.node)) > 1
                names = family(kernel, work.node), written(size(kernel, work.node, self._context))
                known = not predicted[name].declared
                alone = len(hopeful) == 1
                yield Question(work, name, package_of(kernel), *names, count * least, several, known, alone)

    def _kernels(self, node: TensorNode, rows: int) -> Mapping[str, Kernel]:
        """Those that `auto` may take."""
        selector = self._selector
        offer, rule = selector.offers.of(node, rows), selector.match(node, rows)
        return {
            name: kernel
            for name, kernel in offer.kernels.items()
            if selector.refusal(name, node, rule, offer, AUTO) is None
        }

    def _least(self, node: TensorNode, rows: int) -> float:
        kernels = self._kernels(node, rows).items()
        return min((self._selector.predict(name, kernel, node, rows).us for name, kernel in kernels), default=0.0)

    def _note_formats(self, node: TensorNode, kernel: Kernel, count: int) -> None:
        for value, formats in zip(node.inputs, kernel.inputs(node), strict=True):
            if value.convertible and value.format not in formats:
                key = replace(value, name=""), formats[0]
                self._read[key] = max(count, self._read.get(key, 0))
        for value, formats in zip(node.outputs, kernel.outputs(node), strict=True):
            if value.convertible and value.format not in formats:
                self._written.setdefault(replace(value, name=""), set()).add(formats[0])

    def conversions(self) -> Iterator[tuple[TensorNode, int]]:
        """What may have to stand between kernels that do not read what others write, and for how many values."""
        pairs: dict[tuple[Value, str, str], int] = {}
        for (value, target), count in self._read.items():
            pairs[value, value.format, target] = count
            for source in self._written.get(value, set()) - {target}:
                pairs[value, source, target] = count
        for value, sources in self._written.items():
            for source in sources:
                pairs[value, source, value.format] = 1
        for (value, source, target), count in sorted(pairs.items(), key=lambda pair: str(pair[0])):
            x, y = (Value(f"x.{format}", value.shape, format) for format in (source, target))
            yield TensorNode(name="convert", op="convert", inputs=(x,), outputs=(y,)), count

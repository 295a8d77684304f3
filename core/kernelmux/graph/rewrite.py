"""Graph to graph: where a fused op's pattern stands, and the nodes with some of those put in its place.

Enters: a graph and fused ops. Leaves: fusions that would change no number, and rewritten node lists. Which of them are
kept is the plan's decision: only those that a chosen kernel takes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kernelmux.graph.formats import Value
from kernelmux.graph.graph import SCALARS, Graph, TensorNode, bare_node
from kernelmux.graph.ops.fused import Fused


@dataclass(frozen=True)
class Fusion:
    """One place where a fused node equals plain ones: it writes the same values, under the same names."""

    node: TensorNode
    parts: tuple[str, ...]
    """The plain nodes' names, in the pattern's order."""


def find_fusions(graph: Graph, ops: Iterable[Fused]) -> list[Fusion]:
    """Every fusion of a graph, longest patterns first; they may overlap."""
    search = _Search(graph)
    found = [fusion for op in ops for fusion in search.fusions(op)]
    return sorted(found, key=lambda fusion: -len(fusion.parts))


def fuse(nodes: Sequence[TensorNode], fusions: Iterable[Fusion]) -> list[TensorNode]:
    """The nodes with each fusion's parts replaced, at the place of the last of them. `fusions` must not overlap."""
    gone = {part for fusion in fusions for part in fusion.parts}
    position = {node.name: index for index, node in enumerate(nodes)}
    at = {max(fusion.parts, key=position.__getitem__): fusion.node for fusion in fusions}
    return [at.get(node.name, node) for node in nodes if node.name in at or node.name not in gone]


class _Search:
    """A graph's nodes by what they read and write, for finding patterns."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._position = {node.name: index for index, node in enumerate(graph.nodes)}
        self._producer = {value.name: node for node in graph.nodes for value in node.outputs}
        self._readers: dict[str, list[TensorNode]] = {}
        for node in graph.ops:
            for value in dict.fromkeys(node.inputs):
                self._readers.setdefault(value.name, []).append(node)

    def fusions(self, op: Fused) -> Iterator[Fusion]:
        """Places of one op's pattern that share no node with each other, in walking order."""
        used: set[str] = set()
        for node in self._graph.nodes:
            if node.op != op.pattern[0].op or node.name in used:
                continue
            fusion = next(self._grow(op, {0: node}, used), None)
            if fusion is not None:
                used.update(fusion.parts)
                yield fusion

    def _grow(self, op: Fused, matched: Mapping[int, TensorNode], used: set[str]) -> Iterator[Fusion]:
        """Extends a partial match, part number to node, by every node that fits the next part."""
        ports = _bind_ports(op, matched)
        if ports is None:
            return
        if len(matched) == len(op.pattern):
            if (fusion := self._fusion(op, [matched[index] for index in range(len(matched))], ports)) is not None:
                yield fusion
            return
        taken = {node.name for node in matched.values()}
        for index, node in self._candidates(op, matched, ports):
            if node.op == op.pattern[index].op and node.name not in used and node.name not in taken:
                yield from self._grow(op, {**matched, index: node}, used)

    def _candidates(
        self, op: Fused, matched: Mapping[int, TensorNode], ports: Mapping[str, Value]
    ) -> Iterator[tuple[int, TensorNode]]:
        """Nodes for one part that is not matched yet: the part that leaves least choice.

        A bound output has one producer; an inner value has few readers; an input of the pattern may have a great many,
        of which only those after the first part are tried, as the earlier ones have been.
        """
        parts = [(index, part) for index, part in enumerate(op.pattern) if index not in matched]
        for index, part in parts:
            if bound := [port for port in part.outputs if port in ports]:
                yield index, self._producer[ports[bound[0]].name]
                return
        for inner in (True, False):
            for index, part in parts:
                bound = [port for port in part.inputs if port in ports and (port not in op.inputs) == inner]
                if bound:
                    readers = self._readers.get(ports[bound[0]].name, [])
                    after = self._position[matched[0].name] if not inner else -1
                    start = bisect.bisect_right(readers, after, key=lambda node: self._position[node.name])
                    yield from ((index, node) for node in itertools.islice(readers, start, None))
                    return

    def _fusion(self, op: Fused, matched: Sequence[TensorNode], ports: Mapping[str, Value]) -> Fusion | None:
        """The fused node of a whole match, or None where it would not equal its parts."""
        names = [node.name for node in matched]
        rows = {node.inputs[0].shape[0] for node in matched}
        scalars = _scalars(matched)
        if len(rows) > 1 or scalars is None or not self._is_closed(op, matched, ports):
            return None
        weights: dict[int, Value] = {}
        biases: dict[int, Value] = {}
        for part, node in zip(op.pattern, matched, strict=True):
            if part.weight is not None:
                weights.update((part.weight, value) for value in node.weight)
                biases.update((part.weight, value) for value in node.bias)
        gamma = tuple(value for node in matched for value in node.gamma)
        # Of several biases all are there or none: a fused node has no way to say which.
        linear = sum(part.op == "mul_mat" for part in op.pattern)
        takes = (*op.fields, *op.optional)
        set_fields = {*scalars, *(["bias"] if biases else []), *(["gamma"] if gamma else [])}
        if len(biases) not in (0, linear) or not set_fields <= set(takes) or list(weights) != sorted(weights):
            return None
        node = bare_node(
            name=_joined(names),
            op=op.name,
            inputs=tuple(ports[port] for port in op.inputs),
            outputs=tuple(ports[port] for port in op.outputs),
            weight=tuple(weights[index] for index in sorted(weights)),
            bias=tuple(biases[index] for index in sorted(biases)),
            gamma=gamma,
            layer=matched[-1].layer,
            **scalars,
        )
        return Fusion(node, tuple(names))

    def _is_closed(self, op: Fused, matched: Sequence[TensorNode], ports: Mapping[str, Value]) -> bool:
        """Whether nobody else reads an inner value, and nobody reads an output before the last part has run."""
        names = {node.name for node in matched}
        last = max(self._position[name] for name in names)
        for port, value in ports.items():
            if port in op.inputs:
                continue
            others = [node for node in self._readers.get(value.name, ()) if node.name not in names]
            inner = port not in op.outputs
            if inner and (others or value.name in self._graph.outputs):
                return False
            if any(self._position[node.name] < last for node in others):
                return False
        return True


def _bind_ports(op: Fused, matched: Mapping[int, TensorNode]) -> Mapping[str, Value] | None:
    """Port names to values, or None where the nodes are not wired as the pattern says."""
    ports: dict[str, Value] = {}
    for index, node in matched.items():
        part = op.pattern[index]
        if len(node.inputs) != len(part.inputs):
            return None
        wires = (*zip(part.inputs, node.inputs, strict=True), *zip(part.outputs, node.outputs, strict=True))
        for port, value in wires:
            if ports.setdefault(port, value) != value:
                return None
    # Two ports may not be one value: a pattern's a + b is not a + a.
    return ports if len({value.name for value in ports.values()}) == len(ports) else None


def _scalars(matched: Sequence[TensorNode]) -> Mapping[str, object] | None:
    """The scalar fields that the nodes set, or None where two of them disagree."""
    merged: dict[str, object] = {}
    for node in matched:
        for key in (*SCALARS, *dict(node.attributes)):
            value = getattr(node, key)
            if value and merged.setdefault(key, value) != value:
                return None
    return merged


def _joined(names: Sequence[str]) -> str:
    """`blk.0.attn_q`, `blk.0.attn_k` as `blk.0.attn_q+attn_k`."""
    split = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*split, strict=False))
    start = sum(1 for _ in shared)
    return "+".join([names[0], *(".".join(name[start:]) for name in split[1:])])

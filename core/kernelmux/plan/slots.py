"""Alike nodes as slots: a model's layers repeat, so that few choices make a whole plan.

Enters: a graph, the places where fused ops may stand. Leaves: kinds of fusions, and for some of them kept the slots of
the graph with the links between them. Nothing here depends on rows, kernels or times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.rewrite import Fusion, fuse
from kernelmux.plan.assign import Link, Port

Kind = Callable[[TensorNode], object]
Key = tuple[object, ...]


@dataclass(frozen=True)
class Slots:
    """The nodes of each slot, by its number, and how many links of each kind there are between slots."""

    members: Mapping[int, tuple[TensorNode, ...]]
    links: Mapping[Link, int]


@dataclass
class Slotting:
    """A graph's slots for any set of kinds of fusions, by the number of the kind; each set is worked out once."""

    graph: Graph
    fusions: Sequence[Fusion]
    kind: Kind
    groups: tuple[tuple[Fusion, ...], ...] = field(init=False)
    """Alike fusions, longest first."""
    _slot_of: dict[str, int] = field(init=False)
    _made: dict[frozenset[int], Slots] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nodes = {node.name: node for node in self.graph.ops}
        groups: dict[Key, list[Fusion]] = {}
        for fusion in self.fusions:
            parts = (self.kind(nodes[part]) for part in fusion.parts)
            groups.setdefault((self.kind(fusion.node), *parts), []).append(fusion)
        self.groups = tuple(map(tuple, groups.values()))
        places: dict[str, list[tuple[int, int]]] = {}
        for number, _, place, part in self._parts():
            places.setdefault(part, []).append((number, place))
        # A slot's nodes are alike in what they may be fused to as well: a fusion takes all of them, or none.
        keys: dict[str, Key] = {name: (self.kind(node), *places.get(name, ())) for name, node in nodes.items()}
        keys |= {fusion.node.name: ("fused", number) for number, fusion, *_ in self._parts()}
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
        self._slot_of = {name: numbers[key] for name, key in keys.items()}

    def _parts(self) -> Iterator[tuple[int, Fusion, int, str]]:
        for number, group in enumerate(self.groups):
            for fusion in group:
                yield from ((number, fusion, place, part) for place, part in enumerate(fusion.parts))

    def overlap(self, one: int, other: int) -> bool:
        """Whether two kinds of fusions would take the same node."""
        return not self._taken[one].isdisjoint(self._taken[other])

    def contains(self, one: int, other: int) -> bool:
        """Whether one kind of fusion takes every node that another would."""
        return self._taken[one] >= self._taken[other]

    @cached_property
    def _taken(self) -> Sequence[frozenset[str]]:
        return [frozenset(part for fusion in group for part in fusion.parts) for group in self.groups]

    def kept(self, numbers: Iterable[int]) -> list[Fusion]:
        """The fusions of these kinds."""
        return [fusion for number in sorted(numbers) for fusion in self.groups[number]]

    def slots(self, numbers: frozenset[int]) -> Slots:
        """The graph's slots with fusions of these kinds, none of which overlap, in place of their parts."""
        if numbers not in self._made:
            self._made[numbers] = self._slots(fuse(self.graph.ops, self.kept(numbers)))
        return self._made[numbers]

    @cached_property
    def _links(self) -> Sequence[tuple[str, Value, bool]]:
        """Of each value that may be stored otherwise its name, the value without it, and whether the graph keeps it."""
        return [
            (value.name, Value("", value.shape, value.format), value.name in self.graph.outputs)
            for value in self.graph.values.values()
            if value.convertible
        ]

    def _slots(self, nodes: Sequence[TensorNode]) -> Slots:
        members: dict[int, list[TensorNode]] = {}
        writers: dict[str, Port] = {}
        readers: dict[str, list[Port]] = {}
        for node in nodes:
            slot = self._slot_of[node.name]
            members.setdefault(slot, []).append(node)
            writers.update((value.name, (slot, port)) for port, value in enumerate(node.outputs))
            for port, value in enumerate(node.inputs):
                readers.setdefault(value.name, []).append((slot, port))
        links = Counter(
            (writers.get(name), tuple(readers.get(name, ())), value, kept)
            for name, value, kept in self._links
            if name in readers or name in writers
        )
        return Slots(
            {slot: tuple(nodes) for slot, nodes in members.items()},
            {Link(*joined): count for joined, count in links.items()},
        )

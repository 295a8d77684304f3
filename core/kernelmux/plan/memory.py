"""Where values lie while a plan is walked: buffers by liveness in one arena, and the weights' packed forms.

Enters: nodes in walking order with final formats. Leaves: an offset for every value that a node writes; packed weights,
each form made once. Leaves of the graph (state, caches, weights) have memory of their own and no place in the arena.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kernelmux.graph.formats import aligned, lookup, value_bytes
from kernelmux.graph.graph import TensorNode


@dataclass(frozen=True)
class Layout:
    """Offsets into the arena by value name, scratch (offset, bytes) by node name, and the bytes of it all."""

    offsets: Mapping[str, int]
    workspaces: Mapping[str, tuple[int, int]]
    nbytes: int
    largest_live: int
    """The largest number of bytes alive at once: what a perfect layout would need."""
    largest_workspace: int = 0
    """The most scratch bytes that one node needs; part of `nbytes`."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Of values side by side the columns of their matrix, by value name: so many elements from one row to the next."""


def lay_out(nodes: Sequence[tuple[TensorNode, int]], kept: Iterable[str], side_by_side: Collection[str] = ()) -> Layout:
    """Places every value that `nodes` write; each node comes with its scratch bytes. Extents must be resolved.

    `kept` names values that outlive the walk, `side_by_side` nodes whose outputs are columns of one matrix. Best fit in
    walking order, in place where the op allows it and the input dies there.
    """
    # The index of the last node that reads each value; past the end for those kept.
    last_read = {value.name: index for index, (node, _) in enumerate(nodes) for value in node.inputs}
    last_read |= dict.fromkeys(kept, len(nodes))
    free = _FreeList()
    blocks: dict[str, _Block] = {}
    offsets: dict[str, int] = {}
    widths: dict[str, int] = {}
    workspaces: dict[str, tuple[int, int]] = {}
    live = largest_live = largest_workspace = 0
    for index, (node, scratch) in enumerate(nodes):
        updated = {target for _, target in node.contract.updates}
        inherited = _in_place(node, index, last_read, blocks)
        for position, source in inherited.items():
            value = node.outputs[position]
            blocks[value.name] = block = blocks.pop(source)
            block.alive, offsets[value.name] = {value.name}, block.offset
        fresh = [value for at, value in enumerate(node.outputs) if at not in updated and at not in inherited]
        joint = node.name in side_by_side
        for values in [fresh] if joint else [[value] for value in fresh]:
            width = sum(value.extents[1] for value in values) if joint else 0
            item = lookup(values[0].format).nbytes((1, 1)) if joint else 0
            size = aligned(values[0].extents[0] * width * item) if joint else value_bytes(values[0])
            block = _Block(free.take(size), size, {value.name for value in values})
            live += size
            column = block.offset
            for value in values:
                blocks[value.name], offsets[value.name] = block, column
                if joint:
                    widths[value.name] = width
                    column += value.extents[1] * item
        taken = aligned(scratch)
        if scratch:
            workspaces[node.name] = free.take(taken), scratch
            free.give(workspaces[node.name][0], taken)
        largest_live, largest_workspace = max(largest_live, live + taken), max(largest_workspace, taken)
        for value in dict.fromkeys((*node.inputs, *node.outputs)):
            if value.name in blocks and last_read.get(value.name, index) == index:
                block = blocks.pop(value.name)
                block.alive.discard(value.name)
                if not block.alive:
                    live -= block.nbytes
                    free.give(block.offset, block.nbytes)
    return Layout(offsets, workspaces, free.end, largest_live, largest_workspace, widths)


@dataclass
class _Block:
    """The memory of a value, or of several side by side: it lives as long as any of them."""

    offset: int
    nbytes: int
    alive: set[str]


def _in_place(
    node: TensorNode, index: int, last_read: Mapping[str, int], blocks: Mapping[str, _Block]
) -> Mapping[int, str]:
    """Which outputs of a node take over the memory of an input that it is the last to read: {output: input's name}."""
    inherited: dict[int, str] = {}
    for source, target in node.contract.in_place:
        value, output = node.inputs[source], node.outputs[target]
        readers = sum(other.name == value.name for other in node.inputs)
        if (
            target not in inherited
            and value.name in blocks
            and blocks[value.name].nbytes == value_bytes(value)
            and value.name not in inherited.values()
            and last_read[value.name] == index
            and readers == 1
            and (value.format, value.extents) == (output.format, output.extents)
        ):
            inherited[target] = value.name
    return inherited


class _FreeList:
    """Free stretches of an arena that grows at its end: `take` is best fit, `give` joins neighbours."""

    def __init__(self) -> None:
        self.end = 0
        self._stretches: list[tuple[int, int]] = []  # (offset, size), by offset

    def take(self, size: int) -> int:
        fitting = [(length, offset) for offset, length in self._stretches if length >= size]
        if fitting:
            length, offset = min(fitting)
            at = bisect.bisect_left(self._stretches, (offset, length))
            self._stretches[at : at + 1] = [(offset + size, length - size)] if length > size else []
            return offset
        # The last stretch may reach the end: then only what it lacks is added.
        offset = self.end
        if self._stretches and sum(self._stretches[-1]) == self.end:
            offset, _ = self._stretches.pop()
        self.end = offset + size
        return offset

    def give(self, offset: int, size: int) -> None:
        bisect.insort(self._stretches, (offset, size))
        joined: list[tuple[int, int]] = []
        for start, length in self._stretches:
            if joined and sum(joined[-1]) == start:
                joined[-1] = joined[-1][0], joined[-1][1] + length
            else:
                joined.append((start, length))
        self._stretches = joined

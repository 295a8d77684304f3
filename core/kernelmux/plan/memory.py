"""Where values lie while a plan is walked: buffers by liveness in one arena, and the weights' packed forms.

Enters: nodes in walking order with final formats. Leaves: an offset for every value that a node writes; packed weights,
each form made once. Leaves of the graph (state, caches, weights) have memory of their own and no place in the arena.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kernelmux.graph.formats import Value, aligned, lookup, value_bytes
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
    last_read = _last_reads(nodes, kept)
    free = _FreeList()
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    workspaces: dict[str, tuple[int, int]] = {}
    matrices = [_Matrix(node) for node, _ in nodes if node.name in side_by_side]
    matrix_of = {value.name: matrix for matrix in matrices for value in matrix.columns}
    live = largest_live = 0
    for index, (node, scratch) in enumerate(nodes):
        inherited = _in_place(node, index, last_read, offsets, sizes)
        updated = {target for _, target in node.contract.updates}
        for position, value in enumerate(node.outputs):
            if position in updated or (value.name in matrix_of and position):
                continue
            if position in inherited:
                source = inherited[position]
                offsets[value.name], sizes[value.name] = offsets[source], sizes.pop(source)
                continue
            matrix = matrix_of.get(value.name)
            size = value_bytes(value) if matrix is None else matrix.nbytes
            offset = free.take(size)
            live += size
            if matrix is None:
                offsets[value.name], sizes[value.name] = offset, size
            else:
                offsets |= matrix.placed(offset)
        if scratch:
            workspaces[node.name] = free.take(aligned(scratch)), scratch
        largest_live = max(largest_live, live + aligned(scratch))
        if scratch:
            free.give(workspaces[node.name][0], aligned(scratch))
        for value in dict.fromkeys((*node.inputs, *node.outputs)):
            if last_read.get(value.name, index) != index:
                continue
            if value.name in sizes:
                live -= sizes[value.name]
                free.give(offsets[value.name], sizes.pop(value.name))
            elif (matrix := matrix_of.get(value.name)) is not None and matrix.dies(value):
                live -= matrix.nbytes
                free.give(matrix.offset, matrix.nbytes)
    largest_workspace = max((aligned(scratch) for _, scratch in nodes), default=0)
    widths = {name: matrix.width for name, matrix in matrix_of.items()}
    return Layout(offsets, workspaces, free.end, largest_live, largest_workspace, widths)


class _Matrix:
    """The outputs of one node as columns of one matrix, which lives as long as any of them."""

    def __init__(self, node: TensorNode) -> None:
        self.columns = node.outputs
        self.width = sum(value.extents[1] for value in node.outputs)
        self._item = lookup(node.outputs[0].format).nbytes((1, 1))
        self.nbytes = aligned(node.outputs[0].extents[0] * self.width * self._item)
        self.offset = 0
        self._alive = {value.name for value in node.outputs}

    def placed(self, offset: int) -> Mapping[str, int]:
        """Where each column begins."""
        self.offset = offset
        ends = itertools.accumulate(value.extents[1] for value in self.columns)
        return {
            value.name: offset + (end - value.extents[1]) * self._item
            for value, end in zip(self.columns, ends, strict=True)
        }

    def dies(self, value: Value) -> bool:
        """Whether with this value the last of them dies; one that nobody reads does so with its node."""
        self._alive.discard(value.name)
        return not self._alive


def _last_reads(nodes: Sequence[tuple[TensorNode, int]], kept: Iterable[str]) -> Mapping[str, int]:
    """The index of the last node that reads each value; past the end for those kept."""
    last = {value.name: index for index, (node, _) in enumerate(nodes) for value in node.inputs}
    return last | dict.fromkeys(kept, len(nodes))


def _in_place(
    node: TensorNode, index: int, last_read: Mapping[str, int], offsets: Mapping[str, int], sizes: Mapping[str, int]
) -> Mapping[int, str]:
    """Which outputs of a node take over the memory of an input that it is the last to read: {output: input's name}."""
    inherited: dict[int, str] = {}
    for source, target in node.contract.in_place:
        value, output = node.inputs[source], node.outputs[target]
        readers = sum(other.name == value.name for other in node.inputs)
        if (
            target not in inherited
            and value.name in sizes
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
        at = bisect.bisect_left(self._stretches, (offset, size))
        before, after = self._stretches[at - 1 : at] if at else [], self._stretches[at : at + 1]
        if after and offset + size == after[0][0]:
            size += after[0][1]
            del self._stretches[at]
        if before and sum(before[0]) == offset:
            offset, size = before[0][0], before[0][1] + size
            at -= 1
            del self._stretches[at]
        self._stretches.insert(at, (offset, size))

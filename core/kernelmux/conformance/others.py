"""Other numbers for a case, as valid as its own: what a kernel kept of those shows.

Enters: a node and its memory, or its weights. Leaves: contents of all inputs, or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from kernelmux.conformance.room import Room
from kernelmux.graph.formats import Weight, dequantize_planes, quantize_planes
from kernelmux.graph.graph import TensorNode

PAGED = ("block_table", "kv_len", "query_start")
"""Inputs that say which rows and pages are whose: any order is right that leaves no more rows than positions."""
REARRANGED = ("ids", "positions", *PAGED)
"""Inputs of which the numbers that are there are right in other places too."""


def inputs(node: TensorNode, room: Room, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as valid as those given, and none of them alike: numbers negated and halved, ids and lengths zero.

    Of an op that updates its inputs ids come in reverse instead: two rows for one slot have no right answer.
    """
    updated = {source for source, _ in node.contract.updates}
    room.restore(given)
    for index, (value, memory) in enumerate(zip(node.inputs, room.inputs, strict=True)):
        if value.format == "i32":
            ids = memory.parts[0]
            ids.copy_(ids.flip(0) if updated else torch.zeros_like(ids))
        elif index not in updated:
            quantize_planes(value.format, dequantize_planes(value.format, memory.parts) * -0.5, memory.parts)
    return [memory.snapshot() for memory in room.inputs]


def rearranged(node: TensorNode, room: Room, given: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Inputs as given but for one that is step state, by its name: its numbers in another order.

    Where pages are dealt anew what no sequence has written is read too: not where some of it is NaN.
    """
    found: dict[str, list[torch.Tensor]] = {}
    ports = dict(zip(node.contract.inputs, room.inputs, strict=False))
    if ports.keys().isdisjoint(REARRANGED):
        return found
    room.restore(given)
    # Caches are large: they are looked through where it matters.
    holes = not ports.keys().isdisjoint(PAGED) and any(
        bool(plane.float().isnan().any()) for memory in room.inputs for plane in memory.parts
    )
    for index, (port, memory) in enumerate(ports.items()):
        if port not in REARRANGED or (holes and port in PAGED):
            continue
        room.restore(given)
        memory.parts[0].copy_(_in_another_order(port, {name: each.parts[0] for name, each in ports.items()}))
        if not memory.snapshot().equal(given[index]):
            found[node.inputs[index].name] = [each.snapshot() for each in room.inputs]
    return found


def weights(given: Sequence[Weight]) -> list[Weight]:
    """Weights that begin as those given do."""
    return [replace(weight, planes=tuple(map(_upside_down, weight.planes))) for weight in given]


def _in_another_order(port: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What is step state with its numbers where others were; as it is where that would not be valid."""
    given = inputs[port]
    if port == "block_table":
        return given.flip(-1)
    if port not in PAGED:
        # How many there are, the first and the last stay: rows between them may be what the first is.
        return torch.cat([given[:1], given[:1].expand_as(given[1:-1]), given[1:][-1:]])
    turned = given.flip(0) if port == "kv_len" else given[-1] - given.flip(0)
    step = {**inputs, port: turned}
    lengths, rows = step["kv_len"], step["query_start"].diff()
    return turned if bool(((lengths >= rows) | (lengths == 0)).all()) else given


def _upside_down(plane: torch.Tensor) -> torch.Tensor:
    """A plane with its rows in reverse, but for the first, by which a kernel might know them; torch turns no float8."""
    rows = plane.view(torch.uint8) if plane.itemsize == 1 else plane
    return torch.cat([rows[:1], rows[1:].flip(0)] if len(rows) > 2 else [rows.flip(0)]).view(plane.dtype)

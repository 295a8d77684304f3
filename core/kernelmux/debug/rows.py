"""Which rows of a walk's values are of real tokens, and what they hold: what pads a step may hold anything.

Enters: a session, and a walk of its that is about to run. Leaves: of each step's inputs or outputs the rows that count,
as float32, with their positions; of caches the cells that the step has written, or may read. Or of a kernel's outputs
all rows, as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kernelmux.contract.kernel import Planes
from kernelmux.graph.formats import Value, as_tuple, dequantize_planes
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk

if TYPE_CHECKING:
    import torch


def at_positions(first: int, last: int) -> str:
    """`position 5`, `positions 3 to 5`."""
    return f"position {first}" if first == last else f"positions {first} to {last}"


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one value that count."""

    value: Value
    """As the step has it."""
    positions: torch.Tensor
    """Of each row's token in its sequence."""
    numbers: torch.Tensor
    """[rows, ...], float32."""


@dataclass(frozen=True, eq=False)
class Stored:
    """All rows of one value as a kernel has stored them, until the walk ends."""

    format: str
    positions: torch.Tensor
    """Of each row's token in its sequence; below 0 of what pads the step."""
    planes: tuple[torch.Tensor, ...]
    """But for sums, which say nothing that the others do not."""

    @property
    def kind(self) -> object:
        """What others have that are stored alike."""
        return self.format, tuple((part.dtype, part.shape) for part in self.planes)


class _StepRows:
    """A walk's step state as it is now, and whose rows each of its values has."""

    def __init__(self, session: Session, walk: Walk) -> None:
        (logits, *_) = walk.outputs.values()
        m, outs = walk.steps[0].node.rows, len(as_tuple(logits)[0])
        self._walk, self._state = walk, session.walker.placement.leaves
        # The walk's own nodes have extents, which may be alike; by symbols it is known whose rows a value has.
        self._steps = session.plan.schedule(m, outs).steps
        self._slots, self._at = (self._state[name][:m].long() for name in ("slots", "positions"))
        self._logit_rows = self._state["logit_rows"][:outs].long()


class AllRows(_StepRows):
    """All rows of a walk: which of them are of real tokens is on the device, so that a graph can hold the reading."""

    def __init__(self, session: Session, walk: Walk) -> None:
        super().__init__(session, walk)
        positions = self._at.where(self._slots >= 0, -1)
        self._positions = {"m": positions, "outs": positions[self._logit_rows]}
        self._cells = self._slots.clamp(min=0)

    def stored(
        self, index: int, values: Sequence[Value], memory: Sequence[Planes], lasts: bool = False
    ) -> Iterator[Stored]:
        """What a kernel of the step at `index` has written, in the formats of `values`; copied unless it `lasts`."""
        node = self._steps[index].node
        updated = {target for _, target in node.contract.updates}
        for place, (value, symbol, planes) in enumerate(zip(values, node.outputs, memory, strict=True)):
            parts = as_tuple(planes)[:2]
            if value.format != "i32" and (positions := self._positions.get(str(symbol.shape[0]))) is not None:
                yield Stored(value.format, positions, parts if lasts else tuple(part.clone() for part in parts))
            elif place in updated:
                cells = tuple(part.flatten(0, 1)[self._cells] for part in parts)
                yield Stored(value.format, self._positions["m"], cells)


class LiveRows(_StepRows):
    """The rows of a walk that are of real tokens."""

    def __init__(self, session: Session, walk: Walk) -> None:
        super().__init__(session, walk)
        slots, positions, logit_rows = self._slots, self._at, self._logit_rows
        live, live_outs = slots >= 0, slots[logit_rows] >= 0
        self._rows = {"m": live.nonzero().flatten(), "outs": live_outs.nonzero().flatten()}
        self._positions = {"m": positions[live], "outs": positions[logit_rows][live_outs]}
        self._slots = slots[live]

    @property
    def count(self) -> int:
        """Tokens of the step."""
        return len(self._slots)

    def outputs(self, index: int) -> list[Rows]:
        """What the step at `index` has written."""
        node, memory = self._walk.steps[index].node, self._walk.tensors[index].outputs
        updated = {target for _, target in node.contract.updates}
        return list(self._taken(node.outputs, self._steps[index].node.outputs, memory, updated))

    def inputs(self, index: int, memory: Sequence[Planes] | None = None) -> list[Rows]:
        """What it reads, but for ids, lengths and what it updates."""
        node = self._walk.steps[index].node
        memory = self._walk.tensors[index].inputs if memory is None else memory
        kept = [place for place in range(len(node.inputs)) if place not in {s for s, _ in node.contract.updates}]
        values, symbols = ([whole[place] for place in kept] for whole in (node.inputs, self._steps[index].node.inputs))
        return list(self._taken(values, symbols, [memory[place] for place in kept], set()))

    def padding(self, index: int, place: int) -> torch.Tensor | None:
        """Whether each row of input `place` is none that counts; None where it has no rows of tokens."""
        import torch

        value, symbol = (each.node.inputs[place] for each in (self._walk.steps[index], self._steps[index]))
        if value.format == "i32" or (rows := self._rows.get(str(symbol.shape[0]))) is None:
            return None
        padding = torch.ones(value.extents[0], dtype=torch.bool, device=rows.device)
        padding[rows] = False
        return padding

    def _taken(
        self, values: Sequence[Value], symbols: Sequence[Value], memory: Sequence[Planes], written: set[int]
    ) -> Iterator[Rows]:
        for place, (value, symbol, planes) in enumerate(zip(values, symbols, memory, strict=True)):
            if value.format == "i32":
                continue
            if (rows := self._rows.get(str(symbol.shape[0]))) is not None:
                dense = dequantize_planes(value.format, as_tuple(planes))
                taken = dense if len(rows) == len(dense) else dense[rows]
                yield Rows(value, self._positions[str(symbol.shape[0])], taken)
            elif len(value.shape) == 4:
                cells, positions = (self._slots, self._positions["m"]) if place in written else self._cached
                parts = tuple(part.flatten(0, 1)[cells] for part in as_tuple(planes))
                yield Rows(value, positions, dequantize_planes(value.format, parts))

    @cached_property
    def _cached(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cells of a cache that the step may read, those of its own tokens among them, and their positions."""
        import torch

        inputs = (value for step in self._walk.steps for value in step.node.inputs)
        # Beyond the walk's own sequences lengths may be those of an earlier step.
        sequences = next((value.extents[0] for value in inputs if value.name == "kv_len"), 0)
        lengths, tables = (self._state[name][:sequences].long() for name in ("kv_len", "block_table"))
        positions = torch.arange(tables.shape[1] * PAGE_SIZE, device=tables.device).expand(sequences, -1)
        cells = tables.repeat_interleave(PAGE_SIZE, dim=1) * PAGE_SIZE + positions % PAGE_SIZE
        read = positions < lengths[:, None]
        return cells[read], positions[read]

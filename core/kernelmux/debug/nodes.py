"""Two plans walked side by side: the error of every node, its own and what has gathered up to it.

Enters: a model, two plans, token ids. Leaves: a NodeError for each node of the second plan. A node's *own* error is
what it makes of the first plan's numbers; *gathered* is how far its results are off in a walk of the second plan alone.
Both are NMSE, against what the first plan has by that name: a value that the first plan never stores, for a fused
kernel has it inside, cannot be compared. Caches are those of the first plan, too, where both store them alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernelmux.contract.kernel import Planes
from kernelmux.debug.apart import ratio
from kernelmux.errors import ModelError
from kernelmux.graph.formats import Value, as_planes, as_tuple, dequantize_planes, lookup, quantize_planes
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.plan.plan import Plan
from kernelmux.run.model import Model
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch

ROWS = 64
"""Rows of a step: the numbers of all of its nodes are held at once."""


@dataclass(frozen=True)
class NodeError:
    """How far one node of the second plan is off; None where the first plan has nothing to hold it against."""

    node: str
    op: str
    layer: int | None
    kernel: str
    own: float | None
    gathered: float | None
    stated: float
    """What the kernel says that its own is at most."""
    row: int | None
    """The position whose own error is the largest."""
    rows: tuple[int, int] | None
    """The first and the last position whose own error is over what is stated."""
    head: int | None
    """Of results in heads the one whose own error is the largest."""


@dataclass
class _Sums:
    """Squares of one node's errors, by position and by head, and of what they are errors of."""

    errors: dict[int, float] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)
    heads: dict[int, float] = field(default_factory=dict)

    def add(self, start: int, wanted: torch.Tensor, found: torch.Tensor, heads: int) -> None:
        """Of results [rows, columns], the first of them of position `start`."""
        wanted, found = wanted.double().flatten(1), found.double().flatten(1)
        errors = (found - wanted).square().nan_to_num(nan=math.inf)
        for row, (error, square) in enumerate(
            zip(errors.sum(1).tolist(), wanted.square().sum(1).tolist(), strict=True)
        ):
            self.errors[start + row] = self.errors.get(start + row, 0.0) + error
            self.squares[start + row] = self.squares.get(start + row, 0.0) + square
        if heads and errors.shape[1] % heads == 0:
            for head, error in enumerate(errors.view(len(errors), heads, -1).sum((0, 2)).tolist()):
                self.heads[head] = self.heads.get(head, 0.0) + error

    @property
    def nmse(self) -> float | None:
        return ratio(sum(self.errors.values()), sum(self.squares.values())) if self.errors else None

    @property
    def by_row(self) -> Mapping[int, float]:
        """Each position's error, relative to the mean square of all: a row of next to nothing counts as one."""
        mean = sum(self.squares.values()) / max(len(self.squares), 1)
        return {row: ratio(error, max(self.squares[row], mean)) for row, error in self.errors.items()}


def node_errors(model: Model, first: Plan, second: Plan, ids: Sequence[int], rows: int = ROWS) -> list[NodeError]:
    """The nodes of the second plan in the order of its walk, `rows` tokens a step; ModelError where there are none."""
    context = model.source.shape.context
    if not 0 < len(ids) <= context:
        raise ModelError(f"nodes are compared over 1 to {context} tokens, not over {len(ids)}")
    rows = min(rows, first.max_rows, second.max_rows)
    own, gathered = dict[str, _Sums](), dict[str, _Sums]()
    steps: dict[str, tuple[Walk, int]] = {}
    sessions = [model.session(plan, len(ids)) for plan in (first, second, second)]
    truth = _Truth(sessions[0])
    observers = [truth, _Held(sessions[1], truth, own, fed=True), _Held(sessions[2], truth, gathered)]
    with ExitStack() as stack:
        for session, observer in zip(sessions, observers, strict=True):
            stack.enter_context(session.watched(observer))
        sequences = [session.open() for session in sessions]
        for start in range(0, len(ids), rows):
            window = ids[start : start + rows]
            for session, observer, sequence in zip(sessions, observers, sequences, strict=True):
                observer.begin(start, len(window))
                session.feed(sequence, window, all_logits=True)
            steps |= {
                step.node.name: (walk, index) for walk in observers[1].walks for index, step in enumerate(walk.steps)
            }
    return [_node_error(walk, index, own.get(name), gathered.get(name)) for name, (walk, index) in steps.items()]


def _node_error(walk: Walk, index: int, own: _Sums | None, gathered: _Sums | None) -> NodeError:
    step = walk.steps[index]
    node, stated = step.node, step.choice.kernel.precision
    by_row = own.by_row if own else {}
    over = [row for row, error in by_row.items() if error > stated]
    return NodeError(
        node=node.name,
        op=node.op,
        layer=node.layer,
        kernel=step.choice.name,
        own=own.nmse if own else None,
        gathered=gathered.nmse if gathered else None,
        stated=stated,
        row=max(by_row, key=by_row.__getitem__) if by_row else None,
        rows=(min(over), max(over)) if over else None,
        head=max(own.heads, key=own.heads.__getitem__) if own and own.heads else None,
    )


class _Numbers(Observer):
    """What a walk's values are, by name, as float32 rows; those of a cache are the ones that the step has written."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.start = self.count = 0
        self.walks: list[Walk] = []

    def begin(self, start: int, count: int) -> None:
        """What comes next is a step of so many tokens, the first of that position."""
        self.start, self.count, self.walks = start, count, []

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self.walks.append(walk)

    def outputs(self, walk: Walk, index: int) -> Sequence[tuple[str, torch.Tensor]]:
        """What a step has written: rows of tokens, or of the cache, by the names of the graph's values."""
        pairs = zip(walk.steps[index].node.outputs, walk.tensors[index].outputs, strict=True)
        return [(value.name, self._rows(value, planes)) for value, planes in pairs]

    def _rows(self, value: Value, planes: Planes) -> torch.Tensor:
        if self.is_cache(value):
            slots = self.session.walker.placement.leaves["slots"][: self.count].long()
            planes = as_planes(tuple(part.flatten(0, 1)[slots] for part in as_tuple(planes)))
            return dequantize_planes(value.format, as_tuple(planes)).clone()
        return dequantize_planes(value.format, as_tuple(planes))[: self.count].clone()

    def is_cache(self, value: Value) -> bool:
        """Whether a value is pages of keys or values, under whatever name a node has written them."""
        return len(value.shape) == 4 and value.shape[1] == PAGE_SIZE


class _Truth(_Numbers):
    """The first plan's numbers of a step."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.values: dict[str, torch.Tensor] = {}
        self.caches: dict[str, tuple[str, Planes]] = {}

    def begin(self, start: int, count: int) -> None:
        super().begin(start, count)
        self.values, self.caches = {}, {}

    def after(self, walk: Walk, index: int) -> None:
        self.values |= self.outputs(walk, index)
        pairs = zip(walk.steps[index].node.outputs, walk.tensors[index].outputs, strict=True)
        self.caches |= {value.name: (value.format, planes) for value, planes in pairs if self.is_cache(value)}


class _Held(_Numbers):
    """A walk of the second plan, held against the first one's numbers, by which `fed` replaces what nodes read."""

    def __init__(self, session: Session, truth: _Truth, sums: dict[str, _Sums], fed: bool = False) -> None:
        super().__init__(session)
        self.truth, self.sums, self.fed = truth, sums, fed

    def before(self, walk: Walk, index: int) -> None:
        super().before(walk, index)
        if not self.fed:
            return
        for value, planes in zip(walk.steps[index].node.inputs, walk.tensors[index].inputs, strict=True):
            if self.is_cache(value):
                format, pages = self.truth.caches.get(value.name, ("", ()))
                if format == value.format:
                    for ours, theirs in zip(as_tuple(planes), as_tuple(pages), strict=True):
                        ours.copy_(theirs)
            elif (given := self.truth.values.get(value.name)) is not None and value.format != "i32":
                self._give(value, planes, given)

    def _give(self, value: Value, planes: Planes, given: torch.Tensor) -> None:
        """Stores the first plan's rows where a node reads them; what pads the step stays as it is."""
        rows = slice(0, len(given))
        if lookup(value.format).plain:
            as_tuple(planes)[0][rows].copy_(given)
            return
        whole = dequantize_planes(value.format, as_tuple(planes))
        whole[rows] = given
        quantize_planes(value.format, whole, as_tuple(planes))

    def after(self, walk: Walk, index: int) -> None:
        node = walk.steps[index].node
        for name, found in self.outputs(walk, index):
            # A conversion's result is what it has read.
            name = node.inputs[0].name if node.op == "convert" else name
            if (wanted := self.truth.values.get(name)) is not None:
                heads = node.num_heads or 0
                self.sums.setdefault(node.name, _Sums()).add(self.start, wanted, found.to(wanted.device), heads)

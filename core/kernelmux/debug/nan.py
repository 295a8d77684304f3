"""The first node that makes a NaN or an infinity of inputs that have none, with the numbers that it was given.

Enters: an observer for a session's steps. Leaves: a NotFiniteError at that node, before the next one runs. Rows that
pad a step count for nothing. Every launch is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.contract.kernel import Planes
from kernelmux.debug.rows import LiveRows, Rows, at_positions
from kernelmux.errors import KernelmuxError
from kernelmux.graph.formats import Value, as_planes, as_tuple, human_count, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Given:
    """A launch's node, and the planes of its inputs and weights, in this order, as they were before it; on the host."""

    node: TensorNode
    tensors: tuple[tuple[torch.Tensor, ...], ...]


class NotFiniteError(KernelmuxError):
    """A node has made a NaN or an infinity; the message names it, its kernel and the rows."""

    def __init__(self, message: str, node: str, kernel: str, positions: tuple[int, int], given: Given) -> None:
        super().__init__(message, node=node, kernel=kernel)
        self.positions = positions
        """The first and the last token that it has made one of."""
        self.given = given

    def saved(self, said: str) -> NotFiniteError:
        """The same, and what became of the numbers."""
        return NotFiniteError(f"{self}; {said}", self.node or "", self.kernel or "", self.positions, self.given)


class NanCheck(Observer):
    """Raises a NotFiniteError at the first launch of the session that makes a NaN or an infinity of a token's row."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._kept: tuple[Planes, ...] = ()

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self._rows = LiveRows(self.session, walk)
        tensors = walk.tensors[index]
        written = [part for planes in tensors.outputs for part in as_tuple(planes)]
        self._kept = tuple(_kept(planes, written) for planes in tensors.inputs)

    def after(self, walk: Walk, index: int) -> None:
        odd = _not_finite(self._rows.outputs(index))
        if odd:
            raise self._error(walk, index, odd)

    def _error(self, walk: Walk, index: int, odd: Sequence[Rows]) -> NotFiniteError:
        step = walk.steps[index]
        node, kernel = step.node, step.choice.name
        nan = sum(int(each.numbers.isnan().sum()) for each in odd)
        infinite = sum(int(each.numbers.isinf().sum()) for each in odd)
        tokens = sorted({token for each in odd for token in _positions(each)})
        counts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
        message = (
            f"{node.name} ({node.op}) has {' and '.join(counts)} numbers by {kernel}, step {index + 1} of "
            f"{len(walk.steps)}, in {len(tokens)} of {human_count(self._rows.count, 'row')}, "
            f"of {at_positions(tokens[0], tokens[-1])}"
        )
        weights = [self.session.walker.packed.weights[value.name] for value in node.weights]
        read = [f"input {each.value.name}" for each in _not_finite(self._rows.inputs(index, self._kept))]
        read += [f"weight {weight.name}" for weight in weights if not bool(weight.dequantize().isfinite().all())]
        message += f"; it reads some in {', '.join(read)}" if read else "; it reads none"
        inputs = [self._host(index, place, value) for place, value in enumerate(node.inputs)]
        given = Given(node, (*inputs, *(weight.planes for weight in weights)))
        return NotFiniteError(message, node.name, kernel, (tokens[0], tokens[-1]), given)

    def _host(self, index: int, place: int, value: Value) -> tuple[torch.Tensor, ...]:
        """What an input held, zeros in rows that pad the step: who runs it again would stumble over what is there."""
        parts = tuple(part.cpu().clone() for part in as_tuple(self._kept[place]))
        if (padding := self._rows.padding(index, place)) is not None:
            for part, plane in zip(parts, lookup(value.format).planes, strict=True):
                if plane.rows == 1:
                    plane.by_rows(part)[padding.cpu()] = 0
        return parts


def _kept(planes: Planes, written: Sequence[torch.Tensor]) -> Planes:
    """An input as it will be after the launch: itself, or a copy where the launch may write over it."""
    copied = (part.clone() if any(_overlap(part, out) for out in written) else part for part in as_tuple(planes))
    return as_planes(tuple(copied))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors' memory, from the first element of each to the last, has bytes in common."""
    (first, end), (start, last) = _span(one), _span(other)
    return first < last and start < end


def _span(part: torch.Tensor) -> tuple[int, int]:
    reach = sum((extent - 1) * stride for extent, stride in zip(part.shape, part.stride(), strict=True))
    return part.data_ptr(), part.data_ptr() + (reach + 1) * part.element_size()


def _not_finite(rows: Sequence[Rows]) -> list[Rows]:
    return [each for each in rows if not bool(each.numbers.isfinite().all())]


def _positions(rows: Rows) -> list[int]:
    """The positions of the rows that have such numbers."""
    odd = ~rows.numbers.flatten(1).isfinite().all(1)
    found: list[int] = rows.positions[odd].tolist()
    return found

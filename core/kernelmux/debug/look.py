"""One look at a walk: its launches made again by second kernels, and what both made held side by side.

Enters: a walk's launches, one by one or while a graph of them is recorded. Leaves: at the walk's end, errors by node
and row on their way to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.contract.device import Device
from kernelmux.debug.apart import Apart, errors_of
from kernelmux.debug.rows import LiveRows, Rows
from kernelmux.debug.second import Twin, Twins
from kernelmux.errors import contained
from kernelmux.run.session import Session
from kernelmux.run.state import HostCopy
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch

HELD = 2**25
"""Bytes of results that are held until their errors are computed at once: each alone would take a dozen launches."""


class Look(Observer):
    """Has a walk's twins make its launches again; what they say goes to the host when the walk has ended."""

    def __init__(
        self,
        session: Session,
        twins: Twins,
        apart_of: Callable[[Walk, int, Twin], Apart],
        missing: dict[str, str],
    ) -> None:
        """A twin that raises is taken out of `twins`, and said to be missing."""
        self._session, self._twins, self._apart_of, self._missing = session, twins, apart_of, missing
        self._sent: _Results | None = None

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self._rows = LiveRows(self._session, walk, every=True)
            self._results = _Results()
            self._twins.state.take(mirrored=not self._twins.capturable)
        if (twin := self._twins.each[index]) is None:
            return
        twin.give(walk.steps[index].node, walk.tensors[index].inputs)
        try:
            twin.call()
            self._theirs = _kept(self._rows.written(index, twin.node.outputs, twin.tensors.outputs))
        except BaseException as error:
            self._missing[walk.steps[index].node.name] = f"{twin.name} raised: {contained(error)}"
            self._twins.each[index] = None

    def after(self, walk: Walk, index: int) -> None:
        if (twin := self._twins.each[index]) is not None:
            ours = _kept(self._rows.outputs(index))
            self._results.add(self._apart_of(walk, index, twin), ours, self._theirs)
        last = index == len(walk.steps) - 1
        if last or self._results.nbytes > HELD:
            self._results.compare()
        if last:
            self._results.close()

    def end(self, walk: Walk) -> None:
        self.collect()
        self._sent = self._results
        self._sent.send(walk.device)

    def collect(self) -> None:
        """Waits for what the last walk has sent, and counts it."""
        if self._sent is not None:
            self._sent.count()
            self._sent = None


class _Results:
    """What both kernels of a walk's steps have made, then the errors of it."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Of what is held."""
        self._held: dict[torch.Size, list[tuple[Apart, Rows, Rows]]] = {}
        """By shape."""
        self._errors: list[torch.Tensor] = []
        """[3, rows]: squared errors, squares, positions."""
        self._aparts: list[Apart] = []
        """One for each row of them."""
        self._copy: HostCopy | None = None

    def add(self, apart: Apart, ours: Sequence[Rows], theirs: Sequence[Rows]) -> None:
        for one, other in zip(ours, theirs, strict=True):
            self._held.setdefault(one.numbers.shape, []).append((apart, one, other))
            self.nbytes += 2 * one.numbers.nbytes

    def compare(self) -> None:
        """Computes the errors of what is held, and holds it no longer."""
        import torch

        for several in self._held.values():
            found = torch.stack([one.numbers for _, one, _ in several])
            wanted = torch.stack([other.numbers for _, _, other in several])
            positions = torch.stack([one.positions for _, one, _ in several]).double()
            self._errors.append(torch.cat([errors_of(found, wanted), positions.unsqueeze(0)]).flatten(1))
            self._aparts += [apart for apart, one, _ in several for _ in range(len(one.positions))]
        self._held.clear()
        self.nbytes = 0

    def close(self) -> None:
        """Nothing more is added: the errors become one tensor."""
        import torch

        self._errors = [torch.cat(self._errors, dim=1)] if self._errors else []

    def send(self, device: Device) -> None:
        """Has them copied to the host."""
        if self._errors:
            self._copy = self._copy or HostCopy(self._errors[0], device)
            self._copy.start()

    def count(self) -> None:
        """One launch more of each node, by the rows that have a position; it waits until they have come."""
        if self._copy is None:
            return
        found: dict[int, tuple[Apart, list[tuple[float, float, int]]]] = {}
        for apart, error, square, position in zip(self._aparts, *self._copy.wait(), strict=True):
            rows = found.setdefault(id(apart), (apart, []))[1]
            if position >= 0:
                rows.append((error, square, int(position)))
        for apart, rows in found.values():
            apart.count(rows)


def _kept(several: Sequence[Rows]) -> list[Rows]:
    """Rows as [rows, columns], in memory of their own: float32 was not converted, so that it may be the kernel's."""
    flat = [replace(rows, numbers=rows.numbers.flatten(1)) for rows in several]
    return [replace(rows, numbers=rows.numbers.clone()) if rows.value.format == "f32" else rows for rows in flat]

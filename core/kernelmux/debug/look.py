"""One look at a walk: its launches made again by second kernels, and what both made held side by side.

Enters: a walk's launches, one by one or while a graph of them is recorded. Leaves: at the walk's end, errors by node
and row on their way to the host. Second kernels launch beside the session's stream, on copies that were made on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device
from kernelmux.debug.apart import Apart, errors_of
from kernelmux.debug.rows import AllRows, Stored
from kernelmux.debug.second import Twin, Twins
from kernelmux.errors import contained, where_raised
from kernelmux.graph.formats import dequantize_planes, stored_as
from kernelmux.run.session import Session
from kernelmux.run.state import HostCopy
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch

HELD = 2**25
"""Bytes of results that are held until their errors are computed at once: each alone would take twenty launches."""


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
        self._busy = set[Any]()
        self._sent: _Results | None = None

    def before(self, walk: Walk, index: int) -> None:
        if index == 0:
            self._rows = AllRows(self._session, walk)
            self._results = _Results()
            self._twins.state.take(mirrored=not self._twins.capturable)
        if (twin := self._twins.each[index]) is None:
            return
        if twin.stream in self._busy:
            # Its memory may still be that of a step before.
            self._session.walker.stream.wait_stream(twin.stream)
        twin.give(walk.steps[index].node, walk.tensors[index].inputs)
        try:
            with self._beside(twin):
                (walk.watch.observer or self).launch_beside(walk, index, twin.name, twin.call)
                theirs = twin.node.outputs, twin.tensors.outputs
                self._theirs = [*self._rows.stored(index, *theirs, lasts=twin.lasts)]
        except BaseException as error:
            self._missing[walk.steps[index].node.name] = f"{twin.name} raised: {_in_a_line(error)}"
            self._twins.each[index] = None

    def after(self, walk: Walk, index: int) -> None:
        if (twin := self._twins.each[index]) is not None:
            ours = self._rows.stored(index, walk.steps[index].node.outputs, walk.tensors[index].outputs)
            apart = self._apart_of(walk, index, twin)
            for one, other in zip(ours, self._theirs, strict=True):
                self._results.add(apart, one, other)
        last = index == len(walk.steps) - 1
        if last or self._results.nbytes > HELD:
            self._join()
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

    @contextmanager
    def _beside(self, twin: Twin) -> Iterator[None]:
        """Work on a twin's own stream, after what the session's holds; where there is one."""
        if twin.stream is not None:
            twin.stream.wait_stream(self._session.walker.stream)
            self._busy.add(twin.stream)
        with self._session.plan.device.platform.on(twin.stream):
            yield

    def _join(self) -> None:
        for stream in self._busy:
            self._session.walker.stream.wait_stream(stream)
        self._busy.clear()


def _in_a_line(error: BaseException) -> str:
    return f"{' '.join(str(contained(error)).split())} ({where_raised(error)})"


class _Results:
    """What both kernels of a walk's steps have made, then the errors of it."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Of what is held."""
        self._held: dict[object, list[tuple[Apart, Stored, Stored]]] = {}
        """Those that are stored alike together."""
        self._errors: list[torch.Tensor] = []
        """[3, rows]: squared errors, squares, positions."""
        self._aparts: list[Apart] = []
        """One for each row of them."""
        self._copy: HostCopy | None = None

    def add(self, apart: Apart, ours: Stored, theirs: Stored) -> None:
        self._held.setdefault((ours.kind, theirs.kind), []).append((apart, ours, theirs))
        self.nbytes += sum(part.nbytes for part in (*ours.planes, *theirs.planes))

    def compare(self) -> None:
        """Computes the errors of what is held, and holds it no longer.

        What the second kernel made is stored as the first one stores it: both round alike.
        """
        import torch

        for several in self._held.values():
            found = _numbers([ours for _, ours, _ in several])
            wanted = stored_as(several[0][1].format, _numbers([theirs for _, _, theirs in several]))
            positions = torch.stack([ours.positions for _, ours, _ in several]).double()
            errors = errors_of(found.flatten(2), wanted.flatten(2))
            self._errors.append(torch.cat([errors, positions.unsqueeze(0)]).flatten(1))
            self._aparts += [apart for apart, ours, _ in several for _ in range(len(ours.positions))]
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


def _numbers(several: list[Stored]) -> torch.Tensor:
    """Values that are stored alike as float32, [values, rows, ...]."""
    import torch

    planes = zip(*(stored.planes for stored in several), strict=True)
    return dequantize_planes(several[0].format, tuple(torch.stack(parts) for parts in planes))

"""Weights on their way from a file to a device's memory: once each, in large pinned pieces, ahead of their use.

Enters: a model's weights by name, and packed forms that a cache holds; the order in which packing wants them, each as
often as it does. Leaves: the same with their planes on the device. While the device packs one, threads bring the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, cast

from kernelmux.contract.device import Device
from kernelmux.graph.formats import Weight, torch_dtype
from kernelmux.models.stored import StoredPlane, StoredWeight, loaded

if TYPE_CHECKING:
    import torch

    from kernelmux.contract.packed import Form
    from kernelmux.contract.packed_file import MappedForm

PIECE = 2**23
"""Bytes that are sent at once."""
PIECES = 8
"""Pinned buffers of that size: to pin memory takes as long as to send three times as much."""
THREADS = 4
"""That fill them: one alone copies at a tenth of the bus's rate."""
AHEAD = 2**29
"""Bytes of weights that may be on the device before their packed forms are made. A larger weight stays where it lies:
whoever packs it sends some rows at a time."""


class Uploads:
    """The weights that are wanted next, on a device or on their way there; each is let go after its last use.

    Forms that were packed before travel in the same way, in their weights' place. On a device that works in host memory
    all are taken as they lie, as are weights that are drawn on the device; each is looked up once for all its uses.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        device: Device,
        wanted: Iterable[str | Form],
        forms: Mapping[Form, MappedForm] | None = None,
    ) -> None:
        self._weights = weights
        self._forms = forms or {}
        self._left = Counter(wanted)
        self._waiting = dict.fromkeys(self._left)
        self._next: Weight | MappedForm | None = None
        self._here: dict[str | Form, tuple[Weight | MappedForm, Sequence[Future[torch.Event]]]] = {}
        self._ring = None if device.platform.host_memory else _Ring(device)

    def take(self, name: str) -> Weight:
        """A weight, for one of its uses: what is enqueued next on torch's current stream finds it there."""
        return cast(Weight, self._take(name))

    def take_form(self, name: Form) -> MappedForm:
        """A packed form, likewise."""
        return cast("MappedForm", self._take(name))

    def _take(self, name: str | Form) -> Weight | MappedForm:
        if name not in self._here:
            self._start(self._looked_up(name))
        taken, pieces = self._here[name]
        for piece in pieces:
            piece.result().wait()
        self._here[name] = taken, ()
        self._start_ahead()
        return taken

    def done(self, name: str | Form) -> None:
        """One use of a weight or form is over."""
        self._left[name] -= 1
        if self._left[name] <= 0:
            self._here.pop(name, None)

    def close(self) -> None:
        """Lets go of all; what is on its way arrives first."""
        self._waiting.clear()
        if self._ring is not None:
            self._ring.close()
        self._here.clear()

    def _start_ahead(self) -> None:
        ahead = sum(here.nbytes for here, _ in self._here.values())
        while self._ring is not None and self._waiting:
            self._next = self._looked_up(next(iter(self._waiting)))
            ahead += self._next.nbytes
            if ahead > AHEAD:
                break
            self._start(self._next)

    def _looked_up(self, name: str | Form) -> Weight | MappedForm:
        """Once, for a weight may be drawn whenever it is looked up."""
        if self._next is not None and self._next.name == name:
            return self._next
        return self._weights[name] if isinstance(name, str) else self._forms[name]

    def _start(self, wanted: Weight | MappedForm) -> None:
        self._waiting.pop(wanted.name, None)
        if self._ring is None or self._stays(wanted):
            self._here[wanted.name] = loaded(wanted) if isinstance(wanted, StoredWeight) else wanted, ()
            return
        stored = wanted.stored if isinstance(wanted, StoredWeight) else wanted.planes
        sent = [self._ring.send(plane) for plane in stored]
        planes = tuple(plane for plane, _ in sent)
        self._here[wanted.name] = replace(wanted, planes=planes), [piece for _, pieces in sent for piece in pieces]

    def _stays(self, wanted: Weight | MappedForm) -> bool:
        """Whether it is taken where it lies: not a form, which is sent whole however large it is."""
        if not isinstance(wanted, Weight):
            return False
        return wanted.nbytes > AHEAD or (not isinstance(wanted, StoredWeight) and wanted.planes[0].device.type != "cpu")


class _Ring:
    """Pinned buffers that take turns, threads that fill them, and the stream on which they are sent."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.platform.stream(device)
        self._threads = ThreadPoolExecutor(THREADS, "upload")
        self._free: SimpleQueue[tuple[torch.Tensor, torch.Event]] = SimpleQueue()
        self._made = 0

    def send(self, plane: torch.Tensor | StoredPlane) -> tuple[torch.Tensor, list[Future[torch.Event]]]:
        """Memory on the device for a plane in host memory or a file, and the events after which each piece is there."""
        import torch

        dtype = torch_dtype(plane.dtype) if isinstance(plane, StoredPlane) else plane.dtype
        target = torch.empty(plane.shape, dtype=dtype, device=self._device.torch)
        # The memory may have been another tensor's until now: what reads that one on the current stream comes first.
        vacant = torch.Event(self._device.torch)
        vacant.record()
        source = plane if isinstance(plane, StoredPlane) else plane.reshape(-1).view(torch.uint8)
        pieces = enumerate(torch.split(target.reshape(-1).view(torch.uint8), PIECE))
        return target, [self._threads.submit(self._send, source, n * PIECE, piece, vacant) for n, piece in pieces]

    def _send(
        self, source: torch.Tensor | StoredPlane, start: int, target: torch.Tensor, vacant: torch.Event
    ) -> torch.Event:
        import numpy as np
        import torch

        pinned, sent = self._buffer()
        sent.synchronize()
        size = len(target)
        # Outside Python's lock, and by this thread alone.
        if isinstance(source, StoredPlane):
            source.read_into(start, pinned[:size].numpy().data)
        else:
            np.copyto(pinned[:size].numpy(), source[start : start + size].numpy())
        arrived = torch.Event(self._device.torch)
        with self._device.platform.on(self._stream):
            vacant.wait()
            target.copy_(pinned[:size], non_blocking=True)
            arrived.record()
        self._free.put((pinned, arrived))
        return arrived

    def _buffer(self) -> tuple[torch.Tensor, torch.Event]:
        """One that nobody fills."""
        import torch

        if self._made < PIECES and self._free.empty():
            self._made += 1
            return torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.Event(self._device.torch)
        return self._free.get()

    def close(self) -> None:
        self._threads.shutdown()

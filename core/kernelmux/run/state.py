"""The step state: small integer buffers that tell a walk what to do, and their mirror in host memory.

Enters: lists of numbers, by the buffers' names. Leaves: the same on the device, sent in one copy. Where the
device's memory is the host's, the mirror is the buffers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kernelmux.contract.device import Device
from kernelmux.graph.graph import PAGE_SIZE

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
"""Items: every buffer starts at a multiple of 256 bytes, as everything that kernels read."""


class StepState:
    """Buffers of int32 by name, of the given extents, at addresses that do not change."""

    def __init__(self, extents: Mapping[str, tuple[int, ...]], device: Device) -> None:
        import torch

        starts, end = {}, 0
        for name, shape in extents.items():
            starts[name] = end
            end += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        on_host = device.platform.host_memory
        self._mirror = torch.zeros(end, dtype=torch.int32, pin_memory=not on_host)
        self._memory = self._mirror if on_host else torch.zeros(end, dtype=torch.int32, device=device.torch)
        self._sent = None if on_host else torch.Event(device.torch)
        self.host, self.buffers = (
            {name: memory[starts[name] :][: math.prod(shape)].view(shape) for name, shape in extents.items()}
            for memory in (self._mirror, self._memory)
        )

    def write(self, rows: Mapping[str, Sequence[int]], tables: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Fills the first items of each buffer, and sends all of them on torch's current stream.

        `rows` are of one axis, `tables` of two, whose rows may be shorter than the buffer's.
        """
        import torch

        if self._sent is not None:
            # The mirror may still be on its way from the step before.
            self._sent.synchronize()
        for name, values in rows.items():
            self.host[name][: len(values)] = torch.tensor(values, dtype=torch.int32)
        for name, lines in tables.items():
            for index, values in enumerate(lines):
                self.host[name][index, : len(values)] = torch.tensor(values, dtype=torch.int32)
        if self._sent is not None:
            self._memory.copy_(self._mirror, non_blocking=True)
            self._sent.record()

    def advance(self, ids: torch.Tensor) -> None:
        """On the device, the state of the next step of one token a row: each row with a length gets its id.

        Of the state by a graph's names: `tokens`, `kv_len`, `positions`, `block_table`, `slots`.
        """
        import torch

        state = {name: buffer[: len(ids)] for name, buffer in self.buffers.items()}
        state["tokens"].copy_(ids)
        live = (state["kv_len"] > 0).to(torch.int32)
        state["kv_len"].add_(live)
        state["positions"].add_(live)
        # Past the last reserved page, after the last step, any page will do: nothing is written there.
        page = (state["positions"] // PAGE_SIZE).clamp_(max=state["block_table"].shape[1] - 1)
        first = state["block_table"].gather(1, page.long().unsqueeze(1)).squeeze(1) * PAGE_SIZE
        slots = first + state["positions"] % PAGE_SIZE
        state["slots"].copy_(torch.where(live.bool(), slots, -1))


class HostCopy:
    """A device buffer's numbers on their way to the host: `start` enqueues the copy, `wait` gives what it brought."""

    def __init__(self, source: torch.Tensor, device: Device) -> None:
        import torch

        on_host = device.platform.host_memory
        self._source = source
        self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=not on_host)
        self._arrived = None if on_host else torch.Event(device.torch)

    def start(self) -> None:
        """On torch's current stream."""
        self._copy.copy_(self._source, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> list[Any]:
        """Nested, as the source's axes are."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers


@contextmanager
def in_line(device: Device, stream: Any) -> Iterator[None]:
    """Work on a stream, after what the caller's holds, and before what the caller adds to it; None: there is none."""
    if stream is None:
        yield
        return
    platform = device.platform
    callers = platform.current(device)
    stream.wait_stream(callers)
    with platform.on(stream):
        yield
    callers.wait_stream(stream)


class StreamOrder:
    """Keeps launches in order where the caller changes torch's current stream between them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.platform.current(device)

    def keep(self) -> None:
        """What is launched next comes after what was launched before this was last called."""
        current = self._device.platform.current(self._device)
        if current != self._stream:
            current.wait_stream(self._stream)
            self._stream = current

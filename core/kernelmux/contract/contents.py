"""What the weights of a model file hold, as checksums by name: read once, and known again as long as it is that file.

Enters: weights; when their file was last changed. Leaves: a checksum for each. The file's path says nothing:
moved and copied files hold what they held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernelmux.contract.cache import Cache, read_table, update_table
from kernelmux.contract.checksum import checksum, hex_checksum
from kernelmux.graph.formats import Weight
from kernelmux.models.stored import StoredPlane, StoredWeight

if TYPE_CHECKING:
    import torch

KIND = "contents"
SAMPLE = 4096
"""Bytes from the middle of each plane that tell files apart which were changed at the same time, as some unpackers
state one time for all that they unpack."""


class Contents:
    """Checksums of a model's weights, each made when it is first asked for, at the speed of memory.

    They are remembered by the file's size and time of change, the table of its tensors and a sample of each: that takes
    milliseconds, and an unchanged file that was moved, or copied with its time, is not read again. Where any of it
    differs every byte is read, so that a copy is known by what it holds, and a file that was written to is another.
    """

    def __init__(self, weights: Mapping[str, Weight], stamp: tuple[int, ...]) -> None:
        self._weights = weights
        self._stamp = stamp
        self._new: dict[str, list[str]] = {}

    def of(self, name: str) -> list[Any]:
        """All that identifies a weight: its name, format, shape, and a checksum of each plane."""
        weight = self._weights[name]
        sums = self._known.get(name) or self._new.get(name)
        if sums is None:
            sums = self._new[name] = [hex_checksum(checksum(_bytes(plane))) for plane in weight.planes]
        return [name, weight.format, weight.shape, sums]

    @property
    def is_new(self) -> bool:
        """Whether there is something to remember."""
        return bool(self._new)

    def remember(self) -> None:
        """Keeps what was read, if that can be done."""
        self._known |= self._new
        update_table(KIND, self._key, self._new)
        self._new = {}

    @cached_property
    def _known(self) -> dict[str, list[str]]:
        return read_table(KIND, self._key)

    @cached_property
    def _key(self) -> str:
        samples = hashlib.sha256()
        for weight in self._weights.values():
            for plane in weight.stored if isinstance(weight, StoredWeight) else weight.planes:
                # What a plane is made of, which is quick to read.
                for source in plane.sources if isinstance(plane, StoredPlane) else (plane,):
                    samples.update(_sample(source))
        table = [(weight.name, weight.format, weight.shape) for weight in self._weights.values()]
        return Cache.key(self._stamp, table, samples.hexdigest())


def _sample(plane: torch.Tensor | StoredPlane) -> bytes:
    start = max(plane.nbytes - SAMPLE, 0) // 2
    if isinstance(plane, StoredPlane):
        return bytes(plane.read(start, min(plane.nbytes, SAMPLE)))
    return _bytes(plane)[start : start + SAMPLE].numpy().tobytes()


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    import torch

    return plane.reshape(-1).view(torch.uint8)

"""Packed forms of weights, kept on disk from one process to the next: mapped there, and not packed again.

Enters: forms that a session has made, in whatever memory; the form that it wants, and the kernel. Leaves: a file for
each in the folder `packed` of the cache, written in the background; the form, mapped. A folder that cannot be used, a
damaged file, another process at the same time: each costs time and a line, none is an error.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.contract import registry
from kernelmux.contract.background import Background
from kernelmux.contract.cache import NO_FOLDER, Cache, library_versions, replacing, source_hash
from kernelmux.contract.contents import Contents
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.packed_file import LAYOUT, MappedForm, UnusableError, flat_bytes, map_form, write_form
from kernelmux.graph.formats import Weight

if TYPE_CHECKING:
    import torch

    from kernelmux.contract.packed import Form

UNUSED = 30 * 24 * 3600
"""Seconds after which a file that no process has mapped is deleted, when others are written."""


class PackedCache:
    """The packed forms of one model's weights on a device, as files.

    A form is known by all that its bytes depend on: what the weights hold (see `Contents`), its name, the versions of
    kernel, core, libraries and layout, the class of the device. A file that nobody has used for 30 days is deleted.
    """

    def __init__(
        self, weights: Mapping[str, Weight], device: Device, path: Path, stamp: tuple[int, ...] | None
    ) -> None:
        self._device = device
        self._contents = None if stamp is None else Contents(weights, stamp)
        self.background = Background(self._failed)
        """What writes: `in_use` is for those who are not to be disturbed."""
        self.background.add(self._delete_unused)
        self._versions: dict[tuple[str, type[Kernel]], list[Any]] = {}
        self.mapped_bytes = 0
        """Of the forms that came from files."""
        self._notes: dict[str, None] = {}
        if stamp is None:
            self._note(f"{path} is no file to know its weights by: they are packed, and not kept")

    @property
    def notes(self) -> list[str]:
        """What whoever asked for the cache must be told, a line each: files that were damaged, a disk that is full."""
        return list(self._notes)

    def find(self, form: Form, kernel: Kernel) -> MappedForm | None:
        """A form of an earlier process, mapped, its bytes still to be checked; None where it is to be made."""
        if self._contents is None:
            return None
        try:
            key = self._key(form, kernel)
            path = self._path(key)
            found = map_form(path, key, form)
            with suppress(OSError):
                os.utime(path)
            return found
        except FileNotFoundError:
            pass
        except UnusableError as error:
            self._refuse(form, path, str(error))
        except NO_FOLDER as error:
            self._note(f"packed weights are not taken from {_folder()}: {_reason(error)}")
        return None

    def checked(self, form: MappedForm, kernel: Kernel) -> tuple[torch.Tensor, ...] | None:
        """The planes of a form that was found, as they were kept, on the device; None where they are damaged."""
        if fault := form.fault:
            self._refuse(form.name, self._path(self._key(form.name, kernel)), fault)
            return None
        self.mapped_bytes += form.nbytes
        return form.tensors

    def keep(self, form: Form, kernel: Kernel, planes: tuple[torch.Tensor, ...], weights: Sequence[Weight]) -> None:
        """Has a form written that was made just now, on torch's current stream, once `start` is called.

        Not one without planes, nor one whose planes are the given weights' own memory: these are as quickly had again.
        """
        if self._contents is None:
            return
        if any(flat_bytes(plane) is None for plane in planes):
            self._note(f"{form[1]} is packed at each start: its planes have gaps, and are not kept")
            return
        own = {plane.untyped_storage().data_ptr() for weight in weights for plane in weight.planes}
        if all(plane.untyped_storage().data_ptr() in own for plane in planes):
            return
        self.background.add(partial(self._write, form, kernel, planes, self._event()))

    def start(self) -> None:
        """Begins to write what is to be kept, whenever nobody is at work, and at the end of the process."""
        if self._contents is not None:
            if self._contents.is_new:
                self.background.add(self._remember)
            self.background.start()

    def _write(self, form: Form, kernel: Kernel, planes: tuple[torch.Tensor, ...], made: Any) -> None:
        if made is not None:
            made.synchronize()
        key = self._key(form, kernel)
        with self._device.platform.on(self._stream), replacing(self._path(key)) as file:
            write_form(file, key, form, planes, self.background.go_on)

    def _remember(self) -> None:
        assert self._contents is not None
        self._contents.remember()

    @cached_property
    def _stream(self) -> Any:
        return self._device.platform.stream(self._device)

    def _failed(self, error: Exception) -> None:
        self._note(f"packed weights are not kept in {_folder()}: {_reason(error)}")

    def _delete_unused(self) -> None:
        """Files, whole ones and parts that a killed process has left."""
        with suppress(*NO_FOLDER):
            for path in Cache("packed").folder.iterdir():
                if time.time() - path.stat().st_mtime > UNUSED:
                    path.unlink(missing_ok=True)

    def _event(self) -> Any:
        """After which the device has made what it was told to; None where it has done so when a call returns."""
        if self._device.platform.host_memory:
            return None
        import torch

        event = torch.Event(self._device.torch)
        event.record()
        return event

    def _key(self, form: Form, kernel: Kernel) -> str:
        assert self._contents is not None
        names, name = form
        contents = [self._contents.of(weight) for weight in names]
        device = platform.machine(), self._device.device_class
        return Cache.key(name, contents, device, self._versions_of(name.partition("/")[0], kernel))[:32]

    def _versions_of(self, backend: str, kernel: Kernel) -> list[Any]:
        known = backend, type(kernel)
        if known not in self._versions:
            found = registry.current().backends.get(backend)
            libraries = library_versions(sorted({"torch", *(found.libraries if found else ())}))
            core = source_hash(PackedCache)
            self._versions[known] = [LAYOUT, kernel.own_version, core, libraries]
        return self._versions[known]

    def _path(self, key: str) -> Path:
        return Cache("packed").folder / key

    def _refuse(self, form: Form, path: Path, why: str) -> None:
        self._note(f"{path} is not used, {form[1]} of {', '.join(form[0])} is packed anew: {why}")

    def _note(self, line: str) -> None:
        self._notes[line] = None


def _folder() -> str:
    """Of the cache, for a person; it may be that there is no home."""
    with suppress(*NO_FOLDER):
        return str(Cache("packed").folder)
    return "the cache"


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)

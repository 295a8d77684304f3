"""The weights' packed forms: what a kernel's `prepare` makes of them, each made once and shared by name.

Enters: nodes with their kernels, a model's weights. Leaves: the form's key, its bytes, its tensors on a device.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING
from weakref import ref

from kernelmux.contract.answers import prepared
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.uploads import Uploads
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import TensorNode
from kernelmux.models.stored import loaded

if TYPE_CHECKING:
    import torch

    from kernelmux.contract.packed_cache import PackedCache
    from kernelmux.contract.packed_file import MappedForm

Form = tuple[tuple[str, ...], str]
"""A packed form: the weights that it is made of, and its name, `backend/form`."""


def packed_form(node: TensorNode, kernel_name: str, kernel: Kernel) -> Form | None:
    """The form that a kernel packs a node's weights into; None where it packs nothing."""
    return packed_key(node, kernel_name, kernel) if node.weights and kernel.packed_bytes(node) else None


def packed_key(node: TensorNode, kernel_name: str, kernel: Kernel) -> Form:
    """What packed weights are shared by: the tensors' names, and the form's name within its backend."""
    backend = kernel_name.partition(":")[0]
    # A backend that has taken another's place may pack otherwise under the same name.
    edition = f" {kernel.edition}" if kernel.edition else ""
    return tuple(value.name for value in node.weights), f"{backend}/{kernel.packed or kernel_name}{edition}"


@dataclass
class PackedWeights:
    """One holder of the weights' packed forms on a device: every node and plan of its that wants a form shares it.

    A model's sessions are a holder each: a form that another one has is not made again, and a form that no holder has
    any more is let go.
    """

    weights: Mapping[str, Weight]
    device: Device
    _everybodys: dict[Form, tuple[ref[torch.Tensor], ...]] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)
    _held: dict[Form, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    made: int = 0
    """Forms that this holder has made."""
    cache: PackedCache | None = None
    """Where forms are kept on disk, if they are."""
    _found: dict[Form, MappedForm] = field(default_factory=dict)
    _uploads: Uploads | None = None

    def holder(self, cache: PackedCache | None = None) -> PackedWeights:
        """Another holder of the same forms, which keeps those that it makes in a cache, and takes them from there."""
        return PackedWeights(self.weights, self.device, self._everybodys, self._lock, cache=cache)

    def adopt(self, other: PackedWeights, forms: Container[Form]) -> None:
        """Holds what another holder has of these forms, too."""
        self._held |= {form: parts for form, parts in other._held.items() if form in forms}

    def get(self, node: TensorNode, kernel_name: str, kernel: Kernel) -> tuple[torch.Tensor, ...]:
        """The packed weights of a node for a kernel, made now if no holder has them."""
        key = packed_key(node, kernel_name, kernel)
        # Without the lock, which whoever makes another form has.
        if (held := self._held.get(key)) is not None:
            return held
        with self._lock:
            form = self._find(key)
            if form is None:
                form = self._make(key, kernel)
                self._everybodys[key] = tuple(map(ref, form))
            return self._held.setdefault(key, form)

    def _make(self, key: Form, kernel: Kernel) -> tuple[torch.Tensor, ...]:
        if (form := self._mapped(key, kernel)) is not None:
            return form
        names, _ = key
        self.made += 1
        uploads = self._uploads
        weights = [loaded(self.weights[name]) if uploads is None else uploads.take(name) for name in names]
        form = prepared(kernel, weights, self.device)
        if uploads is not None:
            for name in names:
                uploads.done(name)
        if self.cache is not None:
            self.cache.keep(key, kernel, form, weights)
            if uploads is None:
                self.cache.start()
        return form

    def _mapped(self, key: Form, kernel: Kernel) -> tuple[torch.Tensor, ...] | None:
        """The form from the cache on disk, if it is there whole."""
        if self.cache is None:
            return None
        uploads = self._uploads
        found = self.cache.find(key, kernel) if uploads is None else self._found.pop(key, None)
        if found is None:
            return None
        there = found.on(self.device.torch) if uploads is None else uploads.take_form(key)
        form = self.cache.checked(there, kernel)
        if uploads is not None:
            uploads.done(key)
        return form

    def find(self, form: Form, kernel: Kernel) -> bool:
        """Whether a form that no holder has is in the cache on disk: within `uploading` it is taken from there."""
        if self.cache is not None and self._find(form) is None:
            found = self.cache.find(form, kernel)
            if found is not None:
                self._found[form] = found
        return form in self._found

    @contextmanager
    def uploading(self, forms: Sequence[Form]) -> Iterator[None]:
        """Within the block `get` is asked for these forms, in this order: what they are made of, or they themselves
        where `find` has found them, travels ahead, each once.
        """
        missing = [form for form in forms if self._find(form) is None]
        wanted = [key for form in missing for key in ((form,) if form in self._found else form[0])]
        self._uploads = Uploads(self.weights, self.device, wanted, dict(self._found))
        try:
            yield
        finally:
            self._uploads.close()
            self._uploads = None
            self._found.clear()

    def _find(self, key: Form) -> tuple[torch.Tensor, ...] | None:
        if key in self._held:
            return self._held[key]
        parts = [part() for part in self._everybodys[key]] if key in self._everybodys else [None]
        alive = tuple(part for part in parts if part is not None)
        return alive if len(alive) == len(parts) else None

    def missing_bytes(self, forms: Mapping[Form, int]) -> int:
        """Of forms with their bytes, how many bytes would have to be made now."""
        return sum(nbytes for form, nbytes in forms.items() if self._find(form) is None)

    def keep(self, forms: Container[Form]) -> None:
        """Lets go of all other forms."""
        self._held = {form: parts for form, parts in self._held.items() if form in forms}

    @property
    def nbytes(self) -> int:
        """Bytes of all packed forms held."""
        return sum(part.nbytes for form in self._held.values() for part in form)

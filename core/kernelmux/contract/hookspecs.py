"""The hooks of a backend: four by which it says what it brings, and one an op, which core makes from its kernels.

A backend is a Python module (or object) with hook implementations, found through the entry point group
`kernelmux.backends`. All that most backends write is `kernel_classes`. The hook of an op is `dispatch_<op>`: it is told
`node`, `device` and what the op's file says (`told`, also on docs/ops.md), names only those arguments that it uses, and
returns an Answer; a backend that has one of its own answers for that op by it alone. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.graph.formats import Format
from kernelmux.graph.ops import Op

CONTRACT = 2
"""The version of the contract. A backend states the one that it was built for as its attribute `CONTRACT`."""

hookspec = pluggy.HookspecMarker("kernelmux")
hookimpl = pluggy.HookimplMarker("kernelmux")


class Hooks:
    """What a backend may say of itself; each is asked at most once a process, `device_refusal` once a device."""

    @hookspec
    def device_refusal(self, device: Device) -> Declined | None:
        """Why it has nothing for a device: wrong kind, too old, a library missing. None: its kernels are asked."""

    @hookspec
    def kernel_classes(self) -> Sequence[type[Kernel]]:
        """The backend's kernels, best first. What they import belongs inside: it is called when a node needs them."""
        return ()

    @hookspec
    def new_ops(self) -> Sequence[Op]:
        """Ops that the backend brings, plain or fused; asked when it is registered, so that a policy can name them."""
        return ()

    @hookspec
    def new_formats(self) -> Sequence[Format]:
        """Weight formats that the backend brings; asked when it is registered, before `new_ops`."""
        return ()

"""The reference backend: every op as its contract defines it, in float32 and in float64."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Kernel, hookimpl

CONTRACT = 2
# Exact and slow: nobody is given it unasked where another backend has a kernel.
LAST_RESORT = True


@hookimpl
def kernel_classes() -> Sequence[type[Kernel]]:
    # Imported here: loading a backend must not load torch.
    from kernelmux_reference.kernels import Float32, Float64

    return [Float32, Float64]

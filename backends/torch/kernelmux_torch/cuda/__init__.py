"""What runs on CUDA alone: GEMMs of cuBLASLt, some with a kernel of kernelmux-triton after them, and attention."""

from __future__ import annotations

from importlib.util import find_spec

from kernelmux.contract.hookspecs import Declined


def without_triton() -> Declined | None:
    """The answer of what needs kernels of kernelmux-triton, where that is not installed."""
    if find_spec("kernelmux_triton") is not None:
        return None
    return Declined("a part of it is a Triton kernel, and kernelmux-triton is not installed", "missing dependency")

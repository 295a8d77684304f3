"""What runs on CUDA alone: GEMMs of cuBLASLt with epilogues, and Triton kernels where torch has no single one."""

from __future__ import annotations

from importlib.util import find_spec

from kernelmux.hookspecs import Declined


def without_triton() -> Declined | None:
    """The answer of what is written in Triton, where that is not installed."""
    if find_spec("triton") is not None:
        return None
    return Declined("it is written in Triton, which comes with torch's CUDA wheels", "missing dependency")

"""What the machine can do at best, measured now: bytes copied, bytes read, and multiplications of large matrices."""

from __future__ import annotations

from functools import partial
from typing import Any

from kernelmux.contract.device import Ceilings, Device
from kernelmux.measure.timing import time_launches


def measure_ceilings(device: Device, nbytes: int = 0, size: int = 0) -> Ceilings:
    """Measures them; `nbytes` of memory and matrices of `size` x `size`, by default enough to outrun any cache."""
    import torch

    platform = device.platform
    nbytes, size = nbytes or platform.copied_bytes, size or platform.matrix_size
    source = torch.zeros(nbytes // 4, device=device.torch)
    target, total = torch.empty_like(source), torch.empty((), device=device.torch)
    # A driver's copy and an elementwise kernel: either may be the faster.
    ways = (partial(target.copy_, source), partial(torch.neg, source, out=target))
    copied = min(time_launches([way], device).median for way in ways)
    read = time_launches([partial(torch.sum, source, 0, out=total)], device)
    del source, target
    gemm = {
        format: 2 * size**3 / time_launches([_gemm(format, size, device)], device).median * 1e6
        for format in platform.gemm_formats(device)
    }
    return Ceilings(2 * nbytes / copied * 1e6, nbytes / read.median * 1e6, gemm)


def _gemm(format: str, size: int, device: Device) -> partial[Any]:
    """torch's own multiplication of two square matrices."""
    import torch

    if format == "fp8":
        a, b = (torch.randn(size, size, device=device.torch).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device.torch)
        return partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device.torch, dtype=dtype) for _ in range(2))
    return partial(torch.mm, a, b.t(), out=torch.empty_like(a))


def gemm_ceiling(ceilings: Ceilings, formats: tuple[str, ...]) -> float | None:
    """The GEMM that a kernel with operands in these formats is measured against; None where none was measured."""
    if any(format.startswith("fp8") for format in formats):
        return ceilings.gemm.get("fp8")
    return ceilings.gemm.get("f32" if "f32" in formats else "bf16")

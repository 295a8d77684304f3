"""The CuPy backend: CUDA C kernels, compiled for the card at hand by NVRTC."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Declined, Device, Kernel, hookimpl
from kernelmux_cupy.source import refusal

CONTRACT = 2


@hookimpl
def device_refusal(device: Device) -> Declined | None:
    return refusal(device)


@hookimpl
def kernel_classes() -> Sequence[type[Kernel]]:
    # Imported here: loading a backend must load neither torch nor CuPy.
    from kernelmux_cupy import attention, convert, copy, elementwise, embed, mul_mat, norm, rope

    return [
        *(mul_mat.Dp4a, mul_mat.Dp4aGateUpSwiglu, mul_mat.Bf16, mul_mat.F16),
        *(attention.Attention, rope.Rope, copy.Copy),
        *(norm.RmsNorm, norm.AddRmsNorm, elementwise.Elementwise),
        *(embed.Embed, convert.Convert),
    ]

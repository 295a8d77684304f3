"""The Triton backend: products of few rows and in fp8, paged attention, and what stands between products."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from kernelmux.contract import Declined, Device, Kernel, hookimpl

CONTRACT = 2


@hookimpl
def device_refusal(device: Device) -> Declined | None:
    if device.kind != "cuda":
        return Declined(f"its kernels run on CUDA, the plan is for {device.kind}", "device")
    if device.capability is not None and device.capability < (8, 0):
        major, minor = device.capability
        return Declined(f"Triton needs compute capability 8.0, {device.name} has {major}.{minor}", "capability")
    if find_spec("triton") is None:
        return Declined("Triton is not installed: install triton", "missing dependency")
    return None


@hookimpl
def kernel_classes() -> Sequence[type[Kernel]]:
    # Imported here: loading a backend must load neither torch nor Triton.
    from kernelmux_triton import (
        convert,
        copy,
        decode,
        elementwise,
        embed,
        experts,
        few_rows,
        fp8,
        norm,
        prefill,
        rope,
        rope_copy,
    )

    return [
        *(few_rows.Dequant, few_rows.Bf16, few_rows.F16, few_rows.Fp8Weight),
        *(fp8.Fp8Row, fp8.Fp8Tensor, fp8.Fp8RowFast, fp8.Fp8TensorFast, fp8.Fp8Block),
        *(fp8.Fp8RowStacked, fp8.Fp8RowFastStacked, fp8.Fp8BlockStacked),
        *(decode.Decode, decode.DecodeF32, prefill.Prefill, prefill.PrefillF32),
        *(norm.RmsNorm, norm.AddRmsNorm, norm.QkNorm),
        *(elementwise.Elementwise, elementwise.Swiglu, elementwise.ClampedSwiglu, elementwise.Temper),
        *(rope.Rope, rope_copy.RopeCopy, copy.Copy),
        *(embed.Bf16, embed.F32, embed.Rows),
        *(experts.Route, experts.ExpertSum),
        *(experts.MulMatIdDequant, experts.MulMatIdBf16, experts.MulMatIdF16, experts.MulMatIdF32),
        *(convert.Convert, convert.Quantize, convert.Dequantize, convert.Requantize),
        *(convert.QuantizeWhole, convert.RequantizeWhole),
    ]

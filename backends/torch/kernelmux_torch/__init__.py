"""The torch backend: cuBLASLt and SDPA on CUDA, oneDNN and packed int4 on the CPU, plain torch calls between them."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Kernel, hookimpl

CONTRACT = 2


@hookimpl
def kernel_classes() -> Sequence[type[Kernel]]:
    # Imported here: loading a backend must not load torch.
    from kernelmux_torch import attention, convert, copy, elementwise, embed, experts, fp8, mul_mat, rms_norm, rope
    from kernelmux_torch.cuda import attention as cuda_attention
    from kernelmux_torch.cuda import copy as cuda_copy
    from kernelmux_torch.cuda import embed as cuda_embed
    from kernelmux_torch.cuda import experts as cuda_experts
    from kernelmux_torch.cuda import mul_mat as cuda_mul_mat
    from kernelmux_torch.cuda import rms_norm as cuda_rms_norm

    return [
        *(mul_mat.Bf16, mul_mat.F32, mul_mat.Int4, mul_mat.Int4Groups, mul_mat.Int8),
        *(cuda_mul_mat.Bf16, cuda_mul_mat.F16, cuda_mul_mat.F32, cuda_mul_mat.Bf16Add),
        *(fp8.Fp8Tensor, fp8.Fp8Row, fp8.Fp8TensorFast, fp8.Fp8RowFast, fp8.Fp8Block),
        *(attention.Sdpa, cuda_attention.Gathered, cuda_attention.Sdpa, cuda_attention.SdpaHalf),
        *(elementwise.Add, elementwise.Mul, elementwise.Scale),
        *(elementwise.Silu, elementwise.Gelu, elementwise.SoftCap, elementwise.ClampedSwiglu),
        elementwise.Temper,
        *(rms_norm.RmsNorm, rms_norm.QkNorm, cuda_rms_norm.RmsNorm, cuda_rms_norm.QkNorm),
        *(rope.Rope, copy.Copy, cuda_copy.Copy),
        *(cuda_embed.Bf16, cuda_embed.F32, embed.Rows),
        *(experts.Route, experts.MulMatId, experts.MulMatIdBf16, experts.ExpertSum),
        *(cuda_experts.Route, cuda_experts.MulMatId, cuda_experts.MulMatIdBf16, cuda_experts.ExpertSum),
        *(convert.Convert, convert.Quantize, convert.Dequantize),
    ]

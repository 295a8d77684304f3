"""The numba backend: CPU kernels in numba and LLVM's vectors, which can be chained into one call."""

from __future__ import annotations

from collections.abc import Sequence

from kernelmux.contract import Kernel, hookimpl

CONTRACT = 2


@hookimpl
def kernel_classes() -> Sequence[type[Kernel]]:
    # Imported here: loading a backend must load neither torch nor numba.
    from kernelmux_numba import attention, convert, copy, elementwise, embed, experts, fused, mul_mat, norm, rope

    return [
        *(mul_mat.Int16, mul_mat.Float, experts.Int16Experts, attention.Attention),
        *(norm.RmsNorm, norm.AddRmsNorm, elementwise.Elementwise, elementwise.Swiglu),
        *(fused.Int16GateUpSwiglu, fused.FloatGateUpSwiglu),
        *(fused.Int16QkvRopeCopy, fused.FloatQkvRopeCopy),
        *(embed.Rows, rope.Rope, rope.RopeCopy, copy.Copy, convert.Convert),
    ]

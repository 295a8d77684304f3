"""The CPU's plain torch kernels as they are on CUDA: right, in several launches each."""

from __future__ import annotations

from kernelmux_torch import convert, copy, elementwise, rms_norm, rope


class RmsNorm(rms_norm.RmsNorm):
    # Five calls, and a fill before the norm of a row that torch splits over blocks.
    launches = 6


class Rope(rope.Rope):
    # Three for the turns; of q and of k the halves gathered, turned and written, and the part that passes.
    launches = 15


class Silu(elementwise.Silu):
    # Where it writes another format than it reads, through float32 scratch.
    launches = 3


class Copy(copy.Copy):
    # The host waits for the slots: what torch makes of `nonzero` and of the indexing.
    launches = 20


class Quantize(convert.Quantize):
    # By scale, sums and rounding: whole tensors pass about twenty times.
    launches = 24


class Dequantize(convert.Dequantize):
    launches = 6

"""The ops: one file each, with contract, float64 reference, cost and conformance cases.

To add one, copy a neighbour's file and name it in OPS; its hook in `hookspecs.py` is `dispatch_<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux.ops.add import Add
from kernelmux.ops.attention import Attention
from kernelmux.ops.convert import Convert
from kernelmux.ops.copy import Copy
from kernelmux.ops.embed import Embed
from kernelmux.ops.mul import Mul
from kernelmux.ops.mul_mat import MulMat
from kernelmux.ops.op import Case, Cost, Op, Operands
from kernelmux.ops.rms_norm import RmsNorm
from kernelmux.ops.rope import Rope, Rotation
from kernelmux.ops.silu import Silu

OPS: Mapping[str, Op] = {
    op.name: op for op in (MulMat(), RmsNorm(), Add(), Rope(), Attention(), Copy(), Mul(), Silu(), Embed(), Convert())
}

__all__ = ["OPS", "Case", "Cost", "Op", "Operands", "Rotation"]

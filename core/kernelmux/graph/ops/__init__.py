"""The ops: one file each, with contract, float64 reference, cost and conformance cases.

To add one, copy a neighbour's file and name it here; a backend brings its own by `new_ops`. Its hook is
`dispatch_<name>`, told what the op's `told` says.
"""

from __future__ import annotations

from kernelmux.graph.ops.add import Add
from kernelmux.graph.ops.add_rms_norm import AddRmsNorm
from kernelmux.graph.ops.attention import Attention
from kernelmux.graph.ops.cases import Case
from kernelmux.graph.ops.clamped_swiglu import ClampedSwiglu
from kernelmux.graph.ops.convert import Convert
from kernelmux.graph.ops.copy import Copy
from kernelmux.graph.ops.embed import Embed
from kernelmux.graph.ops.expert_sum import ExpertSum
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.gate_up_swiglu import GateUpSwiglu
from kernelmux.graph.ops.gelu import Gelu
from kernelmux.graph.ops.mul import Mul
from kernelmux.graph.ops.mul_mat import MulMat
from kernelmux.graph.ops.mul_mat_add import MulMatAdd
from kernelmux.graph.ops.mul_mat_id import MulMatId
from kernelmux.graph.ops.mul_mat_pair import MulMatPair
from kernelmux.graph.ops.op import Cost, Op, Operands
from kernelmux.graph.ops.qk_norm import QkNorm
from kernelmux.graph.ops.qkv import Qkv
from kernelmux.graph.ops.qkv_rope_copy import QkvRopeCopy
from kernelmux.graph.ops.rms_norm import RmsNorm
from kernelmux.graph.ops.rope import Rope, Rotation
from kernelmux.graph.ops.rope_copy import RopeCopy
from kernelmux.graph.ops.route import Route
from kernelmux.graph.ops.scale import Scale
from kernelmux.graph.ops.silu import Silu
from kernelmux.graph.ops.soft_cap import SoftCap
from kernelmux.graph.ops.swiglu import Swiglu
from kernelmux.graph.ops.temper import Temper

_PLAIN: tuple[Op, ...] = (
    MulMat(),
    RmsNorm(),
    Add(),
    Rope(),
    Attention(),
    Copy(),
    Mul(),
    Silu(),
    Embed(),
    Convert(),
    Gelu(),
    Scale(),
    SoftCap(),
    QkNorm(),
    Route(),
    MulMatId(),
    ExpertSum(),
    ClampedSwiglu(),
    Temper(),
)
_FUSED = (AddRmsNorm(), Swiglu(), Qkv(), GateUpSwiglu(), MulMatAdd(), QkvRopeCopy(), RopeCopy(), MulMatPair())

OPS: dict[str, Op] = {op.name: op for op in (*_PLAIN, *_FUSED)}
"""Every op by name. A backend that brings a fused op of its own adds it here when it is registered."""

CORE_OPS = frozenset(OPS)


def fused_ops() -> list[Fused]:
    """The fused ops, in the order in which they are tried where two could stand at one place."""
    return [op for op in OPS.values() if isinstance(op, Fused)]


__all__ = ["CORE_OPS", "OPS", "Case", "Cost", "Fused", "Op", "Operands", "Part", "Rotation", "fused_ops"]

"""The error that `auto` lets a kernel add: no more than its weight's own storage has added already.

Enters: a node, a kernel. Leaves: NMSE, on the scale of the bounds that kernels declare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelmux.contract.kernel import Kernel
from kernelmux.graph.formats import INT4_WEIGHTS, Value, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions

if TYPE_CHECKING:
    from kernelmux.plan.formats import Step
    from kernelmux.plan.plan import Plan

EXACT = 1e-6
"""Of nodes without weights, and of weights in float32."""
HALF = 8e-5
"""Of weights in 16 bits, and of those that lose less: what bfloat16 activations, read and written, may add."""
STORED = {
    **{"Q2_K": 1e-1, "Q3_K": 3e-2, "Q4_0": 7e-3, "Q4_1": 7e-3, "Q4_K": 7e-3},
    **{"Q5_0": 2e-3, "Q5_1": 2e-3, "Q5_K": 2e-3, "Q6_K": 4e-4, "Q8_0": 2e-4},
    **{"fp8_tensor": 1e-2, "fp8_row": 1e-2, "fp8_128x128": 1e-2},
    **dict.fromkeys(INT4_WEIGHTS, 7e-3),
}
"""NMSE that storing normal noise in a format costs; what is not here counts as HALF. Of FP8 what kernels declare whose
activations are stored as the weights are: these add as much again as the weights, and files of such weights are made
for them."""


def default_budget(node: TensorNode) -> float:
    """What a kernel of a node may add where its policy says nothing: what the most exact of its weights allows."""
    matrices = [value.format for value in node.weight if len(value.shape) == 2]
    if not matrices:
        return HALF
    return min(EXACT if format == "f32" else max(HALF, STORED.get(format, HALF)) for format in matrices)


def may_overflow(kernel: Kernel, node: TensorNode) -> bool:
    """Whether a kernel takes activations in float16 alone, which ends at 65504, of a model whose weights are not."""
    reads = (
        accepted for value, accepted in zip(node.inputs, kernel.inputs(node), strict=True) if value.format == "f32"
    )
    return any(set(accepted) == {"f16"} for accepted in reads) and any(w.format != "f16" for w in node.weight)


def added_error(kernel: Kernel, node: TensorNode) -> float:
    """A kernel's own bound, and what is lost where it reads or writes float32 in no format but a narrow one."""
    reads = (_lost(value, accepted) for value, accepted in zip(node.inputs, kernel.inputs(node), strict=True))
    writes = (_lost(value, emitted) for value, emitted in zip(node.outputs, kernel.outputs(node), strict=True))
    return kernel.precision + sum(reads) + max(writes)


def _lost(value: Value, formats: Sequence[str]) -> float:
    """What storing a value in the best of these formats costs beyond the graph's own, where that is float32."""
    if value.format != "f32":
        return 0.0
    return min(lookup(format).rounding for format in formats) - lookup(value.format).rounding


def less_exact(plan: Plan, m: int, outs: int) -> list[str]:
    """The kernels whose error is over what the default takes of the nodes that they have, or that round logits."""
    fusions = find_fusions(plan.graph, fused_ops())
    nodes = {node.name: node for node in (*plan.graph.ops, *(fusion.node for fusion in fusions))}
    over = {
        f"{step.node.op} {step.choice.name}": None
        for step in plan.schedule(m, outs).steps
        # A conversion's loss counts against the kernel that reads so narrow a format.
        if (node := nodes.get(step.node.name))
        and (added_error(step.choice.kernel, node) > default_budget(node) or _rounds(plan, step, node))
    }
    return list(over)


def _rounds(plan: Plan, step: Step, stated: TensorNode) -> bool:
    """Whether what the graph hands back is rounded before it is as the graph states it: distinct logits may tie."""
    rounded = bool(step.choice.kernel.rounds_to)
    pairs = zip(step.node.outputs, stated.outputs, strict=True)
    return any(rounded or mine.format != theirs.format for mine, theirs in pairs if theirs.name in plan.graph.answers)

"""Kernels that are right on small and plain cases, and wrong at one size, attribute or value that real models have."""

from __future__ import annotations

import torch

from wrong.kernel import Right, planted


def wrong_where(op, name, where, first=""):
    """Plants a kernel whose results are half as large again where `where(node, operands)` holds."""

    def answer(self, node, operands):
        results = Right.answer(self, node, operands)
        return tuple(1.5 * result for result in results) if where(node, operands) else results

    planted(op, "error", first=f"*-drawn:*{first}*")(type(name, (Right,), {"answer": answer, "__module__": __name__}))


def lengths(operands):
    return operands.inputs[4]


def decodes_alone(operands):
    """Whether each sequence has one row."""
    return bool((operands.inputs[3].diff() == 1).all())


def superblocks(node):
    weight = node.weight[0]
    return weight.extents[1] // 256 if weight.format.endswith("_K") else 0


wrong_where("attention", "Above512Pages", lambda node, given: node.inputs[5].extents[1] > 512, "context=8193")
wrong_where("attention", "Above8192Keys", lambda node, given: int(lengths(given).max()) > 8192, "context=8193")
wrong_where(
    "attention", "Above8QueryHeadsAKvHead", lambda node, given: node.num_heads > 8 * node.num_kv_heads, "heads=64+1"
)
wrong_where("attention", "Above256Sequences", lambda node, given: node.inputs[4].extents[0] > 256, "sequences=257")
wrong_where(
    "attention",
    "DecodesWithAScaleOfItsOwn",
    lambda node, given: decodes_alone(given) and abs(node.scale * node.head_dim**0.5 - 1) > 1e-6,
    "scale",
)
wrong_where("mul_mat", "ABiasOf128Rows", lambda node, given: node.bias and node.rows == 128, "m=128,*bias")
wrong_where(
    "mul_mat", "ABiasOf2048Inputs", lambda node, given: node.bias and node.inputs[0].extents[1] == 2048, "k=2048,*bias"
)
wrong_where("mul_mat", "FourRows", lambda node, given: node.rows == 4, "m=4,")
wrong_where("mul_mat", "OddSuperblocks", lambda node, given: superblocks(node) % 2 and superblocks(node) > 1, "_K")
wrong_where(
    "rope",
    "Theta5e5AtHeadsOf128",
    lambda node, given: node.rotation.theta == 5e5 and node.head_dim == 128,
    "theta=500000",
)
wrong_where(
    "rope",
    "YarnOfPartOfAHead",
    lambda node, given: node.rotation.scaling == "yarn" and node.rotation.dims < node.head_dim,
    "part=*yarn",
)
wrong_where("copy", "RowsAbove1024", lambda node, given: node.inputs[0].extents[1] > 1024)
wrong_where("copy", "PagesOf24", lambda node, given: node.inputs[3].extents[1] == 24, "page_size=24")
wrong_where("embed", "5120Columns", lambda node, given: node.weight and node.weight[0].extents[1] == 5120, "k=5120")
wrong_where("rms_norm", "20480Columns", lambda node, given: node.inputs[0].extents[1] == 20_480, "k=20480")
wrong_where("add_rms_norm", "SumsOf20480Columns", lambda node, given: node.inputs[0].extents[1] == 20_480, "k=20480")
wrong_where("silu", "AllFarBelowZero", lambda node, given: bool((given.inputs[0] < -24).all()), "far-below")

for scaling in ("linear", "llama3", "yarn"):
    wrong_where(
        "qkv_rope_copy",
        f"TurnsBy{scaling.capitalize()}",
        lambda node, given, scaling=scaling: node.rotation.scaling == scaling,
        f"scaling={scaling}",
    )


@planted("convert", "error", first="*source=f16*subnormals*")
class FlushesF16Subnormals(Right):
    def read(self, node, tensors):
        operands = super().read(node, tensors)
        if node.inputs[0].format == "f16":
            (x,) = operands.inputs
            x[x.abs() < torch.finfo(torch.float16).smallest_normal] = 0
        return operands


@planted("convert", "finite", first="*nan-and*")
class ConvertsNanToZero(Right):
    def answer(self, node, operands):
        return tuple(result.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for result in operands.inputs)


@planted("convert", "finite", first="*nan-and*")
class ClampsInfinity(Right):
    def answer(self, node, operands):
        return tuple(result.clamp(-65504, 65504) for result in operands.inputs)


wrong_where("attention", "Above64Heads", lambda node, given: node.num_heads > 64, "heads=128+8")
wrong_where("attention", "SixHeadsAKvHead", lambda node, given: node.num_heads == 6 * node.num_kv_heads, "heads=48+8")
wrong_where("attention", "HeadsOf160", lambda node, given: node.head_dim == 160, "dim=160")
wrong_where(
    "attention",
    "WindowsAbove2048",
    lambda node, given: 2048 < (node.window or 0) < int(lengths(given).max()),
    "window=4096",
)
wrong_where("rope", "Llama3By32", lambda node, given: node.rotation.factor == 32 and node.rotation.scaling == "llama3")
wrong_where(
    "rope",
    "YarnOfAMagnitudeOfItsOwn",
    lambda node, given: node.rotation.scaling == "yarn" and bool(node.rotation.attention_factor),
)
wrong_where("swiglu", "28672Columns", lambda node, given: node.inputs[0].extents[1] == 28_672, "k=28672")

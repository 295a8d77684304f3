"""The kernels of mixtures of experts, compiled for an H100 as they would be bound: they fit, and spill little."""

import pytest
import torch

from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux_triton.mul_mat_weights import stored

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from kernelmux_triton import experts  # noqa: E402
from triton_compiled import SHARED, compile_for_h100, planes_of  # noqa: E402

SPILLED = 32
"""Bytes a thread."""
EXPERTS, TOP_K, N, K = 128, 8, 768, 2048


def product(m, form, bias=False, own=False, x_format="bf16"):
    x, ids = Value("x", (m, TOP_K * K if own else K), x_format), Value("ids", (m, TOP_K), "i32")
    fields = {"weight": (Value("w", (EXPERTS * N, K), form),), "experts": EXPERTS}
    fields["bias"] = (Value("b", (EXPERTS * N,)),) if bias else ()
    return make_node("mul_mat_id", "y", x, ids, format="bf16", **fields)


def routing(**fields):
    return make_node("route", "y", Value("x", (9, 128), "bf16"), top_k=TOP_K, **fields)


NODES = {
    "route": (experts.Route(), routing()),
    "route renormalized": (experts.Route(), routing(renormalize=True)),
    "route by sigmoids": (experts.Route(), routing(sigmoid=True)),
    "sum": (
        experts.ExpertSum(),
        make_node("expert_sum", "y", Value("x", (9, 8 * 2880), "bf16"), Value("weights", (9, 8))),
    ),
}
for kernel, form in (
    (experts.MulMatIdF32(), "f32"),
    (experts.MulMatIdBf16(), "bf16"),
    *((experts.MulMatIdDequant(), form) for form in ("Q4_0", "Q8_0", "Q4_K")),
):
    for m in (1, 64, 4096):
        NODES[f"{form} m{m}"] = (kernel, product(m, form, bias=m == 64, own=m == 4096))


@pytest.mark.parametrize(("kernel", "node"), NODES.values(), ids=NODES)
def test_it_compiles_and_fits(monkeypatch, tmp_path, kernel, node):
    bound = []
    monkeypatch.setattr(experts, "bind", lambda *args, num_warps, **_: bound.append((args[0], args[2:], num_warps)))
    form = node.weight[0].format if node.weight else ""
    planes = stored(node, form) if form else []
    packed = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in planes)
    scratch = torch.empty(kernel.workspace(node), dtype=torch.uint8, device="meta")
    inputs, outputs = (tuple(map(planes_of, values)) for values in (node.inputs, node.outputs))
    kernel.bind(node, Tensors(inputs, outputs, packed, scratch), None)
    assert bound
    for jitted, args, warps in bound:
        needs = compile_for_h100(jitted, args, warps, tmp_path)
        assert needs.shared <= SHARED
        assert needs.spilled <= SPILLED

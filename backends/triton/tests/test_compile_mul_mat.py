"""Every kernel of mul_mat in every tiling, compiled for an H100 as it would be bound: it fits, loops spill nothing."""

import pytest
import torch

from kernelmux.contract import Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux_triton.mul_mat_weights import stored

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from kernelmux_triton import few_rows, few_rows_tilings, fp8  # noqa: E402
from triton_compiled import SHARED, compile_for_h100, planes_of  # noqa: E402

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))
SPILLED = 32
"""Bytes a thread: some ptxas keeps so many of an epilogue, outside of any loop."""
N, K = 4096, 4096


def launches(monkeypatch, kernel, op, m, x_format, y_format="bf16", n=N, k=K, bias=False, form=None):
    """The kernels, arguments and warps that a node is bound to, its tensors without memory."""
    bound = []
    for module in (few_rows, fp8):
        monkeypatch.setattr(module, "bind", lambda *args, num_warps, **_: bound.append((args[0], args[2:], num_warps)))
    form = getattr(kernel, "form", "Q4_K") if form is None else form
    count = {"gate_up_swiglu": 2, "qkv": 3, "mul_mat_pair": 2}.get(op, 1)
    inputs = [Value("x", (m, k), x_format)] + ([Value("residual", (m, n), "bf16")] if op == "mul_mat_add" else [])
    weight = tuple(Value(f"w{i}", (n, k), form) for i in range(count))
    biases = tuple(Value(f"b{i}", (n,)) for i in range(count)) if bias else ()
    node = make_node(op, "y", *inputs, weight=weight, bias=biases, format=y_format)
    packed = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in stored(node, form))
    scratch = torch.empty(kernel.workspace(node), dtype=torch.uint8, device="meta")
    inputs, outputs = (tuple(map(planes_of, values)) for values in (node.inputs, node.outputs))
    kernel.bind(node, Tensors(inputs, outputs, packed, scratch), None)
    assert bound
    return bound


def tiled(kernel, tiling=None):
    """The kernel for the card, with that tiling."""
    made = kernel()
    made.device, made.variant = H100, tiling
    return made


def few():
    """Every weight in every tiling, at the most rows that it takes."""
    kernels = [
        (few_rows.Dequant, form, "bf16") for form in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "int4_128", "int4_row_bf16")
    ]
    kernels += [(few_rows.Fp8Weight, None, "bf16"), (few_rows.Bf16, None, "bf16"), (few_rows.F16, None, "f16")]
    for kernel, form, x_format in kernels:
        for tiling in (*few_rows_tilings.GEMV, *few_rows_tilings.DOT):
            m = 4 if isinstance(tiling, few_rows_tilings.Gemv) else 64
            yield pytest.param(tiled(kernel, tiling), m, x_format, form, id=f"{kernel.name}-{form or ''}-{tiling}")
    for kernel in (fp8.Fp8Row, fp8.Fp8TensorFast, fp8.Fp8Block):
        for tiling in kernel.reads.tilings(16):
            yield pytest.param(tiled(kernel, tiling), 64, kernel.taken, None, id=f"{kernel.name}-{tiling}")


def many():
    for kernel in (fp8.Fp8Row, fp8.Fp8RowFast, fp8.Fp8Block):
        for gated in (False, True):
            for tiling in kernel().gemms(gated):
                for y_format in ("bf16",) if gated else ("bf16", "f32"):
                    op = "gate_up_swiglu" if gated else "mul_mat"
                    yield pytest.param(tiled(kernel, tiling), op, y_format, id=f"{kernel.name}-{tiling}-{y_format}")


def check(monkeypatch, tmp_path, *node, spilled=SPILLED, **sizes):
    for kernel, args, warps in launches(monkeypatch, *node, **sizes):
        needs = compile_for_h100(kernel, args, warps, tmp_path)
        assert needs.shared <= SHARED
        assert needs.spilled <= spilled


@pytest.mark.parametrize(("kernel", "m", "x_format", "form"), list(few()))
def test_few_rows(kernel, m, x_format, form, monkeypatch, tmp_path):
    check(monkeypatch, tmp_path, kernel, "mul_mat", m, x_format, form=form)


@pytest.mark.parametrize(("kernel", "op", "y_format"), list(many()))
def test_many_rows(kernel, op, y_format, monkeypatch, tmp_path):
    check(monkeypatch, tmp_path, kernel, op, 2048, kernel.taken, y_format)


@pytest.mark.parametrize("op", ["mul_mat_add", "gate_up_swiglu", "qkv", "mul_mat_pair"])
@pytest.mark.parametrize("m", [1, 16])
def test_fused(op, m, monkeypatch, tmp_path):
    for kernel in (tiled(few_rows.Dequant), tiled(few_rows.Fp8Weight)):
        check(monkeypatch, tmp_path, kernel, op, m, "bf16", bias=True)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (31, 512)])
@pytest.mark.parametrize("m", [1, 3, 17])
def test_extents_that_divide_nothing(n, k, m, monkeypatch, tmp_path):
    check(monkeypatch, tmp_path, tiled(few_rows.Bf16), "mul_mat", m, "f32", "f32", n=n, k=k, spilled=512)

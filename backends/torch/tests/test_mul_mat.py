"""Dense mul_mat and mul_mat_add on CUDA, as far as a machine without one shows them."""

from __future__ import annotations

import pytest
import torch

from kernelmux.conformance.testing import nmse, one_node
from kernelmux.contract import Tensors, registry, weights
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, Weight
from kernelmux_torch import mul_mat
from kernelmux_torch.cuda import mul_mat as on_cuda

CARD = Device("cuda", 0, "some card", (9, 0))
X, W = Value("x", (2, 16)), Value("w", (32, 16))


def node(op):
    return one_node(op, X, *([Value("r", (2, 32))] if op == "mul_mat_add" else []), weight=(W,))


def offered(op, device=CARD):
    return registry.current().offer(node(op), device, only="torch")


def test_cuda_has_bf16_first_and_refuses_the_cpus_kernels_by_name():
    offer = offered("mul_mat")
    assert [name for name in offer.kernels if ":fp8" not in name] == ["torch:bf16", "torch:f16", "torch:f32"]
    assert {name: offer.declined[name].kind for name in ("torch:int4", "torch:int8")} == {
        "torch:int4": "device",
        "torch:int8": "device",
    }


@pytest.mark.parametrize(("features", "order"), [({"bf16"}, ["bf16", "f32"]), (set(), ["f32", "bf16"])])
def test_the_cpu_has_bf16_before_f32_where_its_products_are_native(features, order):
    offer = offered("mul_mat", Device("cpu", features=frozenset(features)))
    assert [name for name in offer.kernels if name in ("torch:bf16", "torch:f32")] == [
        f"torch:{name}" for name in order
    ]


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_f32_is_not_bound_where_torch_would_round_to_tf32(tf32):
    """Asking is no matter of the process: the answer would not be the same in another."""
    assert "torch:f32" in offered("mul_mat").kernels
    x, y, weight = (torch.randn(shape) for shape in ((2, 16), (2, 32), (32, 16)))
    with pytest.raises(RuntimeError, match=r"TF32: set torch\.backends\.cuda\.matmul\.fp32_precision"):
        on_cuda.F32().bind(node("mul_mat"), Tensors((x,), (y,), (weight,)), None)


def test_a_plain_weight_that_lies_where_it_should_is_not_copied():
    planes = (torch.randn(4, 8).to(torch.bfloat16),)
    weight = Weight("w", (4, 8), "bf16", planes)
    assert weights.dense(weight, torch.bfloat16, Device("cpu")).data_ptr() == planes[0].data_ptr()


def test_mul_mat_and_mul_mat_add_share_one_packed_form():
    plain, fused = on_cuda.Bf16, on_cuda.Bf16Add
    assert (plain.name, plain.packed, plain.dtype) == (fused.name, fused.packed, fused.dtype)
    assert on_cuda.Bf16.packed == mul_mat.Bf16.packed


def test_mul_mat_add_takes_no_bias():
    biased = one_node("mul_mat_add", X, Value("r", (2, 32)), weight=(W,), bias=(Value("b", (32,)),))
    offer = registry.current().offer(biased, CARD, only="torch")
    assert (offer.kernels, offer.declined["torch:bf16"].reason) == ({}, "it takes bias False, not True")


def test_mul_mat_add_writes_no_float16_where_a_residual_outgrows_it():
    assert list(offered("mul_mat_add").kernels) == ["torch:bf16"]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_residual_is_added_whether_or_not_the_result_lies_over_it(in_place):
    kernel = on_cuda.Bf16Add()
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*s, generator=generator).to(kernel.dtype) for s in ((3, 16), (3, 8), (8, 16)))
    values = Value("x", (3, 16), kernel.name), Value("residual", (3, 8), kernel.name)
    node = one_node("mul_mat_add", *values, weight=(Value("w", (8, 16), kernel.name),), format=kernel.name)
    wanted = residual.double() + x.double() @ weight.double().T
    # Another object over the same memory, as a plan makes it.
    y = residual.view(3, 8) if in_place else torch.empty_like(residual)
    kernel.bind(node, Tensors((x, residual), (y,), (weight,)), None)()
    assert nmse(y, wanted) < 1e-4

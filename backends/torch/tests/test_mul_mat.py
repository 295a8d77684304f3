"""Dense mul_mat and mul_mat_add on CUDA, as far as a machine without one shows them."""

from __future__ import annotations

import pytest
import torch

from fake_backend import nmse, one_node
from kernelmux.contract.device import Device
from kernelmux.contract.hookspecs import Declined, Tensors
from kernelmux.graph.formats import Value, Weight
from kernelmux_torch import mul_mat, weights
from kernelmux_torch.cuda import mul_mat as on_cuda


def test_cuda_has_bf16_first_and_refuses_the_cpus_kernels_by_name():
    offered = on_cuda.offer()
    assert [answer.name for answer in offered if not isinstance(answer, Declined)] == ["bf16", "f16", "f32"]
    refused = {answer.kernel: answer.kind for answer in offered if isinstance(answer, Declined)}
    assert refused == {"int4": "device", "int8": "device"}


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_f32_is_not_offered_where_torch_would_round_to_tf32(tf32):
    (refused,) = [answer for answer in on_cuda.offer() if getattr(answer, "kernel", "") == "f32"]
    assert "TF32" in refused.reason


def test_a_plain_weight_that_lies_where_it_should_is_not_copied():
    planes = (torch.randn(4, 8).to(torch.bfloat16),)
    weight = Weight("w", (4, 8), "bf16", planes)
    assert weights.dense(weight, torch.bfloat16, Device("cpu")).data_ptr() == planes[0].data_ptr()


def test_mul_mat_and_mul_mat_add_share_one_packed_form():
    plain, fused = on_cuda.Bf16, on_cuda.Bf16Add
    assert (plain.name, plain.packed, plain.dtype) == (fused.name, fused.packed, fused.dtype)
    assert on_cuda.Bf16.packed == mul_mat.Bf16.packed


def test_mul_mat_add_takes_no_bias():
    assert isinstance(on_cuda.offer_add(bias=True), Declined)


def test_mul_mat_add_writes_no_float16_where_a_residual_outgrows_it():
    offers = on_cuda.offer_add(bias=False)
    assert [offer.kernel for offer in offers if isinstance(offer, Declined)] == ["f16"]


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

"""fp8 weights: how they are packed, what torch's GEMM makes of them, and which cards and shapes are refused."""

from __future__ import annotations

import pytest
import torch

from kernelmux.conformance.testing import nmse, one_node
from kernelmux.contract import Kernel, Tensors, registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, Weight, dequantize_planes, empty_planes, quantize_planes
from kernelmux_torch import fp8

CPU = Device("cpu")


def card(*capability):
    return Device("cuda", 0, "some card", capability)


def stored(format, n=256, k=512, seed=0):
    """A weight of noise in one of kernelmux's own formats, or a plain one."""
    value = Value("w", (n, k), format)
    planes = empty_planes(value)
    quantize_planes(format, torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), planes)
    return Weight("w", (n, k), format, planes)


def answers(device, n=256, k=512, bias=False):
    """By name what is offered, or the kind of the refusal."""
    fields = {"weight": (Value("w", (n, k)),), "bias": (Value("b", (n,)),) if bias else ()}
    offer = registry.current().offer(one_node("mul_mat", Value("x", (4, k)), **fields), device, only="torch")
    found = dict.fromkeys(offer.kernels, "offered") | {name: why.kind for name, why in offer.declined.items()}
    return {name.removeprefix("torch:"): what for name, what in found.items() if ":fp8" in name}


def test_hopper_has_all_of_them():
    assert set(answers(card(9, 0)).values()) == {"offered"}


def test_what_a_card_cannot_do_is_declined_for_its_capability():
    assert set(answers(card(8, 6)).values()) == {"capability"}
    ada = answers(card(8, 9))
    assert ada == {
        "fp8_tensor": "offered",
        "fp8_tensor_fast": "offered",
        "fp8_row": "capability",
        "fp8_row_fast": "capability",
        "fp8_block": "capability",
    }


def test_the_cpu_has_no_fast_sums_and_no_blocks():
    assert {name for name, answer in answers(CPU).items() if answer == "offered"} == {"fp8_tensor", "fp8_row"}


@pytest.mark.parametrize(("n", "k"), [(31, 512), (256, 40)])
def test_odd_shapes_are_declined_on_cuda_for_their_alignment(n, k):
    assert set(answers(card(9, 0), n, k).values()) == {"alignment"}
    assert answers(CPU, n, k)["fp8_row"] == "offered"


def test_blocks_need_whole_blocks_and_no_bias():
    assert answers(card(9, 0), n=48)["fp8_block"] == "alignment"
    assert answers(card(9, 0), bias=True)["fp8_block"] == "unsupported"


@pytest.mark.parametrize("kernel", [fp8.Fp8Tensor(), fp8.Fp8Row(), fp8.Fp8Block()], ids=lambda kernel: kernel.name)
def test_a_weight_stored_in_the_same_scheme_is_used_as_it_is(kernel):
    weight = stored(kernel.packed)
    data, scales = kernel.prepare([weight], CPU)
    assert data.data_ptr() == weight.planes[0].data_ptr()
    assert scales[:, : weight.planes[1].shape[1]].equal(weight.planes[1])


def test_one_scale_becomes_every_rows_without_rounding_again():
    weight = stored("fp8_tensor")
    data, scales = fp8.Fp8Row().prepare([weight], CPU)
    assert data.data_ptr() == weight.planes[0].data_ptr()
    assert scales.equal(weight.planes[1].expand(256, 1))


def test_block_scales_are_padded_to_fours_as_cublaslt_reads_them():
    _, scales = fp8.Fp8Block().prepare([stored("bf16", 256, 640)], CPU)
    assert scales.shape == (2, 8)
    assert scales[:, :5].gt(0).all()
    assert scales[:, 5:].eq(0).all()


@pytest.mark.parametrize("kernel", [fp8.Fp8Tensor(), fp8.Fp8Row()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("m", [1, 5])
def test_torchs_scaled_gemm_reads_the_planes_as_they_are(kernel, m):
    x = empty_planes(Value("x", (m, 64), kernel.packed))
    quantize_planes(kernel.packed, torch.randn(m, 64, generator=torch.Generator().manual_seed(2)), x)
    weight, scales = kernel.prepare([stored("f32", 32, 64)], CPU)
    y = torch.empty(m, 32)
    fp8.scaled_mm(*x, weight, scales, None, y, fast=False)()
    wanted = dequantize_planes(kernel.packed, x) @ dequantize_planes(kernel.packed, (weight, scales)).T
    assert nmse(y, wanted) < 1e-10


@pytest.mark.parametrize("m", [1, 4, 5, 8])
def test_block_scales_go_to_torch_as_they_lie_and_odd_rows_through_scratch(monkeypatch, m):
    given = []

    def multiply(x, x_scales, weight, scales, y):
        """In place of cuBLASLt, which the CPU lacks, with what it demands."""
        given.append((x.data_ptr(), x_scales.data_ptr()))
        assert (len(x) % 4, x_scales.shape, x_scales.is_contiguous()) == (0, (x.shape[1] // 128, len(x)), True)
        w = dequantize_planes("fp8_128x128", (weight, scales[:, : x.shape[1] // 128]))
        return lambda: y.copy_(dequantize_planes("fp8_block", (x, x_scales)) @ w.T)

    monkeypatch.setattr(fp8, "scaled_mm_blocks", multiply)
    kernel, weight, value = fp8.Fp8Block(), stored("fp8_128x128"), Value("x", (m, 512), "fp8_block")
    node = one_node("mul_mat", value, weight=(Value("w", (256, 512), "fp8_128x128"),))
    x, y = stored("fp8_block", m).planes, torch.empty(m, 256, dtype=torch.bfloat16)
    scratch = torch.full((kernel.workspace(node),), 0x7B, dtype=torch.uint8)
    kernel.bind(node, Tensors((x,), (y,), kernel.prepare([weight], CPU), scratch if len(scratch) else None), None)()
    wanted = dequantize_planes("fp8_block", x) @ weight.dequantize().T
    assert nmse(y, wanted) < 1e-5
    assert (given == [(x[0].data_ptr(), x[1].data_ptr())]) == (m % 4 == 0) == (len(scratch) == 0)


def test_a_bias_is_added_to_bf16_only():
    weight, bias = Value("w", (32, 64)), Value("b", (32,))
    plain = one_node("mul_mat", Value("x", (4, 64)), weight=(weight,))
    biased = one_node("mul_mat", Value("x", (4, 64)), weight=(weight,), bias=(bias,))
    kernel: Kernel = fp8.Fp8Row()
    assert kernel.outputs(plain) == [["bf16", "f32"]]
    assert kernel.outputs(biased) == [["bf16"]]

"""Timed kernels: bound to rotated memory that a plan might have given them, in the formats that they declare."""

from __future__ import annotations

import pytest
import torch

import kernelmux_reference
from fake_backend import CPU, FakeKernel
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.cpu import Cpu
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux.graph.ops import CORE_OPS
from kernelmux.measure.ceilings import Ceilings
from kernelmux.measure.ops import find_kernels, random_weights, time_kernel
from kernelmux.measure.works import matrix_work, model_works, work_of
from kernelmux.models import open_random

CEILINGS = Ceilings(1e9, 1e9, {"bf16": 1e12, "f32": 1e12})


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cpu, "past_cache", 2**16)


OF_OTHERS = {"gelu", "scale", "soft_cap", "qk_norm", "route", "mul_mat_id", "expert_sum", "clamped_swiglu"}
OF_OTHERS |= {"temper"}
"""Ops that a llama has not."""


@pytest.mark.parametrize("m", [3, 130])
@pytest.mark.parametrize("op", sorted(CORE_OPS - OF_OTHERS))
def test_every_op_of_a_model_is_timed(op: str, m: int):
    works = list(model_works(open_random("tiny:Q8_0").graph, [op], m, 20))
    assert works
    with registry.isolated(reference=kernelmux_reference) as found:
        for work in works:
            kernels, _ = find_kernels(work, found, CPU)
            timed = time_kernel(work, "reference:f32", kernels["reference:f32"], random_weights([work], CPU), "f32")
            row = timed.row(CEILINGS)
            assert row["us"] > 0
            assert row["m"] == m
            assert row["kernel"] == "reference:f32"


def test_ids_are_drawn_among_the_experts():
    values = Value("x", (5, 64)), Value("ids", (5, 2), "i32")
    node = make_node("mul_mat_id", "experts", *values, weight=(Value("w", (3 * 8, 64)),), experts=3)
    work = work_of(node, 5, 20)
    kernel = FakeKernel("f32")
    time_kernel(work, "fake:f32", kernel, random_weights([work], CPU), "f32")
    ids = kernel.bound[0][1].inputs[1]
    assert ids.dtype == torch.int32
    assert set(ids.flatten().tolist()) == {0, 1, 2}


def test_a_row_states_shares_of_the_ceilings():
    work = matrix_work(64, 256, "bf16", 8)
    kernel = FakeKernel("f32")
    row = time_kernel(work, "fake:f32", kernel, random_weights([work], CPU), "f32").row(CEILINGS)
    seconds = row["us"] / 1e6
    assert row["GB/s"] == pytest.approx((64 * 256 * 2 + 8 * 256 * 4 + 8 * 64 * 4) / seconds / 1e9, rel=0.05, abs=0.06)
    assert row["% of reading"] == pytest.approx(100 * row["GB/s"], rel=0.1, abs=6)


def test_operands_are_different_memory_until_they_outrun_the_cache():
    work = matrix_work(64, 256, "f32", 1)
    kernel = FakeKernel("f32", packed_bytes=64 * 256 * 4, work=lambda node, tensors: None)
    kernel.prepare = lambda weights, device: tuple(weight.dequantize() for weight in weights)
    timed = time_kernel(work, "fake:f32", kernel, random_weights([work], CPU), "f32")
    addresses = {tensors.packed[0].data_ptr() for _, tensors in kernel.bound}
    assert len(addresses) == len(kernel.bound) == 1
    assert timed.rotated_bytes >= 2**16
    small = matrix_work(16, 256, "f32", 1)
    timed = time_kernel(small, "fake:f32", kernel, random_weights([small], CPU), "f32")
    bound = kernel.bound[1:]
    assert len(bound) == 4
    assert len({tensors.packed[0].data_ptr() for _, tensors in bound}) == 4
    assert all(tensors.packed[0].equal(bound[0][1].packed[0]) for _, tensors in bound)
    assert timed.rotated_bytes >= 2**16


def test_a_kernel_that_reads_blocks_is_given_blocks():
    work = matrix_work(16, 64, "f32", 3)
    kernel = FakeKernel(takes=["q8_32"])
    time_kernel(work, "fake:f32", kernel, random_weights([work], CPU), "f32")
    (planes,) = kernel.bound[0][1].inputs
    assert [part.dtype for part in planes] == [torch.int8, torch.float32, torch.float32]


def test_state_comes_with_its_host_mirror():
    (work,) = model_works(open_random("tiny:f32").graph, ["attention"], 2, 20)
    kernel = FakeKernel()
    time_kernel(work, "fake:f32", kernel, random_weights([work], CPU), "f32")
    tensors = kernel.bound[0][1]
    assert tensors.host[:3] == (None, None, None)
    assert tensors.host[4].tolist() == [20, 20]


def test_refusals_come_with_their_reasons():
    with registry.isolated(fake=backend(add=FakeKernel())) as found:
        kernels, declined = find_kernels(matrix_work(16, 32, "f32", 1), found, CPU)
    assert not kernels
    assert "no mul_mat" in declined["fake"].reason

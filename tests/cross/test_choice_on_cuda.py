"""What a plan for an H100 makes of the torch and Triton backends together, asked on any machine."""

import types

import pytest

import kernelmux_torch
import kernelmux_triton
from fake_backend import llama_graph
from kernelmux.contract import hookimpl, registry
from kernelmux.contract.device import Device
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
OTHERS = {"mul_mat", "attention"}
"""Ops whose kernels are not what is asked about here."""


def row_wise():
    """The backend with the kernels of the row-wise ops alone."""
    classes = [kernel for kernel in kernelmux_triton.kernel_classes() if not OTHERS & set(kernel.ops)]
    return types.SimpleNamespace(CONTRACT=kernelmux_triton.CONTRACT, kernel_classes=hookimpl(lambda: classes))


def planned(policy, **sizes):
    graph = llama_graph(1, heads=4, kv_heads=2, head_dim=64, feed_forward=512, vocab=512, weight="bf16")
    with registry.isolated(torch=kernelmux_torch, triton=row_wise()) as found:
        return make_plan(graph, policy, found, H100, 512)


def kernels(plan, rows):
    return [(step.node.op, step.choice.name) for step in plan.schedule(rows, 1).steps if step.node.op != "attention"]


@pytest.mark.parametrize("rows", [1, 512])
def test_by_default_cuda_multiplies_in_torch_and_does_the_rest_in_triton(rows):
    pytest.importorskip("triton")
    assert kernels(planned(default_policy()), rows) == [
        ("embed", "triton:bf16"),
        ("rms_norm", "triton:f32"),
        ("qkv", "torch:bf16"),
        ("rope_copy", "triton:f32"),
        ("mul_mat", "torch:bf16"),
        ("add_rms_norm", "triton:f32"),
        ("mul_mat_pair", "torch:bf16"),
        ("swiglu", "triton:f32"),
        ("mul_mat_add", "torch:bf16"),
        ("embed", "triton:rows"),
        ("rms_norm", "triton:f32"),
        ("mul_mat", "torch:bf16"),
    ]


def test_norms_and_swiglu_write_what_an_fp8_product_reads():
    pytest.importorskip("triton")
    rules = '[[rule]]\nop = "mul_mat"\nuse = "torch:fp8_block"\n[defaults]\nuse = ["triton", "torch"]\n'
    plan = planned(parse_policy(rules, "p.toml"))
    steps = plan.schedule(1, 1).steps
    emitted = [step.node.outputs[-1].format for step in steps if step.node.op in ("add_rms_norm", "swiglu")]
    assert emitted == ["fp8_block"] * len(emitted)
    # What attention gives is converted, and the logits.
    assert [step.node.inputs[0].name for step in steps if step.node.op == "convert"] == ["blk.0.attention", "logits"]

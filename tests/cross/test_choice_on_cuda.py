"""What a plan for an H100 makes of the torch and Triton backends together, asked on any machine."""

import types
from collections import Counter
from pathlib import Path

import pytest

import kernelmux_torch
import kernelmux_triton
from fake_backend import llama_graph
from kernelmux.contract import hookimpl, registry
from kernelmux.contract.device import Device, described_device
from kernelmux.measure.predict import Predictor
from kernelmux.measure.table import Tables
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy, read_policy
from kernelmux.run.model import load_random

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
EXAMPLES = Path(__file__).parents[2] / "examples" / "policies"
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
def test_the_example_for_bfloat16_multiplies_in_torch_and_does_the_rest_in_triton(rows):
    pytest.importorskip("triton")
    assert kernels(planned(read_policy(EXAMPLES / "cuda-bf16.toml")), rows) == [
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


@pytest.fixture(scope="module")
def on_h200():
    """The default's plan for an 8B model of 4-bit weights on an H200, whose times the backends ship."""
    pytest.importorskip("triton")
    pytest.importorskip("cupy")
    h200 = described_device("cuda sm_90 NVIDIA H200")
    return make_plan(load_random("llama-8b:Q4_K_M").graph, default_policy(), registry.current(), h200, 2048)


@pytest.mark.parametrize(
    ("rows", "kernel"), [(1, "cupy:dp4a"), (8, "cupy:dp4a"), (64, "torch:bf16"), (2048, "torch:bf16")]
)
def test_the_default_on_an_h200_decodes_with_4_bit_kernels_and_reads_prompts_in_bfloat16(on_h200, rows, kernel):
    products = [step for step in on_h200.schedule(rows, rows).steps if step.node.weight and step.node.op != "embed"]
    assert {step.choice.name for step in products} == {kernel}
    assert all(not step.choice.predicted.declared for step in products)
    assert on_h200.graph.values["blk.0.k_cache"].format == "bf16"


def test_no_weight_has_more_than_two_packed_forms(on_h200):
    forms = Counter(weight for weights, _ in on_h200.packed_forms for weight in weights)
    assert max(forms.values()) <= 2


def test_the_default_is_no_slower_by_its_own_prediction_than_a_policy_by_hand(on_h200):
    def predicted(plan, rows):
        predictor = Predictor(plan.device, Tables(plan.device))
        return sum(predictor.of(step.choice.kernel, step.node, rows).us for step in plan.schedule(rows, rows).steps)

    for rows, name in ((1, "cuda-cupy.toml"), (8, "cuda-cupy.toml"), (2048, "cuda-bf16.toml")):
        policy = read_policy(EXAMPLES / name)
        hand = make_plan(load_random("llama-8b:Q4_K_M").graph, policy, registry.current(), on_h200.device, rows)
        assert predicted(on_h200, rows) <= 1.02 * predicted(hand, rows), rows

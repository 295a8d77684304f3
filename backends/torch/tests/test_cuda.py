"""What the backend offers for an H100, which a plan tells without one."""

from __future__ import annotations

import pytest

import kernelmux_torch
from kernelmux.conformance.testing import one_node
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import Rotation
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy

kernelmux_triton = pytest.importorskip("kernelmux_triton")
pytest.importorskip("triton")

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


def attention_node(m, **fields):
    cache = (3, 16, 2, 64)
    state = (Value("query_start", (2,), "i32"), Value("kv_len", (1,), "i32"), Value("block_table", (1, 3), "i32"))
    caches = (Value("k_cache", cache, "bf16"), Value("v_cache", cache, "bf16"))
    return one_node("attention", Value("q", (m, 256), "bf16"), *caches, *state, **HEADS, scale=0.125, **fields)


def test_sdpa_declines_a_soft_cap():
    current = registry.current()
    assert list(current.offer(attention_node(512), H100, only="torch").kernels) == ["torch:sdpa"]
    refused = current.offer(attention_node(512, soft_cap=5.0), H100, only="torch").declined["torch:sdpa"]
    assert refused.kind == "unsupported"


def test_sinks_are_triton_s_alone_on_a_card():
    offer = registry.current().offer(attention_node(512, weight=(Value("sinks", (4,)),)), H100)
    assert offer.declined["torch:sdpa"].reason == "torch's attention has no sinks"
    assert "triton:prefill" in offer.kernels


def test_chunks_are_triton_s_alone_on_a_card():
    offer = registry.current().offer(attention_node(512, chunk=128), H100)
    assert offer.declined["torch:sdpa"].reason == "it reads no chunks apart"
    assert "triton:prefill" in offer.kernels


def test_projections_are_one_gemm_and_triton_turns_and_stores_what_it_wrote():
    b = Builder("block", "bf16")
    x = b.leaf("x", ("m", 256), "bf16", role="state")
    positions, slots = (b.leaf(name, ("m",), "i32", role="state") for name in ("positions", "slots"))
    caches = [b.leaf(f"{part}_cache", (3, 16, 2, 64), "bf16", role="cache") for part in "kv"]
    q, k, v = (
        b.value("mul_mat", part, x, weight=(b.leaf(f"{part}.weight", (heads * 64, 256)),))
        for part, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    q, k = b.node("rope", "rope", q, k, positions, rotation=Rotation(theta=1e4, dims=64), **HEADS)
    cached = b.node("copy", "copy", k, v, slots, *caches, num_kv_heads=2, head_dim=64)
    policy = parse_policy('[[rule]]\nop = "mul_mat"\nuse = "torch:bf16"\n[defaults]\nuse = "triton"\n', "p.toml")
    with registry.isolated(torch=kernelmux_torch, triton=kernelmux_triton) as both:
        steps = make_plan(b.build(q, *cached), policy, both, H100, 8).schedule(8, 8).steps
    chosen = [(step.node.op, step.choice.name) for step in steps if step.node.op != "convert"]
    assert chosen == [("qkv", "torch:bf16"), ("rope_copy", "triton:f32")]
    with registry.isolated(torch=kernelmux_torch) as alone:
        plan = make_plan(b.build(q, *cached), parse_policy("", "p.toml"), alone, H100, 8)
    assert {step.choice.backend for step in plan.schedule(8, 8).steps} == {"torch"}

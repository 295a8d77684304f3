"""What the backend offers for an H100, which a plan tells without one."""

from __future__ import annotations

import pytest

import kernelmux_torch
from fake_backend import one_node
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import Rotation
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy

pytest.importorskip("triton")

H100 = Device("cuda", 0, "NVIDIA H100", (9, 0))
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


def attention_node(m, **fields):
    cache = (3, 16, 2, 64)
    state = (Value("query_start", (2,), "i32"), Value("kv_len", (1,), "i32"), Value("block_table", (1, 3), "i32"))
    caches = (Value("k_cache", cache, "bf16"), Value("v_cache", cache, "bf16"))
    return one_node("attention", Value("q", (m, 256), "bf16"), *caches, *state, **HEADS, scale=0.125, **fields)


def test_sdpa_declines_a_soft_cap():
    assert kernelmux_torch.dispatch_attention(attention_node(512), "bf16", H100).name == "sdpa"
    refused = kernelmux_torch.dispatch_attention(attention_node(512, soft_cap=5.0), "bf16", H100)
    assert (refused.kernel, refused.kind) == ("sdpa", "unsupported")


def test_projections_rope_and_copy_become_one_node():
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
    with registry.isolated(torch=kernelmux_torch) as alone:
        plan = make_plan(b.build(q, *cached), parse_policy("", "p.toml"), alone, H100, 8)
    steps = plan.schedule(8, 8).steps
    assert [(step.node.op, step.choice.name) for step in steps] == [("qkv_rope_copy", "torch:bf16")]

"""What a plan costs, with five backends: chains of 100, 1,000 and 10,000 nodes, and a llama of 80 layers."""

import pytest

import kernelmux_reference
import kernelmux_torch
from fake_backend import CPU, FakeKernel, chain, llama_graph
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.graph.ops import OPS
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy

LAYERS = 80
POLICY = """\
[[rule]]
op = ["mul_mat", "qkv", "gate_up_swiglu"]
m = "1..8"
use = ["fast:tiled", "small"]

[[rule]]
layer = "0..3"
op = "mul_mat"
use = ["torch:f32"]

[[rule]]
node = "blk.*.attention"
use = ["picky", "torch"]

[defaults]
use = ["torch", "fast", "reference"]
"""


def five_backends():
    """Two that take what they are asked, one that declines with reasons, and the two of this project."""
    tiled = [FakeKernel("tiled", precision=1e-4, takes=["bf16", "f32"], packed_bytes=64), FakeKernel("f32")]
    refusals = [Declined("not in sixteens", "alignment", "int4"), Declined("not on this card", "device", "fp8")]
    return {
        "fast": backend(**dict.fromkeys(OPS, tiled)),
        "small": backend(mul_mat=FakeKernel("int4", packed_bytes=8), qkv=FakeKernel("int4", packed_bytes=8)),
        "picky": backend(**dict.fromkeys(OPS, refusals)),
        "reference": kernelmux_reference,
        "torch": kernelmux_torch,
    }


def plan(graph, policy):
    """A plan by a registry of its own, which has cached nothing: its buckets."""
    with registry.isolated(**five_backends()) as found:
        return make_plan(graph, policy, found, CPU).buckets


@pytest.mark.benchmark(group="plan of alike nodes")
@pytest.mark.parametrize("nodes", [100, 1_000, 10_000])
def test_a_chain(benchmark, nodes):
    graph = chain(*(["silu", "add", "silu", "mul"] * (nodes // 4)))
    assert len(graph.ops) == nodes
    assert benchmark.pedantic(plan, (graph, parse_policy(POLICY, "p.toml")), rounds=1 if nodes == 10_000 else 5)
    if benchmark.stats is not None:  # None where benchmarks are disabled
        benchmark.extra_info["us_per_node"] = round(benchmark.stats.stats.min / nodes * 1e6, 1)


@pytest.mark.benchmark(group=f"plan of a llama of {LAYERS} layers")
@pytest.mark.parametrize("policy", ["default", "rules"])
def test_a_llama_of_80_layers(benchmark, policy):
    """Less than half a second is the aim: a plan is made at every start."""
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "feed_forward": 14_336, "vocab": 32_000}
    graph = llama_graph(LAYERS, **sizes, weight="Q4_0")
    assert 1_250 < len(graph.ops) < 1_350
    chosen = default_policy() if policy == "default" else parse_policy(POLICY, "p.toml")
    assert benchmark.pedantic(plan, (graph, chosen), rounds=3, warmup_rounds=1)

"""Plans of whole models for a card that is not here."""

import pytest

from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy, parse_policy
from kernelmux.run.model import load_random

H100 = Device("cuda", 0, "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.mark.parametrize("stored", ["bf16", "Q4_0"])
@pytest.mark.parametrize("rows", [1, 64])
def test_triton_alone_takes_every_op_of_a_llama(stored, rows):
    """How wide a block table is, and how many sequences there are, nobody knows while a plan is made."""
    graph = load_random(f"tiny:{stored}").graph
    plan = make_plan(graph, default_policy().with_use(["*=triton"]), registry.current(), H100, rows)
    chosen = {step.choice.name.partition(":")[0] for step in plan.schedule(rows, 1).steps}
    assert chosen == {"triton"}


def test_a_policy_has_torch_multiply_and_triton_do_the_rest():
    rules = '[[rule]]\nop = ["mul_mat", "mul_mat_add"]\nuse = "torch:bf16"\n[defaults]\nuse = ["triton", "torch"]\n'
    plan = make_plan(load_random("tiny:bf16").graph, parse_policy(rules, "p.toml"), registry.current(), H100, 64)
    chosen = {step.node.op: step.choice.name.partition(":")[0] for step in plan.schedule(1, 1).steps}
    products = {"mul_mat", "mul_mat_add", "qkv", "mul_mat_pair"}
    assert {
        "qkv": "torch",
        "rope_copy": "triton",
        "mul_mat_pair": "torch",
        "swiglu": "triton",
    }.items() <= chosen.items()
    assert {op for op, backend in chosen.items() if backend == "torch"} == products & chosen.keys()
    assert set(chosen.values()) == {"torch", "triton"}


@pytest.mark.parametrize("rows", [1, 64])
def test_triton_alone_fuses_qkv_and_what_follows_in_two_nodes(rows):
    plan = make_plan(
        load_random("tiny:bf16").graph, default_policy().with_use(["*=triton"]), registry.current(), H100, rows
    )
    steps = plan.schedule(rows, 1).steps
    for op, kernel in (("qkv", "triton:bf16"), ("rope_copy", "triton:f32")):
        fused = [step.choice.name for step in steps if step.node.op == op]
        assert fused == [kernel] * len(fused) != []

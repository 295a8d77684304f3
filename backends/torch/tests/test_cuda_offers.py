"""What the torch backend offers for CUDA, asked on any machine."""

import pytest

from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import one_node
from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import case_node

H100 = Device("cuda", name="H100", capability=(9, 0))
NODES = {
    "gate_up_swiglu": ((Value("x", ("m", 64)),), {"weight": (Value("gate", (96, 64)), Value("up", (96, 64)))}),
    "route": ((Value("logits", ("m", 8)),), {"top_k": 2}),
    "mul_mat_id": (
        (Value("x", ("m", 64)), Value("ids", ("m", 2), "i32")),
        {"weight": (Value("w", (8 * 32, 64), "MXFP4"),), "experts": 8},
    ),
    "expert_sum": ((Value("x", ("m", 64)), Value("weights", ("m", 2))), {}),
    "embed": ((Value("ids", ("m",), "i32"),), {"weight": (Value("table", (50, 64)),)}),
}


def ask(op):
    inputs, fields = NODES[op]
    node = one_node(op, *inputs, **fields).resolve({"m": 4})
    return registry.current().offer(node, H100)


def test_no_kernel_is_made_of_another_backends():
    """Products that others continue are nodes of their own."""
    assert ask("gate_up_swiglu").declined["torch"].kind == "not offered"
    assert "torch:bf16" in ask("embed").kernels


def test_a_tied_head_shares_the_table_of_embed():
    head = one_node("mul_mat", Value("x", ("m", 64)), weight=(Value("table", (50, 64)),)).resolve({"m": 4})
    offered = registry.current().offer(head, H100).kernels
    tables = {name: kernel for name, kernel in ask("embed").kernels.items() if name.startswith("torch:")}
    assert {name: offered[name].packed for name in tables} == {name: table.packed for name, table in tables.items()}


@pytest.mark.parametrize(("op", "capturable"), [("route", False), ("mul_mat_id", False), ("expert_sum", True)])
def test_graphs_hold_none_that_waits_for_ids_or_allocates(op, capturable):
    kernels = {name: kernel for name, kernel in ask(op).kernels.items() if name.startswith("torch:")}
    assert kernels
    assert {kernel.capturable for kernel in kernels.values()} == {capturable}


@pytest.mark.parametrize("device", [H100, Device("cuda", name="A100", capability=(8, 0))], ids=lambda d: d.name)
def test_every_case_of_the_suite_gets_an_answer(device):
    current = registry.current()
    for case in all_cases():
        node = case_node(case)
        offer = current.offer(node, device, only="torch")
        assert not current.backends["torch"].fault, f"{case.name}: {current.backends['torch'].fault}"
        assert any(name.startswith("torch") for name in (*offer.kernels, *offer.declined)), case.name

"""What holds for every op: its cases, its hook, and that its fields exist."""

import inspect

import pytest

from kernelmux.conformance.draw import draw_case
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Hooks
from kernelmux.ops import OPS

ops = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


@ops
def test_it_has_cases_of_its_own_whose_names_say_so(op):
    cases = list(op.cases())
    assert cases
    assert all(case.op == op.name and case.name.startswith(f"{op.name}-") for case in cases)


def test_case_names_are_unique():
    names = [case.name for op in OPS.values() for case in op.cases()]
    assert len(names) == len(set(names))


@ops
def test_its_hook_takes_node_device_and_its_arguments(op):
    (node,) = draw_case(next(iter(op.cases()))).graph.ops
    parameters = set(inspect.signature(getattr(Hooks, f"dispatch_{op.name}")).parameters)
    assert parameters == {"self", "node", "device", *op.arguments(node)}


@ops
def test_a_backend_learns_the_row_count(op):
    (node,) = draw_case(next(iter(op.cases()))).graph.ops
    assert op.arguments(node)["m"] == node.inputs[0].shape[0]


def test_every_hook_has_its_op():
    hooks = {name.removeprefix("dispatch_") for name in vars(Hooks) if name.startswith("dispatch_")}
    assert hooks == set(OPS)


@ops
def test_its_fields_are_those_of_a_node(op):
    known = TensorNode.__dataclass_fields__
    assert {*op.fields, *op.optional} <= set(known)


@ops
def test_shared_memory_is_stated_of_ports_that_exist(op):
    for source, target in (*op.in_place, *op.updates):
        assert 0 <= source < len(op.inputs)
        assert 0 <= target < len(op.outputs)


@ops
def test_its_docstring_is_a_contract(op):
    text = inspect.getdoc(type(op))
    assert all(word in text for word in ("Axes:", "Inputs:", "Outputs:"))


@ops
def test_a_case_is_drawn_alike_each_time(op):
    case = next(iter(op.cases()))
    first, second = draw_case(case), draw_case(case)
    assert first.graph == second.graph
    ours = [*first.inputs.values(), *(weight.planes for weight in first.weights.values())]
    theirs = [*second.inputs.values(), *(weight.planes for weight in second.weights.values())]
    for one, other in zip(ours, theirs, strict=True):
        assert all(plane.equal(twin) for plane, twin in zip(one, other, strict=True))

"""What holds for every op: its cases, its hook, and that its fields exist."""

import inspect
import types

import pytest

from kernelmux.conformance.draw import draw_case
from kernelmux.contract import hookimpl, registry
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import CORE_OPS, OPS
from kernelmux.graph.ops.cases import ROW_COUNTS, WEIGHTS

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
    told = ("node", "device", *op.told)
    (node,) = draw_case(next(iter(op.cases()))).graph.ops
    assert op.arguments(node).keys() == op.told.keys()
    for arguments, fault in ((told, ""), ((*told, "mood"), f"odd.dispatch_{op.name} asks for 'mood'")):
        hook = eval(f"lambda {', '.join(arguments)}: []")
        with registry.isolated(
            odd=types.SimpleNamespace(CONTRACT=2, **{f"dispatch_{op.name}": hookimpl(hook)})
        ) as found:
            assert fault in found.backends["odd"].fault
            assert bool(found.backends["odd"].fault) == bool(fault)


@ops
def test_a_backend_learns_the_row_count(op):
    (node,) = draw_case(next(iter(op.cases()))).graph.ops
    assert op.arguments(node)["m"] == node.inputs[0].shape[0]


def test_a_hook_of_no_op_is_named():
    odd = types.SimpleNamespace(CONTRACT=2, dispatch_mulmat=hookimpl(lambda node: []))
    with registry.isolated(odd=odd) as found:
        assert "odd.dispatch_mulmat is no hook (did you mean 'dispatch_mul_mat'?)" in found.backends["odd"].fault


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


@pytest.mark.parametrize("op", [OPS[name] for name in sorted(CORE_OPS)], ids=sorted(CORE_OPS))
def test_it_has_cases_of_every_row_count(op):
    assert set(ROW_COUNTS) <= {case.inputs[0].shape[0] for case in op.cases()}


@pytest.mark.parametrize("name", ["mul_mat", "qkv", "gate_up_swiglu", "mul_mat_add", "qkv_rope_copy", "embed"])
def test_it_has_cases_of_every_weight_format(name):
    assert set(WEIGHTS) <= {weight.format for case in OPS[name].cases() for weight in case.fields.get("weight", ())}


@pytest.mark.parametrize("name", ["mul_mat", "qkv", "gate_up_swiglu", "mul_mat_add", "qkv_rope_copy"])
def test_it_has_cases_with_a_bias_that_shows_beside_the_product(name):
    for case in OPS[name].cases():
        for bias in case.fields.get("bias", ()):
            (plane,) = draw_case(case).weights[bias.name].planes
            assert plane.std() > 100


def test_the_smoke_subset_is_small_and_holds_every_op():
    smoke = [case for op in OPS.values() for case in op.cases() if "smoke" in case.marks]
    assert {case.op for case in smoke} == set(OPS)
    for case in smoke:
        assert sum(value.nbytes for value in (*case.inputs, *case.fields.get("weight", ()))) < 2**24
        assert "large" not in case.marks


def test_a_cpu_need_not_multiply_large_matrices():
    for case in OPS["mul_mat"].cases():
        n, k = case.fields["weight"][0].extents
        products = case.inputs[0].extents[0] * n * k
        assert products < 2**30 or "large" in case.marks

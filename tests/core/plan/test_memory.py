"""Memory: nothing that is alive is written over, little is wasted, and packed weights are made once."""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import CPU, FakeKernel, chain, graphs, plan_for, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.graph.formats import ALIGNMENT, Weight, value_bytes
from kernelmux.graph.graph import Builder
from kernelmux.models import open_model
from kernelmux.plan.memory import lay_out
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import default_policy

scratches = st.lists(st.sampled_from([0, 0, 1, 300, 5000]), min_size=12, max_size=12)


def _laid_out(graph, scratch, rows=3):
    nodes = [(node.resolve({"m": rows}), bytes) for node, bytes in zip(graph.ops, scratch, strict=False)]
    return nodes, lay_out(nodes, graph.outputs)


def _lifetimes(nodes, kept):
    """By value: the first and the last step at which its memory is in use, both included."""
    spans = {}
    for step, (node, _) in enumerate(nodes):
        spans |= {value.name: (step, step) for value in node.outputs}
        spans |= {value.name: (spans[value.name][0], step) for value in node.inputs if value.name in spans}
    return {name: (first, len(nodes) if name in kept else last) for name, (first, last) in spans.items()}


def _stretches(nodes, layout):
    sizes = {value.name: value_bytes(value) for node, _ in nodes for value in node.outputs}
    return {name: range(offset, offset + sizes[name]) for name, offset in layout.offsets.items()}


def _overlap(left, right):
    return left.start < right.stop and right.start < left.stop


def _may_share(nodes, one, other):
    """Whether one value is the input, the other the output, of a node that may work in place."""
    for node, _ in nodes:
        for source, target in node.contract.in_place:
            pair = node.inputs[source].name, node.outputs[target].name
            if pair in ((one, other), (other, one)):
                return True
    return False


@settings(derandomize=True, deadline=None, max_examples=150)
@given(graph=graphs(), scratch=scratches)
def test_what_is_alive_at_one_time_lies_apart(graph, scratch):
    nodes, layout = _laid_out(graph, scratch)
    spans, stretches = _lifetimes(nodes, graph.outputs), _stretches(nodes, layout)
    assert spans.keys() == stretches.keys()
    for one, other in combinations(stretches, 2):
        first, last = max(spans[one][0], spans[other][0]), min(spans[one][1], spans[other][1])
        if first > last or not _overlap(stretches[one], stretches[other]):
            continue
        # Only where one ends at the step where the other begins, and the op may work in place.
        assert first == last, (one, other)
        assert stretches[one] == stretches[other], (one, other)
        assert _may_share(nodes, one, other), (one, other)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=graphs(), scratch=scratches)
def test_scratch_lies_apart_from_what_is_alive(graph, scratch):
    nodes, layout = _laid_out(graph, scratch)
    spans, stretches = _lifetimes(nodes, graph.outputs), _stretches(nodes, layout)
    for step, (node, nbytes) in enumerate(nodes):
        assert (node.name in layout.workspaces) == (nbytes > 0)
        if nbytes:
            workspace = range(layout.workspaces[node.name][0], layout.workspaces[node.name][0] + nbytes)
            assert workspace.stop <= layout.nbytes
            for name, (first, last) in spans.items():
                assert not (first <= step <= last and _overlap(workspace, stretches[name])), (node.name, name)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=graphs(), scratch=scratches)
def test_the_arena_holds_the_largest_live_set(graph, scratch):
    nodes, layout = _laid_out(graph, scratch)
    spans, stretches = _lifetimes(nodes, graph.outputs), _stretches(nodes, layout)
    live = [
        sum(len(part) for part in {stretches[name] for name, (first, last) in spans.items() if first <= step <= last})
        + -(-nbytes // ALIGNMENT) * ALIGNMENT
        for step, (_, nbytes) in enumerate(nodes)
    ]
    assert layout.largest_live == max(live)
    assert layout.nbytes >= layout.largest_live
    assert all(stretch.stop <= layout.nbytes for stretch in stretches.values())
    assert all(
        offset % ALIGNMENT == 0 for offset in (*layout.offsets.values(), *(at for at, _ in layout.workspaces.values()))
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=graphs(), scratch=scratches)
def test_what_the_graph_hands_back_is_never_reused(graph, scratch):
    nodes, layout = _laid_out(graph, scratch)
    stretches = _stretches(nodes, layout)
    order = [value.name for node, _ in nodes for value in node.outputs]
    for kept in graph.outputs:
        for later in order[order.index(kept) + 1 :]:
            assert not _overlap(stretches[kept], stretches[later]), (kept, later)


def test_a_chain_of_elementwise_ops_needs_one_buffer():
    _, layout = _laid_out(chain("silu", "silu", "mul", "add"), [0] * 4)
    assert len(set(layout.offsets.values())) == 1
    assert layout.nbytes == ALIGNMENT


def test_a_value_that_is_read_later_is_not_worked_on_in_place():
    b = Builder("g")
    a = b.value("silu", "a", b.leaf("x", ("m", 8), role="state"))
    _, layout = _laid_out(b.build(b.value("mul", "c", b.value("silu", "b", a), a)), [0] * 3)
    assert layout.offsets["b"] != layout.offsets["a"]


def _waste(plan):
    return max(schedule.layout.nbytes / schedule.layout.largest_live for schedule in plan.schedules.values())


# Kernels by name: what `auto` takes differs by processor.
BY_NAME = '[defaults]\nuse = ["torch:bf16", "torch", "reference"]\n'


def test_the_tiny_model_wastes_little_at_any_row_count(tiny):
    assert _waste(plan_for(open_model(tiny).graph, registry.current(), BY_NAME, max_rows=512)) <= 1.10


@pytest.mark.model
def test_smollm2_wastes_little_at_any_row_count(without_numba, smollm2):
    graph = open_model(smollm2).graph
    assert _waste(plan_for(graph, registry.current(), BY_NAME, max_rows=512)) <= 1.10
    assert _waste(make_plan(graph, default_policy(), registry.current(), CPU)) <= 1.10


@pytest.mark.model
def test_the_default_wastes_little_of_the_memory_that_all_of_its_steps_share(smollm2):
    plan = make_plan(open_model(smollm2).graph, default_policy(), registry.current(), CPU)
    layouts = [schedule.layout for schedule in plan.schedules.values()]
    assert max(each.nbytes for each in layouts) <= 1.10 * max(each.largest_live for each in layouts)


def describe(path):
    """The fingerprint of a model's plan and the layouts of all its schedules, as JSON: run in two processes."""
    mul_mat = FakeKernel("wide", takes=["bf16"], emits=["bf16", "f32"], scratch=lambda node: 1000)
    with registry.isolated(fake=whole_backend(mul_mat=mul_mat), other=whole_backend()) as found:
        plan = plan_for(open_model(path).graph, found, '[[rule]]\nop = "silu"\nm = "3.."\nuse = "other"\n')
    layouts = [
        [
            rows,
            dict(schedule.layout.offsets),
            {k: list(v) for k, v in schedule.layout.workspaces.items()},
            schedule.layout.nbytes,
        ]
        for rows, schedule in plan.schedules.items()
    ]
    return json.dumps([plan.fingerprint, layouts])


def test_another_process_lays_out_alike(tiny):
    code = f"import runpy; print(runpy.run_path({__file__!r})['describe']({str(tiny)!r}))"
    tests = str(Path(__file__).parents[2])
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == json.loads(describe(tiny))


# Packed weights.


def _two_readers(second="w"):
    b = Builder("g")
    x, w = b.leaf("x", ("m", 4), role="state"), b.leaf("w", (4, 4))
    other = w if second == "w" else b.leaf(second, (4, 4))
    y = b.value("mul_mat", "a", x, weight=(w,))
    return b.build(b.value("mul_mat", "b", y, weight=(other,)))


def _packed():
    return PackedWeights({name: Weight(name, (4, 4), "f32", (torch.eye(4),)) for name in ("w", "v")}, CPU)


def _pack_all(plan, packed):
    return [packed.get(step.node, step.choice.name, step.choice.kernel) for step in plan.schedule(1, 1).steps]


def test_two_nodes_and_two_plans_share_one_packed_form():
    kernel, packed = FakeKernel(packed_bytes=64), _packed()
    with registry.isolated(fake=backend(mul_mat=kernel)) as found:
        plans = [plan_for(_two_readers(), found) for _ in range(2)]
    first, second, *more = [form for plan in plans for form in _pack_all(plan, packed)]
    assert kernel.prepared == [["w"]]
    assert all(form is first for form in (second, *more))
    assert packed.nbytes == plans[0].packed_bytes == 64


def test_other_weights_are_packed_for_themselves():
    kernel, packed = FakeKernel(packed_bytes=64), _packed()
    with registry.isolated(fake=backend(mul_mat=kernel)) as found:
        plan = plan_for(_two_readers("v"), found)
    _pack_all(plan, packed)
    assert kernel.prepared == [["w"], ["v"]]
    assert packed.nbytes == plan.packed_bytes == 128


@pytest.mark.parametrize(("forms", "count"), [(("same", "same"), 1), (("one", "two"), 2), (("", ""), 2)])
def test_kernels_share_what_they_pack_into_the_form_of_one_name(forms, count):
    kernels, packed = [FakeKernel(f"k{i}", packed=form, packed_bytes=64) for i, form in enumerate(forms)], _packed()
    with registry.isolated(fake=backend(mul_mat=kernels)) as found:
        policy = '[[rule]]\nnode = "b"\nuse = "fake:k1"\n'
        plan = plan_for(_two_readers(), found, policy)
    _pack_all(plan, packed)
    assert sum(len(kernel.prepared) for kernel in kernels) == count
    assert packed.nbytes == plan.packed_bytes == 64 * count

"""Plans: buckets of rows, formats and conversions, launches, and a fingerprint."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import FakeKernel, chain, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import Declined, registry
from kernelmux.errors import KernelmuxError, PlanError
from kernelmux.graph.graph import Builder
from kernelmux.plan.explain import kernel_counts

FLOATS = ["f32", "bf16"]


def planned(graph, policy="", *, max_rows=8, **backends):
    with registry.isolated(**backends or {"a": whole_backend()}) as found:
        return plan_for(graph, found, policy, max_rows=max_rows)


def steps(plan, m=1, outs=1):
    return plan.schedule(m, outs).steps


# Buckets.

MAX_ROWS = 40
bounds = st.integers(1, MAX_ROWS + 5)
ranges = st.one_of(
    bounds.map(str),
    st.tuples(bounds, bounds).map(lambda ends: f"{min(ends)}..{max(ends)}"),
    bounds.map(lambda low: f"{low}.."),
    bounds.map(lambda high: f"..{high}"),
)


def _holds(text, rows):
    low, dots, high = text.partition("..")
    return rows == int(low) if not dots else int(low or 0) <= rows and (not high or rows <= int(high))


def _selecting_graph():
    """silu of the token rows `y`, and of the rows with logits `z`."""
    b = Builder("g")
    y = b.value("silu", "y", b.leaf("x", ("m", 8), role="state"))
    z = b.value("embed", "rows", b.leaf("ids", ("outs",), "i32", role="state"), y)
    return b.build(b.value("silu", "z", z))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rules=st.lists(st.tuples(ranges, st.integers(0, 3)), max_size=5))
def test_at_every_row_count_the_first_rule_that_matches_decides(rules):
    kernels = [FakeKernel(f"k{index}") for index in range(4)]
    text = "".join(f'[[rule]]\nop = "silu"\nm = "{rows}"\nuse = "a:k{kernel}"\n' for rows, kernel in rules)
    plan = planned(_selecting_graph(), text, max_rows=MAX_ROWS, a=whole_backend(silu=kernels))
    expected = {
        rows: next((f"a:k{kernel}" for text, kernel in rules if _holds(text, rows)), "a:k0")
        for rows in range(1, MAX_ROWS + 1)
    }
    for m in range(1, MAX_ROWS + 1):
        for outs in {1, m // 2, m} - {0}:
            found = {step.node.name: step.choice.name for step in steps(plan, m, outs)}
            assert (found["y"], found["z"]) == (expected[m], expected[outs]), (m, outs)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(limits=st.lists(st.integers(0, MAX_ROWS), min_size=1, max_size=3))
def test_no_kernel_gets_more_rows_than_it_takes(limits):
    def answer(node, m):
        return [
            FakeKernel(f"upto{limit}") if m <= limit else Declined(f"m = {m}", "shape", f"upto{limit}")
            for limit in dict.fromkeys(limits)
        ]

    plan = planned(silu_graph(), max_rows=MAX_ROWS, a=backend(silu=answer), b=backend(silu=FakeKernel("any")))
    for rows in range(1, MAX_ROWS + 1):
        name = steps(plan, rows, rows)[0].choice.name
        assert name == "b:any" or rows <= int(name.removeprefix("a:upto"))


def test_row_counts_with_the_same_choices_are_one_bucket():
    assert planned(silu_graph(), max_rows=64).buckets == (64,)
    assert planned(silu_graph(), '[[rule]]\nm = "1..5"\nuse = "a"\n', max_rows=64).buckets == (5, 64)


def test_a_node_of_fixed_rows_is_matched_by_its_own_rows():
    plan = planned(
        silu_graph(rows=3), '[[rule]]\nm = 3\nuse = "a:two"\n', a=backend(silu=[FakeKernel("one"), FakeKernel("two")])
    )
    assert {steps(plan, m, m)[0].choice.name for m in range(1, 9)} == {"a:two"}


def test_more_rows_than_planned_for_says_what_would_work():
    with pytest.raises(PlanError, match=r"up to 8 rows, 9 were asked for; plan with max_rows=9"):
        planned(silu_graph()).schedule(9, 1)


def test_rows_that_no_plan_can_know_are_an_error_that_names_the_node():
    with pytest.raises(KernelmuxError, match="y"):
        planned(silu_graph(rows="pages"))


# Formats and conversions.


def formats(step):
    return [value.format for value in step.node.inputs], [value.format for value in step.node.outputs]


def test_a_conversion_stands_where_neighbours_differ():
    plan = planned(chain("silu", "silu"), a=whole_backend(silu=FakeKernel(takes=["bf16"])))
    ops = [step.node.op for step in steps(plan)]
    assert ops == ["convert", "silu", "convert", "silu"]
    assert plan.schedule(1, 1).conversions == 2
    convert, silu, *_ = steps(plan)
    assert formats(convert) == (["f32"], ["bf16"])
    assert silu.node.inputs == convert.node.outputs


def test_a_conversion_is_made_once_for_several_readers():
    plan = planned(chain("mul", "mul", "mul"), a=whole_backend(mul=FakeKernel(takes=["bf16"], emits=["bf16"])))
    converted = Counter(step.node.inputs[0].name for step in steps(plan) if step.node.op == "convert")
    assert converted["x"] == 1
    readers = [value.name for step in steps(plan) if step.node.op == "mul" for value in step.node.inputs]
    assert readers.count("x.as_bf16") == 4


def test_a_conversion_is_folded_into_a_producer_that_can_emit_the_format():
    add = FakeKernel(takes=["bf16"])
    plan = planned(chain("silu", "add"), a=whole_backend(silu=FakeKernel(emits=FLOATS), add=add))
    silu = next(step for step in steps(plan) if step.node.op == "silu")
    assert formats(silu) == (["f32"], ["bf16"])
    # Only the chain's own input is converted.
    assert [step.node.inputs[0].name for step in steps(plan) if step.node.op == "convert"] == ["x"]


def test_a_producer_keeps_the_graphs_format_where_nobody_asks_for_another():
    plan = planned(chain("silu", "silu"), a=whole_backend(silu=FakeKernel(takes=FLOATS, emits=["bf16", "f32"])))
    assert [formats(step) for step in steps(plan)] == [(["f32"], ["f32"])] * 2


def test_of_several_formats_the_one_that_saves_most_conversions_is_written():
    b = Builder("g")
    y = b.value("silu", "y", b.leaf("x", ("m", 8), role="state"))
    outs = [b.value("mul", f"m{i}", y, y) for i in range(2)] + [b.value("add", "s", y, y)]
    kernels = {"mul": FakeKernel(takes=["bf16", "f16"]), "add": FakeKernel(takes=["f16"])}
    plan = planned(b.build(*outs), a=whole_backend(silu=FakeKernel(emits=["f32", "bf16", "f16"]), **kernels))
    assert [step.node.op for step in steps(plan)] == ["silu", "mul", "mul", "add"]
    assert formats(steps(plan)[0])[1] == ["f16"]


def test_what_the_graph_hands_back_is_stored_as_it_states():
    plan = planned(silu_graph(), a=whole_backend(silu=FakeKernel(emits=["bf16"])))
    assert [step.node.op for step in steps(plan)] == ["silu", "convert"]
    assert plan.schedule(1, 1).outputs == (steps(plan)[1].node.outputs[0].name,)
    assert formats(steps(plan)[1]) == (["bf16"], ["f32"])


def test_a_conversion_that_nobody_makes_is_an_error_that_names_both_ends():
    with pytest.raises(PlanError, match=r"x\.as_bf16 \(convert of x \[\d+, 8\] f32\).*a has no convert"):
        planned(silu_graph(), a=backend(silu=FakeKernel(takes=["bf16"])))


def test_a_conversion_takes_no_name_that_the_graph_has():
    b = Builder("g")
    x = b.leaf("x", ("m", 8), role="state")
    y = b.value("silu", "x.as_bf16", x)
    graph = b.build(b.value("silu", "z", x), y)
    plan = planned(graph, a=whole_backend(silu=FakeKernel(takes=["bf16"])))
    names = [value.name for step in steps(plan) for value in step.node.outputs]
    assert len(names) == len(set(names))


def _copying_graph():
    b = Builder("g")
    rows = [b.leaf(name, ("m", 8), role="state") for name in ("k", "v")]
    slots = b.leaf("slots", ("m",), "i32", role="state")
    caches = [b.leaf(f"{name}_cache", ("pages", 4, 2, 4), role="cache") for name in "kv"]
    return b.build(*b.node("copy", "copy", *rows, slots, *caches, num_kv_heads=2, head_dim=4))


def test_a_kernel_that_wants_the_cache_in_another_format_does_not_get_the_node():
    """A cache is no step's to convert: the next kernel gets the node, or the error says why nobody does."""
    with pytest.raises(KernelmuxError, match=r"copy|_cache"):
        planned(_copying_graph(), a=whole_backend(copy=FakeKernel(takes=["f16"])))


class _Short(FakeKernel):
    def inputs(self, node):
        return []


class _Odd(FakeKernel):
    def outputs(self, node):
        return [["f33"]]


class _None(FakeKernel):
    def outputs(self, node):
        return [[]]


class _Raises(FakeKernel):
    def workspace(self, node):
        raise RuntimeError("no such tile")


@pytest.mark.parametrize("kernel", [_Short, _Odd, _None, _Raises])
def test_a_kernel_whose_declarations_are_nonsense_is_named(kernel):
    with pytest.raises(KernelmuxError, match="a:f32"):
        planned(silu_graph(), a=whole_backend(silu=kernel()))


# Launches, counts, fingerprint.


def test_launches_are_those_that_the_kernels_declare_conversions_included():
    kernels = {"silu": FakeKernel(launches=3), "add": FakeKernel(takes=["bf16"], emits=["f32"])}
    plan = planned(chain("silu", "add"), a=whole_backend(convert=FakeKernel(launches=2), **kernels))
    schedule = plan.schedule(1, 1)
    assert schedule.conversions == 2
    assert schedule.launches == 3 + 1 + 2 * 2


def test_kernels_are_counted_by_op():
    text = '[[rule]]\nnode = "n2"\nuse = "b"\n'
    plan = planned(chain("silu", "add", "silu"), text, a=whole_backend(), b=whole_backend())
    assert kernel_counts(plan.schedule(1, 1)) == {"silu": {"a:f32": 1, "b:f32": 1}, "add": {"a:f32": 1}}


def _fingerprint(graph=None, policy="", max_rows=8, **changes):
    return planned(graph or chain("silu", "add"), policy, max_rows=max_rows, a=whole_backend(**changes)).fingerprint


def test_the_same_inputs_give_the_same_fingerprint():
    assert _fingerprint() == _fingerprint()


def test_a_rule_that_changes_no_choice_changes_no_fingerprint():
    assert _fingerprint(policy='[[rule]]\nop = "silu"\nuse = "a"\n') == _fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"graph": chain("silu", "mul")},
        {"silu": FakeKernel("other")},
        {"silu": FakeKernel(version="2")},
        {"silu": [FakeKernel(), FakeKernel("small")], "policy": '[[rule]]\nop = "silu"\nm = 1\nuse = "a:small"\n'},
        {"silu": FakeKernel(emits=["bf16"])},
        {"max_rows": 16},
    ],
)
def test_another_graph_choice_version_or_bucket_gives_another_fingerprint(changes):
    assert _fingerprint(**changes) != _fingerprint()

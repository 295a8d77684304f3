"""What planning costs, counted instead of timed: alike nodes are asked for once, and work grows as the graph does.

Work is the number of Python calls, which is the same on every machine. Seconds are tests/bench/test_plan_bench.py's.
"""

import pytest

from counted import work
from fake_backend import CPU, FakeKernel, chain, llama_graph, plan_for, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.registry import Registry
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import CORE_OPS, OPS, fused_ops
from kernelmux.graph.rewrite import find_fusions
from kernelmux.measure.table import Tables
from kernelmux.measure.times import Known
from kernelmux.plan import offers
from kernelmux.plan.choice import unreadable
from kernelmux.plan.plan import make_plan
from kernelmux.plan.summary import summarise
from kernelmux.policy.policy import parse_policy

AUTO = '[defaults]\nuse = ["auto"]\n'
POLICY = """\
[[rule]]
op = "mul_mat"
m = "1..8"
use = ["b:fast", "a"]

[[rule]]
layer = "0..1"
op = ["mul_mat", "silu"]
use = "a"

[defaults]
use = ["a", "b"]
"""


def backends():
    both = [FakeKernel("fast", takes=["bf16"]), FakeKernel()]
    return {"a": whole_backend(), "b": whole_backend(mul_mat=both, qkv=both), "c": backend(add=FakeKernel())}


@pytest.fixture
def asked(monkeypatch):
    """Every asking of the backends: (op, rows)."""
    seen, offer = [], Registry.offer

    def counting(self, node, device):
        seen.append((node.op, node.rows, node.weights and node.weights[0].extents))
        return offer(self, node, device)

    monkeypatch.setattr(Registry, "offer", counting)
    return seen


def plan(graph, policy=POLICY, max_rows=16):
    with registry.isolated(**backends()) as found:
        return plan_for(graph, found, policy, max_rows=max_rows)


def test_100_alike_nodes_ask_no_more_than_10_000(asked):
    counts = []
    for nodes in (100, 10_000):
        asked.clear()
        plan(chain(*(["silu", "add"] * (nodes // 2))), max_rows=4)
        counts.append(len(asked))
    assert counts[0] == counts[1]
    assert counts[0] == len(set(asked))


@pytest.mark.parametrize("policy", ["", POLICY], ids=["no rules", "rules by layer and rows"])
def test_4_layers_ask_no_more_than_80(asked, policy):
    counts = []
    for layers in (4, 80):
        asked.clear()
        plan(llama_graph(layers), policy)
        counts.append(len(asked))
    assert counts[0] == counts[1]
    # Five row counts, of every op, and of mul_mat's few shapes.
    assert counts[0] <= 5 * (len(CORE_OPS) + 8)


def test_rules_alone_ask_nobody_again(asked):
    """Rules choose among answers: that they differ by layer is no reason to ask by layer."""
    plan(llama_graph(8), "")
    without = len(asked)
    asked.clear()
    rules = "".join(f'[[rule]]\nlayer = {layer}\nuse = "{"ab"[layer % 2]}"\n' for layer in range(8))
    plan(llama_graph(8), rules)
    # Where layers differ a few more kinds of fusions and conversions come up.
    assert len(asked) < 1.5 * without


def _star(mul_mats):
    """mul_mats that all read one value, as the experts of a layer do."""
    b = Builder("star")
    x = b.leaf("x", ("m", 8), role="state")
    return b.build(*(b.value("mul_mat", f"e{i}", x, weight=(b.leaf(f"w{i}", (8, 8)),)) for i in range(mul_mats)))


def _tree(leaves):
    """A sum over many inputs, pair by pair: many values are alive at once."""
    b = Builder("tree")
    row = [b.value("silu", f"s{i}", b.leaf(f"x{i}", ("m", 8), role="state")) for i in range(leaves)]
    while len(row) > 1:
        row = [b.value("add", f"{row[i].name}_", row[i], row[i + 1]) for i in range(0, len(row), 2)]
    return b.build(*row)


GROWING = {
    "a chain": lambda size: chain(*(["silu", "add"] * (size * 8))),
    "layers": llama_graph,
    "a tree": lambda size: _tree(size * 8),
    # In threes, which one fused op takes: what is left over would differ from size to size.
    "experts": lambda size: _star(size * 3),
}


@pytest.mark.parametrize("build", GROWING.values(), ids=GROWING)
def test_twice_the_nodes_are_twice_the_work(build):
    plan(build(2))  # imports, caches
    small, large, huge = (work(plan, build(size)) for size in (4, 8, 16))
    # Differences, so that what does not grow does not count.
    assert large > small
    assert huge - large < 2.2 * (large - small), (small, large, huge)


@pytest.mark.parametrize("build", [llama_graph, lambda size: _star(size * 2)], ids=["layers", "experts"])
def test_twice_the_nodes_are_twice_the_search_for_fusions(build):
    small, large, huge = (work(find_fusions, build(size), fused_ops()) for size in (4, 8, 16))
    assert huge - large < 2.2 * (large - small), (small, large, huge)


def test_a_summary_asks_nobody_where_times_are_known_and_by_kind_where_not(asked, monkeypatch):
    counts = []
    for layers in (4, 16):
        # Whom a budget keeps out is asked about what he would save.
        made = plan(llama_graph(layers), f"{AUTO}max_error = 1.0\n")
        asked.clear()
        summarise(made)
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0
    monkeypatch.setattr(Tables, "time", lambda self, kernel, node, rows, context: (Known(40.0), "measured here"))
    asked.clear()
    summarise(made)
    assert asked == []


def _many_options():
    """Four kernels of every op, which differ in formats and speed, so that none replaces another."""
    formats = (["f32"], ["bf16", "f32"], ["bf16"], ["f16", "f32"])
    kernels = [
        FakeKernel("".join(each), takes=each, emits=each, reading=0.5 + 0.1 * place)
        for place, each in enumerate(formats)
    ]
    return {"a": whole_backend(), "b": backend(**{op: kernels for op in OPS if op != "convert"})}


def plan_of_many_options(max_rows):
    with registry.isolated(**_many_options()) as found:
        return plan_for(llama_graph(2), found, AUTO, max_rows=max_rows)


def test_a_kernel_is_asked_once_whether_it_fits_whatever_the_rows(monkeypatch):
    asked = []

    def counting(kernel, node):
        asked.append(kernel)
        return unreadable(kernel, node)

    monkeypatch.setattr(offers, "unreadable", counting)
    plan_of_many_options(4)
    few = len(asked)
    plan_of_many_options(256)
    assert len(asked) - few == few > 0


def test_many_options_cost_a_row_count_no_more_than_they_did():
    """Of each row count beyond the first few: its options and links, worked out once for all kinds of fusions."""
    plan_of_many_options(4)
    few, many = (work(plan_of_many_options, rows) for rows in (4, 256))
    # 69,000; 132,000 where a link's options were compared whole, and each kernel was asked anew at each row count.
    assert (many - few) / 6 < 80_000


def test_a_plan_touches_no_weights():
    """Their bytes are known without packing: a plan of a model of 40 GB is made before a byte of it is read."""
    kernel = FakeKernel(packed_bytes=10**9)
    with registry.isolated(a=whole_backend(mul_mat=kernel)) as found:
        made = make_plan(llama_graph(2), parse_policy("fuse = false", "p.toml"), found, CPU, 8)
    assert made.packed_bytes == 15 * 10**9
    assert (kernel.prepared, kernel.bound) == ([], [])
    assert PackedWeights({}, CPU).nbytes == 0

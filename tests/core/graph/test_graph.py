"""Graphs: what the builder infers, what a graph must keep, and JSON there and back."""

import json
import random
import types
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import graphs, silu_graph
from kernelmux.contract import hookimpl, registry
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import Builder, Graph, TensorNode, make_node
from kernelmux.graph.ops import Case, Op
from kernelmux.models import open_model

ATTENTION = ["rms_norm", "mul_mat", "mul_mat", "mul_mat", "rope", "copy", "attention", "mul_mat", "add"]
FEED_FORWARD = ["rms_norm", "mul_mat", "mul_mat", "silu", "mul", "mul_mat", "add"]


@pytest.fixture(scope="module")
def llama(tiny):
    return open_model(tiny).graph


def test_a_llama_layer_runs_in_the_order_of_its_equations(llama):
    for layer in range(2):
        assert [node.op for node in llama.ops if node.layer == layer] == ATTENTION + FEED_FORWARD
    assert [node.op for node in llama.ops if node.layer is None] == ["embed", "embed", "rms_norm", "mul_mat"]


def test_shapes_of_a_llama_layer_are_inferred(llama):
    cache = ("pages", "page_size", 2, 16)
    expected = {
        "embed": ("m", 64),
        "blk.1.attn_norm": ("m", 64),
        "blk.1.attn_k": ("m", 32),
        "blk.1.rope.q": ("m", 64),
        "blk.1.rope.k": ("m", 32),
        "blk.1.copy.v_cache": cache,
        "blk.1.attention": ("m", 64),
        "blk.1.ffn_gate": ("m", 96),
        "blk.1.ffn_mul": ("m", 96),
        "blk.1.ffn_add": ("m", 64),
        "logit_rows.select": ("outs", 64),
    }
    assert {name: llama.values[name].shape for name in expected} == expected
    assert llama.values["logits"].shape[0] == "outs"


def test_a_llama_survives_json(llama):
    assert Graph.from_json(llama.to_json()) == llama


def test_leaves_and_ops_are_told_apart(llama):
    assert {leaf.role for leaf in llama.leaves} == {"weight", "state", "cache"}
    assert len(llama.leaves) + len(llama.ops) == len(llama.nodes)


def test_logits_before_they_are_scaled_or_capped_are_the_graphs_answer_too():
    """So that a plan rounds them no more than what it hands back."""
    b = Builder("capped")
    x = b.leaf("x", ("m", 8), role="state")
    product = b.value("mul_mat", "product", x, weight=(b.leaf("w", (16, 8)),))
    scaled = b.value("scale", "scaled", product, scale=0.25)
    assert b.build(b.value("soft_cap", "logits", scaled, soft_cap=30.0)).answers == {"logits", "scaled", "product"}


# What a graph must keep. Each fault is made in a good graph of three nodes.

X = Value("x", ("m", 8))


def _silu(name, source, **changes):
    values = {"inputs": (source,), "outputs": (replace(source, name=name),)}
    return TensorNode(name=name, op="silu", **{**values, **changes})


LEAF = TensorNode(name="x", op="leaf", outputs=(X,), role="state")
A, B = _silu("a", X), _silu("b", Value("a", ("m", 8)))
NORM = {"gamma": (Value("g", (8,)),), "epsilon": 1e-5}
FAULTS = {
    "order": ((LEAF, B, A), ("b",), "b reads 'a', which is produced only later"),
    "dangling": ((A,), ("a",), "a reads 'x', which no node produces"),
    "duplicate": ((LEAF, A, replace(B, outputs=A.outputs)), ("a",), "b produces 'a', which another node has produced"),
    "one name for two nodes": ((LEAF, A, replace(B, name="a")), ("b",), "a"),
    "shape": ((LEAF, _silu("a", X, outputs=(Value("a", ("m", 9)),))), ("a",), r"a \(silu\): output a is .*9.*not.*8"),
    "another shape than produced": ((LEAF, _silu("a", replace(X, shape=("m", 4)))), ("a",), "a reads .*4.*produced as"),
    "another format than produced": ((LEAF, _silu("a", replace(X, format="f16"))), ("a",), "a reads .*f16.*f32"),
    "too many outputs": ((LEAF, replace(A, outputs=(*A.outputs, X))), ("a",), r"a \(silu\) needs outputs"),
    "no output": ((LEAF, replace(A, outputs=())), (), r"a \(silu\) needs outputs y"),
    "wrong field": ((LEAF, replace(A, head_dim=4)), ("a",), r"a \(silu\) takes no field 'head_dim'"),
    "wrong weight": ((LEAF, replace(A, gamma=(X,))), ("a",), r"a \(silu\) takes no field 'gamma'"),
    "unknown op": ((LEAF, replace(A, op="sillu")), ("a",), r"a: unknown op 'sillu' \(did you mean 'silu'\?\)"),
    "unknown format": ((LEAF, _silu("a", X, outputs=(replace(X, name="a", format="f33"),))), ("a",), "'f33'.*f32"),
    "too many inputs": ((LEAF, replace(A, inputs=(X, X))), ("a",), r"a \(silu\) takes x; 2 inputs were given"),
    "too few inputs": ((LEAF, replace(A, inputs=())), ("a",), r"a \(silu\) takes x; 0 inputs were given"),
    "missing field": ((LEAF, replace(A, op="rms_norm")), ("a",), r"a \(rms_norm\) needs the field 'gamma'"),
    "unknown output": ((LEAF, A), ("aa",), r"output 'aa' is produced by no node \(did you mean 'a'\?\)"),
    "leaf that reads": ((LEAF, replace(LEAF, name="y", inputs=(X,), outputs=(replace(X, name="y"),))), ("y",), "y"),
    "leaf that holds nothing": ((replace(LEAF, outputs=()),), (), "x"),
    "extent below zero": ((replace(LEAF, outputs=(Value("x", (-1, 8)),)),), ("x",), "x"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "outputs", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_named(nodes, outputs, message):
    with pytest.raises(GraphError, match=message) as caught:
        Graph("g", nodes, outputs)
    said, node = str(caught.value), caught.value.node
    if said.startswith(("unknown format", "the graph's output")):
        assert node is None
    else:
        assert node in {node.name for node in nodes}
        assert said.startswith((node, f"two nodes are named {node!r}"))


def test_the_graph_that_the_faults_were_made_in_is_good():
    assert Graph("g", (LEAF, A, B), ("b",)).outputs == ("b",)


def _copying(b):
    rows = [b.leaf(name, ("m", 8), role="state") for name in ("k", "v")]
    slots = b.leaf("slots", ("m",), "i32", role="state")
    caches = [b.leaf(f"{name}_cache", ("pages", 4, 2, 4), role="cache") for name in "kv"]
    return caches, b.node("copy", "copy", *rows, slots, *caches, num_kv_heads=2, head_dim=4)


def test_a_cache_is_not_read_after_copy_has_updated_it():
    b = Builder("g")
    (k_cache, v_cache), (_, v_updated) = _copying(b)
    state = [
        b.leaf(name, shape, "i32", role="state") for name, shape in (("s", (2,)), ("l", (1,)), ("t", (1, "width")))
    ]
    q = b.leaf("q", ("m", 8), role="state")
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "scale": 0.5}
    for caches in ((k_cache, v_cache), (k_cache, v_updated)):
        y = b.value("attention", f"stale.{caches[1].name}", q, *caches, *state, **heads)
        with pytest.raises(GraphError, match="'k_cache' after copy has updated its memory"):
            b.build(y)


def test_an_updated_cache_keeps_its_format():
    b = Builder("g")
    _copying(b)
    nodes = list(b.build().nodes)
    k, v = nodes[-1].outputs
    with pytest.raises(GraphError, match=r"copy\.k_cache must keep its input's format"):
        Graph("g", (*nodes[:-1], replace(nodes[-1], outputs=(replace(k, format="f16"), v))), ())


# JSON.


@settings(derandomize=True, deadline=None, max_examples=60)
@given(graph=graphs())
def test_json_gives_the_same_graph_back(graph):
    assert Graph.from_json(graph.to_json()) == graph


@settings(derandomize=True, deadline=None, max_examples=60)
@given(graph=graphs(), seed=st.integers(0, 2**31))
def test_damaged_json_is_a_graph_error_or_a_graph(graph, seed):
    chance, text = random.Random(seed), graph.to_json()
    for _ in range(5):
        start, length = chance.randrange(len(text)), chance.randrange(6)
        noise = "".join(chance.choices('{}[]",:0159.-eamnx', k=chance.randrange(4)))
        _reads_or_refuses(text[:start] + noise + text[start + length :])


def _reads_or_refuses(text):
    try:
        graph = Graph.from_json(text)
    except GraphError:
        return
    assert Graph.from_json(graph.to_json()) == graph


NONSENSE = [None, True, -1, 0.5, 1e400, "", "m", [], [[]], {}, [1], {"name": "x"}, "attention"]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(graph=graphs(), value=st.sampled_from(NONSENSE), seed=st.integers(0, 2**31))
def test_json_of_the_wrong_types_is_a_graph_error_or_a_graph(graph, value, seed):
    chance, document = random.Random(seed), json.loads(graph.to_json())
    places = [(container, key) for container in _containers(document) for key in _keys(container)]
    container, key = chance.choice(places)
    container[key] = value
    _reads_or_refuses(json.dumps(document))


def _keys(container):
    return list(container) if isinstance(container, dict) else range(len(container))


def _containers(value):
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{}", "[" * 100_000, '{"nodes": 3}', '{"nodes": [1]}', "\x00"])
def test_what_is_no_graph_at_all_is_a_graph_error(text):
    with pytest.raises(GraphError):
        Graph.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"), [("shape", [0.5, 8]), ("shape", [[1], 8]), ("shape", ["m", None]), ("format", 3), ("name", 3)]
)
def test_json_with_a_value_that_cannot_be_is_a_graph_error(key, value):
    document = json.loads(silu_graph().to_json())
    for node in document["nodes"]:
        node["outputs"][0][key] = value
    with pytest.raises(GraphError):
        Graph.from_json(json.dumps(document))


class Leaky(Op):
    """y = x, or alpha x below 0."""

    name = "leaky"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("alpha",)

    def infer(self, node, format):
        return (self.output(node, 0, node.inputs[0].shape, format),)

    def reference(self, node, operands):
        (x,) = operands.inputs
        return (x.where(x > 0, x * node.alpha),)

    def cases(self):
        yield Case("leaky", "leaky", (Value("x", (3, 8)),), {"alpha": 0.25})


def test_an_op_may_have_fields_of_its_own():
    plugin = types.SimpleNamespace(CONTRACT=2, new_ops=hookimpl(lambda: [Leaky()]))
    with registry.isolated(mine=plugin) as found:
        assert found.backends["mine"].fault == ""
        b = Builder("g")
        graph = b.build(b.value("leaky", "y", b.leaf("x", ("m", 8), role="state"), alpha=0.5))
        assert graph.ops[0].alpha == 0.5
        assert Graph.from_json(graph.to_json()) == graph
        assert graph.ops[0].resolve({"m": 3}).alpha == 0.5
        with pytest.raises(GraphError, match=r"y \(leaky\) needs the field 'alpha'"):
            make_node("leaky", "y", Value("x", (3, 8)))
        with pytest.raises(GraphError, match=r"y \(leaky\) takes no field 'beta'"):
            make_node("leaky", "y", Value("x", (3, 8)), alpha=0.5, beta=1.0)
        with pytest.raises(AttributeError, match="a leaky has no field 'beta'"):
            _ = graph.ops[0].beta

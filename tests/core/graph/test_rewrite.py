"""Fusions: found where a pattern stands and nothing else sees its inside, kept where the policy would have agreed.

A fused graph gives the numbers of the plain one; everything here runs in float64, so that no rounding hides a fault.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelmux_reference
from fake_backend import CPU, llama_graph, llama_layer, plan_for
from kernelmux.conformance.testing import nmse
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.graph import Builder, Graph
from kernelmux.graph.ops import OPS, Fused, Part, Rotation, fused_ops
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux.graph.rewrite import find_fusions, fuse
from kernelmux.run.walker import Walker

WIDTH = 32
ROWS = 5
EXACT = '[defaults]\nuse = ["reference:f64"]\n'
PLAIN = f"fuse = false\n{EXACT}"


# Numbers.


def walked(graph, seed, policy, rows=ROWS):
    """What a graph hands back, and the caches that it leaves, with seeded leaves and weights."""
    generator = torch.Generator().manual_seed(seed)
    leaves, weights = {}, {}
    dims = {"m": rows, "outs": rows, "seqs": 1, "seqs+1": 2, "width": 2, "pages": 2, "page_size": 4}
    ids = {"positions": range(rows), "slots": range(rows), "query_start": (0, rows), "kv_len": (rows,)}
    ids |= {"block_table": (0, 1), "tokens": range(rows), "logit_rows": range(rows)}
    for leaf in graph.leaves:
        value = leaf.outputs[0].resolve(dims)
        if value.format == "i32":
            leaves[value.name] = torch.tensor(ids[value.name], dtype=torch.int32).view(value.extents)
        elif leaf.role == "cache":
            leaves[value.name] = torch.zeros(value.extents)
        elif lookup(value.format).plain:
            drawn = torch.randn(value.extents, generator=generator, dtype=torch.float64) / value.extents[-1] ** 0.5
            stored = drawn.to(lookup(value.format).dtype)
            (leaves if leaf.role == "state" else weights)[value.name] = stored
        else:
            weights[value.name] = random_blocks(value.format, value.extents, generator)
    shapes = {leaf.name: leaf.outputs[0] for leaf in graph.leaves}
    held = {n: Weight(n, shapes[n].extents, shapes[n].format, (planes,)) for n, planes in weights.items()}
    with registry.isolated(reference=kernelmux_reference) as found:
        plan = plan_for(graph, found, policy, max_rows=rows)
    walk = Walker(plan, PackedWeights(held, CPU), leaves).bind(m=rows, outs=rows, seqs=1)
    walk()
    caches = {leaf.name: leaves[leaf.name] for leaf in graph.leaves if leaf.role == "cache"}
    return plan, {name: planes.clone() for name, planes in (walk.outputs | caches).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert bool(expected.isfinite().all())
        assert nmse(found[name], expected) < 1e-20, name


class _Blocks:
    """Adds pieces to a graph in which patterns stand, whole or spoilt."""

    def __init__(self, draw):
        self.draw, self.b = draw, Builder("g", "f64")
        self.values = [self.b.leaf("x", ("m", WIDTH), "f64", role="state")]
        shapes = {"positions": ("m",), "slots": ("m",), "query_start": ("seqs+1",), "kv_len": ("seqs",)}
        shapes["block_table"] = ("seqs", "width")
        self.state = {name: self.b.leaf(name, shape, "i32", role="state") for name, shape in shapes.items()}

    def any(self):
        return self.draw(st.sampled_from(self.values))

    def linear(self, name, x, bias=None):
        format = self.draw(st.sampled_from(["f32", "bf16", "f16"]))
        with_bias = self.draw(st.booleans()) if bias is None else bias
        biases = (self.b.leaf(f"{name}.b", (WIDTH,)),) if with_bias else ()
        weight = self.b.leaf(f"{name}.w", (WIDTH, WIDTH), format)
        return self.b.value("mul_mat", name, x, weight=(weight,), bias=biases)

    def norm(self, name, x):
        gamma = self.b.leaf(f"{name}.g", (WIDTH,))
        return self.b.value("rms_norm", name, x, gamma=(gamma,), epsilon=self.draw(st.floats(1e-6, 1e-2)))

    def add(self, at):
        """One piece; the inner values too may be read by what follows."""
        kind = self.draw(st.sampled_from(["node", "add_norm", "gate", "qkv", "gate_up", "linear_add", "layer"]))
        x, b = self.any(), self.b
        if kind == "node":
            made = [b.value(self.draw(st.sampled_from(["add", "mul"])), f"{at}.y", x, self.any())]
        elif kind == "add_norm":
            total = b.value("add", f"{at}.sum", x, self.any())
            made = [total, self.norm(f"{at}.norm", total)]
        elif kind == "gate":
            gated = b.value("silu", f"{at}.silu", x)
            made = [gated, b.value("mul", f"{at}.mul", gated, self.any())]
        elif kind == "qkv":
            bias = self.draw(st.sampled_from([True, False, None]))
            made = [self.linear(f"{at}.{part}", x, bias) for part in "qkv"]
        elif kind == "gate_up":
            gate, up = self.linear(f"{at}.gate", x), self.linear(f"{at}.up", x)
            gated = b.value("silu", f"{at}.silu", gate)
            made = [gate, up, gated, b.value("mul", f"{at}.mul", gated, up)]
        elif kind == "linear_add":
            product = self.linear(f"{at}.product", x)
            made = [product, b.value("add", f"{at}.sum", self.any(), product)]
        else:
            made = [llama_layer(b, x, self.state, int(at.removeprefix("n")))]
        spoilt = self.draw(st.booleans())
        self.values += made if spoilt else made[-1:]

    def graph(self):
        outputs = self.draw(st.lists(st.sampled_from(self.values[1:]), min_size=1, max_size=3, unique=True))
        return self.b.build(*outputs)


@st.composite
def patterned(draw):
    """Graphs of up to five pieces in which fused ops' patterns stand, whole, overlapping, or spoilt by a reader."""
    blocks = _Blocks(draw)
    for index in range(draw(st.integers(1, 5))):
        blocks.add(f"n{index}")
    return blocks.graph()


seeds = st.integers(0, 2**31)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=patterned(), seed=seeds)
def test_a_graph_fused_wherever_it_can_be_gives_the_numbers_of_the_plain_one(graph, seed):
    plain, expected = walked(graph, seed, PLAIN)
    fused, found = walked(graph, seed, EXACT)
    assert_same(found, expected)
    assert not plain.fused
    assert bool(fused.fused) == bool(find_fusions(graph, fused_ops()))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graph=patterned(), seed=seeds, data=st.data())
def test_any_of_the_fusions_give_the_numbers_of_the_plain_graph(graph, seed, data):
    chosen, taken = [], set()
    for fusion in data.draw(st.permutations(find_fusions(graph, fused_ops()))):
        if taken.isdisjoint(fusion.parts) and data.draw(st.booleans()):
            chosen.append(fusion)
            taken.update(fusion.parts)
    # A graph checks itself: order, shapes, and that no value is lost or written twice.
    rewritten = Graph(graph.name, (*graph.leaves, *fuse(graph.ops, chosen)), graph.outputs)
    assert len(rewritten.ops) == len(graph.ops) - sum(len(fusion.parts) - 1 for fusion in chosen)
    assert rewritten.values.keys() <= graph.values.keys()
    assert_same(walked(rewritten, seed, PLAIN)[1], walked(graph, seed, PLAIN)[1])


def test_qkv_of_mixed_weight_formats_gives_the_numbers_of_three_mul_mats():
    b = Builder("g", "f64")
    x = b.leaf("x", ("m", 256), "f64", role="state")
    formats = ("Q4_K", "Q4_K", "Q6_K")
    weights = [b.leaf(f"w{part}", (16, 256), format) for part, format in zip("qkv", formats, strict=True)]
    graph = b.build(*(b.value("mul_mat", w.name[1:], x, weight=(w,)) for w in weights))
    plan, found = walked(graph, 0, EXACT)
    (step,) = plan.schedule(1, 1).steps
    assert step.node.op == "qkv"
    assert step.node.contract.arguments(step.node)["weight_formats"] == formats
    assert_same(found, walked(graph, 0, PLAIN)[1])


# Where a pattern stands, and where it seems to.


def names(graph, *ops):
    return [fusion.node.name for fusion in find_fusions(graph, ops or fused_ops())]


def test_a_llamas_fusions_are_named_after_their_parts_and_keep_the_values_names():
    found = find_fusions(llama_graph(), fused_ops())
    assert {fusion.node.op: fusion.node.name for fusion in found if fusion.node.op != "mul_mat_add"} == {
        "qkv_rope_copy": "blk.0.attn_q+attn_k+attn_v+rope+copy",
        "gate_up_swiglu": "blk.0.ffn_gate+ffn_up+ffn_silu+ffn_mul",
        "qkv": "blk.0.attn_q+attn_k+attn_v",
        "add_rms_norm": "blk.0.attn_add+ffn_norm",
        "swiglu": "blk.0.ffn_silu+ffn_mul",
        "rope_copy": "blk.0.rope+copy",
        "mul_mat_pair": "blk.0.ffn_gate+ffn_up",
    }
    assert [len(fusion.parts) for fusion in found] == sorted((len(f.parts) for f in found), reverse=True)
    outputs = {fusion.node.op: [value.name for value in fusion.node.outputs] for fusion in found}
    assert outputs["qkv"] == ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]
    assert outputs["add_rms_norm"] == ["blk.0.attn_add", "blk.0.ffn_norm"]
    assert outputs["qkv_rope_copy"] == ["blk.0.rope.q", "blk.0.copy.k_cache", "blk.0.copy.v_cache"]


def _x(b, name="x", width=WIDTH):
    return b.leaf(name, ("m", width), role="state")


def _swiglu(spoil=None):
    b = Builder("g")
    gated = b.value("silu", "gated", _x(b))
    other = b.value("silu", "other", gated) if spoil == "read" else _x(b, "up")
    y = b.value("mul", "y", gated, gated if spoil == "squared" else other)
    return b.build(*((y, gated) if spoil == "output" else (y,)))


def _three(spoil=None, parts="qkv"):
    b = Builder("g")
    x, made = _x(b), []
    for part in parts:
        bias = (b.leaf(f"{part}.b", (WIDTH,)),) if spoil == "biases" and part != "v" else ()
        made.append(b.value("mul_mat", part, x, weight=(b.leaf(f"{part}.w", (WIDTH, WIDTH)),), bias=bias))
        if spoil == "early" and part == "q":
            made.append(b.value("silu", "reader", made[0]))
    return b.build(*made, *([] if spoil == "early" else [b.value("silu", "reader", made[0])]))


def _attention(spoil=None):
    b = Builder("g")
    heads, dim = (4, 4) if spoil == "fields" else (2, 8)
    positions, slots = (b.leaf(name, ("m",), "i32", role="state") for name in ("positions", "slots"))
    x = _x(b)
    q, k, v = (b.value("mul_mat", p, x, weight=(b.leaf(f"{p}.w", (16, WIDTH)),)) for p in "qkv")
    rotation = Rotation(theta=1e4, dims=dim)
    q, k = b.node("rope", "rope", q, k, positions, rotation=rotation, num_heads=2, num_kv_heads=2, head_dim=8)
    caches = [b.leaf(f"{p}_cache", ("pages", 4, heads, dim), role="cache") for p in "kv"]
    return b.build(q, *b.node("copy", "copy", k, v, slots, *caches, num_kv_heads=heads, head_dim=dim))


SPOILT = {
    "an inner value is read elsewhere": (_swiglu, "read", "gated+y"),
    "an inner value is read twice": (_swiglu, "squared", "gated+y"),
    "an inner value is handed back": (_swiglu, "output", "gated+y"),
    "an output is read before the last part": (_three, "early", "q+k+v"),
    "some have biases": (_three, "biases", "q+k+v"),
    "fields disagree": (_attention, "fields", "q+k+v+rope+copy"),
}


@pytest.mark.parametrize(("build", "spoil", "name"), SPOILT.values(), ids=SPOILT)
def test_a_fusion_that_would_change_something_is_not_found(build, spoil, name):
    assert name in names(build())
    assert name not in names(build(spoil))


class SiluRows(Fused):
    """y = rows of silu(x)."""

    name = "silu_rows"
    inputs = ("x", "ids")
    outputs = ("y",)
    pattern = (Part("silu", ("x",), ("all",)), Part("embed", ("ids", "all"), ("y",)))

    def arguments(self, node):
        return {"m": node.inputs[0].shape[0]}

    def cases(self):
        return iter(())


@pytest.mark.parametrize(("rows", "found"), [("m", ["all+y"]), ("outs", [])])
def test_parts_of_different_row_counts_are_not_fused(rows, found):
    b = Builder("g")
    every = b.value("silu", "all", _x(b))
    graph = b.build(b.value("embed", "y", b.leaf("ids", (rows,), "i32", role="state"), every))
    assert names(graph, SiluRows()) == found


def test_places_of_one_op_share_no_node():
    assert names(_three(parts=("q", "k", "v", "w")), OPS["qkv"]) == ["q+k+v"]
    assert names(_three(parts="abcdef"), OPS["qkv"]) == ["a+b+c", "d+e+f"]
    assert names(_three(parts="abcde")) == ["a+b+c", "a+b", "c+d"]

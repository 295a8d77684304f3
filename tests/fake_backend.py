"""Backends, kernels and graphs for tests of core.

The kernels declare what a test asks for, and compute with the ops' own references; the graphs are small, or random.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from kernelmux.conformance.testing import backend
from kernelmux.contract import Kernel
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Efficiency
from kernelmux.graph.formats import dequantize_planes, quantize_planes
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import OPS, Operands, Rotation
from kernelmux.plan.plan import make_plan
from kernelmux.policy.policy import parse_policy

CPU = Device("cpu")


class FakeKernel(Kernel):
    """A kernel by its declarations. `takes` and `emits` hold for every input and output; None is what the graph states.

    It notes each node that it is bound to with its tensors. `work` is called at each launch, with node and tensors.
    """

    def __init__(
        self,
        name="f32",
        *,
        precision=1e-11,
        version="1",
        launches=1,
        takes=None,
        emits=None,
        packed="",
        packed_bytes=0,
        scratch=lambda node: 0,
        reading=0.5,
        work=lambda node, tensors: None,
    ):
        self.name, self.precision, self.version, self.launches = name, precision, version, launches
        self.packed, self.bytes, self.scratch, self._work = packed, packed_bytes, scratch, work
        self.takes, self.emits = takes, emits
        self.efficiency = Efficiency(reading=reading, multiplying=1e6)
        self.bound = []
        self.prepared = []

    def inputs(self, node):
        # Ids, lengths and caches stay as they are.
        free = self.takes is not None
        return [self.takes if free and value.format != "i32" else [value.format] for value in node.inputs]

    def outputs(self, node):
        return [[value.format] if self.emits is None else self.emits for value in node.outputs]

    def packed_bytes(self, node):
        return self.bytes

    def prepare(self, weights, device):
        self.prepared.append([weight.name for weight in weights])
        return tuple(weight.dequantize() for weight in weights)

    def workspace(self, node):
        return self.scratch(node)

    def bind(self, node, tensors, stream):
        self.bound.append((node, tensors))
        return lambda: self._work(node, tensors)


class FewRows(FakeKernel):
    """A kernel that is so many times worse beyond two rows."""

    def __init__(self, name, worse, **declared):
        super().__init__(name, **declared)
        self.worse = worse

    def reaches(self, node):
        best = self.efficiency
        return best if node.rows <= 2 else replace(best, reading=best.reading / self.worse)


def compute(node, tensors):
    """The op's reference in float64, as a kernel's `work`."""
    inputs = [_dense(value, planes) for value, planes in zip(node.inputs, tensors.inputs, strict=True)]
    packed = iter(tensors.packed)
    weight, bias, gamma = (tuple(next(packed).double() for _ in part) for part in (node.weight, node.bias, node.gamma))
    results = node.contract.reference(node, Operands(tuple(inputs), weight, bias, gamma))
    for value, planes, result in zip(node.outputs, tensors.outputs, results, strict=True):
        quantize_planes(value.format, result, planes if isinstance(planes, tuple) else (planes,))


def _dense(value, planes):
    if value.format == "i32":
        return planes
    return dequantize_planes(value.format, planes if isinstance(planes, tuple) else (planes,)).double()


def whole_backend(**changes):
    """A backend with one kernel `f32` for every op, which computes; `changes` replace or add answers."""
    return backend(**{**{op: FakeKernel(work=compute) for op in OPS}, **changes})


def plan_for(graph, registry, policy="", *, use=(), max_rows=8):
    """A plan on the CPU by a policy's text, called `p.toml`."""
    return make_plan(graph, parse_policy(policy, "p.toml").with_use(use), registry, CPU, max_rows)


def silu_graph(columns=8, rows="m"):
    """y = silu(x), the smallest graph that computes."""
    b = Builder("one")
    return b.build(b.value("silu", "y", b.leaf("x", (rows, columns), role="state")))


def chain(*ops, columns=8):
    """Elementwise ops one after another, `n0`, `n1`, ...; those of two inputs take `x` beside the last value."""
    b = Builder("chain")
    first = last = b.leaf("x", ("m", columns), role="state")
    for index, op in enumerate(ops):
        inputs = (last,) if len(OPS[op].inputs) == 1 else (last, first)
        last = b.value(op, f"n{index}", *inputs)
    return b.build(last)


def llama_graph(layers=1, *, heads=4, kv_heads=2, head_dim=8, feed_forward=48, vocab=40, format="f32", weight="f32"):
    """A llama, as the architecture builds it: 16 nodes a layer and four around them, over a paged cache."""
    b, hidden = Builder("llama", format), heads * head_dim
    symbols = {"tokens": "m", "positions": "m", "slots": "m", "logit_rows": "outs", "query_start": "seqs+1"}
    state = {name: b.leaf(name, (symbol,), "i32", role="state") for name, symbol in symbols.items()}
    state["kv_len"] = b.leaf("kv_len", ("seqs",), "i32", role="state")
    state["block_table"] = b.leaf("block_table", ("seqs", "width"), "i32", role="state")
    x = b.value("embed", "embed", state["tokens"], weight=(b.leaf("table", (vocab, hidden), weight),))
    for layer in range(layers):
        x = llama_layer(b, x, state, layer, (heads, kv_heads, head_dim), feed_forward, weight)
    x = b.value("embed", "select", state["logit_rows"], x)
    x = b.value("rms_norm", "norm", x, gamma=(b.leaf("norm.weight", (hidden,)),), epsilon=1e-5)
    return b.build(b.value("mul_mat", "logits", x, weight=(b.leaf("head", (vocab, hidden), weight),)))


def llama_layer(b, x, state, layer, sizes=(4, 2, 8), feed_forward=48, weight="f32"):
    """One layer of it, its weights and caches leaves of their own; `state` holds positions, slots and so on."""
    (num_heads, num_kv_heads, head_dim), at = sizes, f"blk.{layer}"
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "layer": layer}
    cache = ("pages", "page_size", num_kv_heads, head_dim)
    caches = [b.leaf(f"{at}.{part}_cache", cache, role="cache") for part in "kv"]

    def linear(name, value, n):
        stored = b.leaf(f"{at}.{name}.weight", (n, value.shape[1]), weight)
        return b.value("mul_mat", f"{at}.{name}", value, weight=(stored,), layer=layer)

    def norm(name, value):
        gamma = b.leaf(f"{at}.{name}.weight", value.shape[1:])
        return b.value("rms_norm", f"{at}.{name}", value, gamma=(gamma,), epsilon=1e-5, layer=layer)

    normed = norm("attn_norm", x)
    q, k, v = (linear(f"attn_{p}", normed, n * head_dim) for p, n in zip("qkv", (*sizes[:2], sizes[1]), strict=True))
    rotation = Rotation(theta=1e4, dims=head_dim)
    q, k = b.node("rope", f"{at}.rope", q, k, state["positions"], rotation=rotation, **heads)
    held = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "layer": layer}
    cached = b.node("copy", f"{at}.copy", k, v, state["slots"], *caches, **held)
    read = (state["query_start"], state["kv_len"], state["block_table"])
    mixed = b.value("attention", f"{at}.attention", q, *cached, *read, scale=head_dim**-0.5, **heads)
    x = b.value("add", f"{at}.attn_add", x, linear("attn_output", mixed, x.shape[1]), layer=layer)
    normed = norm("ffn_norm", x)
    gate, up = linear("ffn_gate", normed, feed_forward), linear("ffn_up", normed, feed_forward)
    gated = b.value("silu", f"{at}.ffn_silu", gate, layer=layer)
    product = b.value("mul", f"{at}.ffn_mul", gated, up, layer=layer)
    return b.value("add", f"{at}.ffn_add", x, linear("ffn_down", product, x.shape[1]), layer=layer)


dims = st.sampled_from([32, 64])


@st.composite
def graphs(draw):
    """Chains and trees of elementwise ops, mul_mat, rms_norm and rope over one input of `m` or of 3 rows."""
    b = Builder(draw(st.text(max_size=8)))
    values = [b.leaf("x", (draw(st.sampled_from(["m", 3])), draw(dims)), role="state")]
    for index in range(draw(st.integers(1, 12))):
        x, name = draw(st.sampled_from(values)), f"n{index}"
        op = draw(st.sampled_from(["add", "mul", "silu", "mul_mat", "rms_norm", "rope"]))
        values += b.node(op, name, *_operands(draw, b, op, name, x, values), **_fields(draw, b, op, name, x))
    return b.build(*draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True)))


def _operands(draw, b, op, name, x, values):
    if op == "rope":
        return x, x, b.leaf(f"{name}.p", x.shape[:1], "i32", role="state")
    alike = [value for value in values if value.shape == x.shape]
    return (x, draw(st.sampled_from(alike))) if op in ("add", "mul") else (x,)


def _fields(draw, b, op, name, x):
    fields = {"layer": draw(st.none() | st.integers(0, 3))}
    if op == "mul_mat":
        n = draw(dims)
        fields["weight"] = (b.leaf(f"{name}.w", (n, x.shape[1]), draw(st.sampled_from(["f32", "bf16", "f16"]))),)
        fields["bias"] = (b.leaf(f"{name}.b", (n,)),) if draw(st.booleans()) else ()
    elif op == "rms_norm":
        fields |= {"gamma": (b.leaf(f"{name}.g", x.shape[1:]),), "epsilon": draw(st.floats(1e-6, 1e-2))}
    elif op == "rope":
        pairing = draw(st.sampled_from(["adjacent", "halves"]))
        fields["rotation"] = Rotation(theta=draw(st.floats(2, 1e6)), dims=8, pairing=pairing)
        fields |= {"num_heads": x.shape[1] // 8, "num_kv_heads": x.shape[1] // 8, "head_dim": 8}
    return fields

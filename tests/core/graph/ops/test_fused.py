"""Fused ops: what each equals, written out once more by hand; shapes, flops, and what is no such node."""

from dataclasses import replace

import pytest
import torch

from kernelmux.conformance.draw import draw_case
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value, dequantize_planes
from kernelmux.graph.graph import Builder, Graph, case_node, make_node
from kernelmux.graph.ops import OPS, Case, Fused, Operands, Part, Rotation, fused_ops

CASES = [case for op in fused_ops() for case in op.cases()]


def with_biases(case):
    """The case with a bias for each of its mul_mats, where its op may take them."""
    linear = sum(part.op == "mul_mat" for part in OPS[case.op].pattern)
    biases = tuple(Value(f"b{i}", value.shape[:1]) for i, value in enumerate(case.fields["weight"][:linear]))
    return replace(case, name=f"{case.name}-bias", fields={**case.fields, "bias": biases})


def with_divisors(case):
    """The case with the rope's divisors as its last weight."""
    divisors = Value("divisors", (case.fields["rotation"].dims // 2,))
    draw = {**case.draw, "divisors": lambda generator: 1 + torch.rand(divisors.shape, generator=generator)}
    fields = {**case.fields, "weight": (*case.fields["weight"], divisors)}
    return replace(case, name=f"{case.name}-divisors", fields=fields, draw=draw)


FIRST = {op.name: next(iter(op.cases())) for op in fused_ops()}
BIASED = [with_biases(FIRST[op]) for op in ("qkv", "gate_up_swiglu", "mul_mat_add", "qkv_rope_copy")]
TURNED = [with_divisors(FIRST["qkv_rope_copy"]), with_divisors(BIASED[-1])]
FEW = [case for case in CASES if case.inputs[0].extents[0] in (1, 5)]
each = pytest.mark.parametrize("case", [*FEW, *BIASED, *TURNED], ids=lambda case: case.name)


# By hand.


def _linear(x, operands, index):
    bias = operands.bias[index] if operands.bias else 0
    return torch.einsum("mk,nk->mn", x, operands.weight[index]) + bias


def _turned(node, rows, positions, divisors):
    """Each pair, of neighbours or of one element from each half, as a complex number, times e^(i angle)."""
    exponents = torch.arange(0, node.rotation.dims, 2, dtype=torch.float64) / node.rotation.dims
    speeds = node.rotation.theta**-exponents / (divisors[0] if divisors else 1)
    if node.rotation.scaling != "none":
        speeds = torch.tensor(node.rotation.frequencies(), dtype=torch.float64)
    angles = positions.double()[:, None] * speeds
    whole = rows.reshape(len(rows), -1, node.head_dim)
    heads, rest = whole.split([node.rotation.dims, node.head_dim - node.rotation.dims], dim=-1)
    halves = node.rotation.pairing == "halves"
    pairs = heads.unflatten(-1, (2, -1)).mT if halves else heads.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = torch.view_as_real(turned) * node.rotation.magnitude
    turned_part = (parts.mT if halves else parts).reshape(heads.shape)
    return torch.cat([turned_part, rest], dim=-1).reshape(rows.shape)


def _add_rms_norm(node, operands):
    total = sum(operands.inputs)
    return total, operands.gamma[0] * total / (total.square().mean(dim=1, keepdim=True) + node.epsilon).sqrt()


def _gate_up_swiglu(node, operands):
    (x,) = operands.inputs
    return (torch.nn.functional.silu(_linear(x, operands, 0)) * _linear(x, operands, 1),)


def _mul_mat_add(node, operands):
    x, residual = operands.inputs
    return (residual + _linear(x, operands, 0),)


def _qkv_rope_copy(node, operands):
    x, positions, slots, *caches = operands.inputs
    rows = tuple(_linear(x, operands, index) for index in range(3))
    return _placed(node, rows, positions, slots, caches, operands.weight[3:])


def _placed(node, rows, positions, slots, caches, divisors):
    """Queries turned, and the caches with keys turned and values at their slots."""
    q, k, v = rows
    q, k = (_turned(node, part, positions, divisors) for part in (q, k))
    caches = [cache.clone() for cache in caches]
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for rows, cache in zip((k, v), caches, strict=True):
            page, place = divmod(slot, cache.shape[1])
            cache[page, place] = rows[row].view(cache.shape[2:])
    return (q, *caches)


def _rope_copy(node, operands):
    q, k, v, positions, slots, *caches = operands.inputs
    return _placed(node, (q, k, v), positions, slots, caches, operands.weight)


BY_HAND = {
    "rope_copy": _rope_copy,
    "mul_mat_pair": lambda node, operands: tuple(_linear(operands.inputs[0], operands, index) for index in range(2)),
    "add_rms_norm": _add_rms_norm,
    "swiglu": lambda node, operands: (torch.nn.functional.silu(operands.inputs[0]) * operands.inputs[1],),
    "qkv": lambda node, operands: tuple(_linear(operands.inputs[0], operands, index) for index in range(3)),
    "gate_up_swiglu": _gate_up_swiglu,
    "mul_mat_add": _mul_mat_add,
    "qkv_rope_copy": _qkv_rope_copy,
}


def drawn(case):
    """The node of a case and its numbers in float64."""
    made = draw_case(case)
    (node,) = made.graph.ops
    inputs = tuple(
        parts[0] if value.format == "i32" else dequantize_planes(value.format, parts, torch.float64)
        for value, parts in made.planes
    )
    weights = [
        tuple(made.weights[value.name].dequantize(torch.float64) for value in values)
        for values in (node.weight, node.bias, node.gamma)
    ]
    return node, Operands(inputs, *weights)


@each
def test_the_reference_is_the_formula(case):
    node, operands = drawn(case)
    found = node.contract.reference(node, operands)
    expected = BY_HAND[case.op](node, operands)
    assert len(found) == len(expected) == len(node.outputs)
    for value, ours, theirs in zip(node.outputs, found, expected, strict=True):
        assert ours.shape == value.extents
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@each
def test_the_plain_ops_are_a_graph_that_gives_the_same_numbers(case):
    node, operands = drawn(case)
    parts = node.contract.plain(node)
    assert [part.op for part in parts] == [part.op for part in node.contract.pattern]
    assert not any(isinstance(part.contract, Fused) for part in parts)
    b = Builder("plain")
    for value in node.inputs:
        b.leaf(value.name, value.shape, value.format, role="state")
    for value in node.weights:
        b.leaf(value.name, value.shape, value.format)
    # A graph checks order, wiring, fields and shapes.
    graph = Graph("plain", (*b.build().nodes, *parts), tuple(value.name for value in node.outputs))
    known = dict(zip((value.name for value in node.inputs), operands.inputs, strict=True))
    stored = zip(node.weights, (*operands.weight, *operands.bias, *operands.gamma), strict=True)
    known |= {value.name: numbers for value, numbers in stored}
    for part in graph.ops:
        numbers = [tuple(known[v.name] for v in values) for values in (part.inputs, part.weight, part.bias, part.gamma)]
        results = part.contract.reference(part, Operands(*numbers))
        known |= {value.name: result for value, result in zip(part.outputs, results, strict=True)}
    for value, wanted in zip(node.outputs, node.contract.reference(node, operands), strict=True):
        torch.testing.assert_close(known[value.name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("op", FIRST)
def test_flops_are_those_of_the_plain_ops(op):
    node = case_node(FIRST[op])
    assert node.contract.flops(node) == sum(part.contract.flops(part) for part in node.contract.plain(node)) > 0


def test_a_cost_counts_no_inner_value():
    """The point of fusing: what stays inside is neither written nor read."""
    node = case_node(FIRST["gate_up_swiglu"])
    operands = sum(value.nbytes for value in (*node.inputs, *node.weights, *node.outputs))
    assert node.contract.cost(node).nbytes == operands
    assert operands < sum(part.contract.cost(part).nbytes for part in node.contract.plain(node))


# Shapes and formats.

M, K = "m", 64


def _values(count, n=32):
    return tuple(Value(f"w{index}", (n, K)) for index in range(count))


X = Value("x", (M, K))
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotation": Rotation(theta=1e4, dims=8)}
ROWS = (Value("positions", (M,), "i32"), Value("slots", (M,), "i32"))
CACHES = tuple(Value(f"{part}_cache", ("pages", 4, 2, 8), "bf16") for part in "kv")
HEAD_WEIGHTS = tuple(Value(f"w{part}", (n, K)) for part, n in zip("qkv", (32, 16, 16), strict=True))
GAMMA = {"gamma": (Value("gamma", (K,)),), "epsilon": 1e-5}
GOOD = {
    "add_rms_norm": ((X, Value("b", (M, K))), GAMMA, [(M, K), (M, K)]),
    "swiglu": ((X, Value("b", (M, K))), {}, [(M, K)]),
    "qkv": ((X,), {"weight": HEAD_WEIGHTS}, [(M, 32), (M, 16), (M, 16)]),
    "gate_up_swiglu": ((X,), {"weight": _values(2)}, [(M, 32)]),
    "mul_mat_pair": ((X,), {"weight": _values(2)}, [(M, 32), (M, 32)]),
    "rope_copy": (
        (Value("q_flat", (M, 32)), Value("k_flat", (M, 16)), Value("v", (M, 16)), *ROWS, *CACHES),
        HEADS,
        [(M, 32), *(value.shape for value in CACHES)],
    ),
    "mul_mat_add": ((X, Value("residual", (M, 32))), {"weight": _values(1)}, [(M, 32)]),
    "qkv_rope_copy": (
        (X, *ROWS, *CACHES),
        {"weight": HEAD_WEIGHTS, **HEADS},
        [(M, 32), *(value.shape for value in CACHES)],
    ),
}


def test_every_fused_op_is_tested_here():
    assert set(GOOD) == set(BY_HAND) == {op.name for op in fused_ops()}


@pytest.mark.parametrize("op", GOOD)
def test_outputs_have_the_shapes_of_the_parts_and_the_format_that_is_asked_for(op):
    inputs, fields, shapes = GOOD[op]
    node = make_node(op, "n", *inputs, format="f16", **fields)
    assert [value.shape for value in node.outputs] == shapes
    kept = {target for _, target in node.contract.updates}
    assert [v.format for v in node.outputs] == ["bf16" if i in kept else "f16" for i in range(len(node.outputs))]
    ports = node.contract.outputs
    assert [v.name for v in node.outputs] == (["n"] if len(ports) == 1 else [f"n.{port}" for port in ports])


def _changed(op, inputs=None, **fields):
    good_inputs, good_fields, _ = GOOD[op]
    return op, good_inputs if inputs is None else inputs, {**good_fields, **fields}


WRONG = {
    "rows differ": _changed("swiglu", (X, Value("b", (3, K)))),
    "columns differ": _changed("add_rms_norm", (X, Value("b", (M, 32)))),
    "gamma is short": _changed("add_rms_norm", gamma=(Value("gamma", (32,)),)),
    "no gamma": _changed("add_rms_norm", gamma=()),
    "no epsilon": _changed("add_rms_norm", epsilon=0.0),
    "a field of no part": _changed("swiglu", epsilon=1e-5),
    "two weights of three": _changed("qkv", weight=HEAD_WEIGHTS[:2]),
    "a weight too many": _changed("qkv", weight=(*HEAD_WEIGHTS, Value("w", (8, K)))),
    "a weight of another width": _changed("qkv", weight=(*HEAD_WEIGHTS[:2], Value("wv", (16, 32)))),
    "two biases of three": _changed("qkv", bias=tuple(Value(f"b{n}", (n,)) for n in (32, 16))),
    "a bias too long": _changed("qkv", bias=tuple(Value(f"b{p}", (32,)) for p in "qkv")),
    "gate and up of different widths": _changed("gate_up_swiglu", weight=(*_values(1), Value("up", (16, K)))),
    "a residual of another width": _changed("mul_mat_add", (X, Value("residual", (M, 16)))),
    "two weights of one": _changed("mul_mat_add", weight=_values(2)),
    "no residual": _changed("mul_mat_add", (X,)),
    "heads that do not fill q": _changed("qkv_rope_copy", num_heads=2),
    "a cache of other heads": _changed("qkv_rope_copy", (X, *ROWS, CACHES[0], Value("v_cache", ("pages", 4, 1, 8)))),
    "slots of other rows": _changed("qkv_rope_copy", (X, ROWS[0], Value("slots", (3,), "i32"), *CACHES)),
    "divisors of another length": _changed("qkv_rope_copy", weight=(*HEAD_WEIGHTS, Value("divisors", (3,)))),
    "no rotation": _changed("qkv_rope_copy", rotation=None),
}


@pytest.mark.parametrize(("op", "inputs", "fields"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_a_graph_error_that_names_the_node(op, inputs, fields):
    with pytest.raises(GraphError, match=r"^node_7\b"):
        make_node(op, "node_7", *inputs, **fields)


def test_a_pattern_may_use_one_value_twice():
    class Square(Fused):
        name, inputs, outputs = "square_silu", ("x",), ("y",)
        pattern = (Part("mul", ("x", "x"), ("squared",)), Part("silu", ("squared",), ("y",)))

        def arguments(self, node):
            return {}

        def cases(self):
            yield Case("square_silu-1", self.name, (X,))

    node = replace(make_node("silu", "n", X), op="square_silu")
    x = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    (found,) = Square().reference(node, Operands((x,)))
    torch.testing.assert_close(found, torch.nn.functional.silu(x * x))


# Error.


def test_products_alone_are_as_far_off_as_they_are_and_gate_times_up_is_further():
    def amplified(name):
        drawn = draw_case(next(case for case in CASES if case.name == name))
        (node,) = drawn.graph.ops
        inputs = tuple(dequantize_planes(value.format, planes, torch.double) for value, planes in drawn.planes)
        weights = tuple(drawn.weights[value.name].dequantize(torch.double) for value in node.weight)
        return OPS[node.op].amplified(node, Operands(inputs, weights, (), ()), 1e-4)

    # An element larger than its row's mean is off by more.
    assert amplified("qkv-f32-m17") == pytest.approx([1.6e-4] * 3, rel=0.3)
    (gated,) = amplified("gate_up_swiglu-f32-m17")
    assert 2e-4 < gated < 1e-3

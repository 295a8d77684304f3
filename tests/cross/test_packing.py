"""Packed weights, of every kernel of every backend: to the bit, in the stated bytes, wherever the weights lie.

What is offered for a card is packed on the CPU: a packer works where it is told to.
"""

from __future__ import annotations

from math import lcm
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernelmux.conformance.hookup import all_cases
from kernelmux.conformance.testing import one_node
from kernelmux.contract import registry, weights
from kernelmux.contract.device import Device, described_device
from kernelmux.contract.packed import packed_key
from kernelmux.errors import BackendError
from kernelmux.graph.formats import FORMATS, Value, Weight
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS
from kernelmux.graph.ops.cases import all_weights
from packed_forms import STATED, STATED_BACKENDS
from stated import placed, random_weight, raw, values

CPU = Device("cpu")
DEVICES = [described_device(words) for words in ("cpu amx", "cuda sm_90 NVIDIA H200")]
PRODUCTS = {"mul_mat": 1, "mul_mat_add": 1, "mul_mat_pair": 2, "gate_up_swiglu": 2, "qkv": 3, "embed": 1}
"""Ops whose weights may have any number of rows, and how many they have."""
MOST_COLUMNS = 512
F16_MOST = 65504.0
"""The largest number that float16 holds."""
BLOCKS = [name for name, format in FORMATS.items() if format.gguf is not None and not format.plain]


def product(op, format, other, heights, columns, bias, m):
    """A node of an op of PRODUCTS; the second weight's format is the other. Gate and up are equally high."""
    heights = [heights[0]] * 2 if op == "gate_up_swiglu" else heights[: PRODUCTS[op]]
    formats = [format, other, format][: len(heights)]
    unit = lcm(*(FORMATS[name].block for name in formats))
    k = unit * min(columns, MOST_COLUMNS // unit)
    matrices = enumerate(zip(heights, formats, strict=True))
    fields = {"weight": tuple(Value(f"w{index}", (n, k), stored) for index, (n, stored) in matrices)}
    if op == "embed":
        return one_node(op, Value("ids", (m,), "i32"), **fields)
    if bias:
        fields["bias"] = tuple(Value(f"b{index}", (n,)) for index, n in enumerate(heights))
    residual = [Value("residual", (m, heights[0]))] if op == "mul_mat_add" else []
    return one_node(op, Value("x", (m, k)), *residual, **fields)


def others():
    """A node of each op that has weights and is none of PRODUCTS, for each way in which they are stored."""
    found = {}
    for case in all_cases():
        node = case_node(case)
        if node.weights and node.op not in PRODUCTS:
            found.setdefault((node.op, tuple(w.format for w in node.weights)), node)
    return list(found.values())


def kernels(node):
    """Every kernel that is offered for the node, by its name and device."""
    offers = [(device, registry.current().offer(node, device).kernels) for device in DEVICES]
    return [(name, kernel) for _, offered in offers for name, kernel in offered.items()]


def check(node, seed, start=1, mapped=True):
    """All that packed weights must be, of every kernel that is offered; how many are. None is left out: who refuses
    random blocks for their scales is asked about smaller ones."""
    generator = torch.Generator().manual_seed(seed)
    held = [random_weight(value.name, value.extents, value.format, generator) for value in node.weights]
    offered = kernels(node)
    refused = [(name, kernel) for name, kernel in offered if refuses(kernel, held)]
    check_packed(node, [each for each in offered if each not in refused], held, start, mapped)
    check_packed(node, refused, [smaller(weight) for weight in held], start, mapped)
    return len(offered)


def refuses(kernel, held):
    """Whether a kernel says that it holds no scales as large as some of these weights'."""
    if all(np.abs(values(weight)).max() <= F16_MOST for weight in held):
        return False
    try:
        kernel.prepare(held, CPU)
    except BackendError as error:
        return "float16" in str(error)
    return False


def smaller(weight):
    """The weight with scales that are less than two, where they are float16."""
    blocks = weight.format in BLOCKS
    return Weight(weight.name, weight.shape, weight.format, (weight.planes[0] & 0x3F,)) if blocks else weight


def check_packed(node, offered, held, start, mapped):
    """All that packed weights must be, of kernels by name."""
    moved = [placed(weight, start, mapped) for weight in held]
    before = [raw(plane).tobytes() for weight in moved for plane in weight.planes]
    forms = {}
    for name, kernel in offered:
        _, form = packed_key(node, name, kernel)
        if form not in forms:
            forms[form] = kernel.prepare(held, CPU)
            if forms[form] and form.partition("/")[0] in STATED_BACKENDS:
                assert form in STATED, f"{name}: packed_forms.py has no statement of {form}"
                stated = [np.ascontiguousarray(part).tobytes() for part in STATED[form](held)]
                assert [raw(part).tobytes() for part in forms[form]] == stated, f"{name}: {form} is not as stated"
        with mock.patch.multiple(weights, CHUNK=1, HOST_CHUNK=1):
            packed = kernel.prepare(moved, CPU)
        assert list(map(told, packed)) == list(map(told, forms[form])), f"{name}: views and ranges of rows matter"
        own = {plane.untyped_storage().data_ptr() for weight in moved for plane in weight.planes}
        total, stated = sum(part.nbytes for part in packed), kernel.packed_bytes(node)
        # What the model holds already costs nothing, whether it is stated or not.
        free = stated == 0 and {part.untyped_storage().data_ptr() for part in packed} <= own
        assert total == stated or free, f"{name}: packed_bytes says {stated}, prepare holds {total}"
        now = [raw(plane).tobytes() for weight in moved for plane in weight.planes]
        assert now == before, f"{name}: prepare changes the model's weights"


def told(part):
    """A packed tensor, whatever its numbers are."""
    return tuple(part.shape), part.dtype, raw(part).tobytes()


def every_format_aligned(test):
    """As examples, a weight of each format that every kernel takes: whole tiles of rows and columns, no bias."""
    rest = {"other": None, "heights": (128, 256, 128), "columns": 128, "bias": False, "m": 1}
    for format in all_weights():
        test = example(format=format, **rest, seed=0, start=1, mapped=False)(test)
    return test


@pytest.mark.parametrize("op", PRODUCTS)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    format=st.sampled_from([*dict.fromkeys([*all_weights(), *BLOCKS])]),
    other=st.sampled_from([None, None, "Q4_0", "Q6_K", "f32", "IQ2_S"]),
    heights=st.tuples(*[st.sampled_from([1, 16, 128, 129, 144, 256, 257])] * 3),
    columns=st.sampled_from([1, 2, 3, 8, 33, 128, 256]),
    bias=st.booleans(),
    m=st.sampled_from([1, 5, 65]),
    seed=st.integers(0, 2**31),
    start=st.sampled_from([1, 3, 5]),
    mapped=st.booleans(),
)
@every_format_aligned
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_products_and_tables(op, format, other, heights, columns, bias, m, seed, start, mapped):
    check(product(op, format, other or format, heights, columns, bias, m), seed, start, mapped)


@pytest.mark.parametrize("node", others(), ids=lambda node: "-".join([node.op, *(w.format for w in node.weights)]))
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_every_other_op_with_weights(node):
    assert check(node, 0)


def test_no_op_with_weights_is_left_out():
    with_weights = {case.op for case in all_cases() if case_node(case).weights}
    assert with_weights == {*PRODUCTS, *(node.op for node in others())} <= set(OPS)

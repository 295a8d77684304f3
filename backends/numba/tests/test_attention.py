"""attention: results depend on neither threads nor neighbours in a chain; q8_32 is written as core would store it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernelmux.contract import Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import Value, as_planes, empty_planes, lookup, quantize_planes
from kernelmux.graph.graph import TensorNode
from kernelmux_numba.attention import Attention
from kernelmux_numba.team import chained

PAGE = 16
STATE = ("starts", "lengths", "table")


class Step:
    """The memory of launches, which end with it: sequences of (rows, cached length), their pages in reverse order."""

    def __init__(self, sequences, heads=(6, 2, 32), format="bf16"):
        generator = torch.Generator().manual_seed(7)
        counts, lengths = zip(*sequences, strict=True)
        starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
        width = max(-(-length // PAGE) for length in lengths)
        query, kv, dim = heads
        cache = (len(lengths) * width, PAGE, kv, dim)
        self.q = torch.randn(starts[-1], query * dim, generator=generator)
        self.caches = [empty_planes(Value(name, cache, format)) for name in ("k", "v")]
        for planes in self.caches:
            quantize_planes(format, torch.randn(cache, generator=generator), planes)
        table = torch.arange(cache[0], dtype=torch.int32).flip(0).view(len(lengths), width)
        self.state = [torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), table]
        values = [Value("q", tuple(self.q.shape)), *(Value(name, cache, format) for name in ("k", "v"))]
        values += [Value(name, tuple(t.shape), "i32") for name, t in zip(STATE, self.state, strict=True)]
        fields = {"num_heads": query, "num_kv_heads": kv, "head_dim": dim, "scale": dim**-0.5}
        y = Value("y", tuple(self.q.shape))
        self.node = TensorNode(name="attention", op="attention", inputs=tuple(values), outputs=(y,), **fields)
        self.held = []

    def bind(self, format="f32"):
        """A launch, and the planes that it writes."""
        node = replace(self.node, outputs=(self.node.outputs[0].stored(format),))
        kernel = Attention()
        kernel.device = Device("cpu")
        y, workspace = empty_planes(node.outputs[0]), torch.empty(kernel.workspace(node), dtype=torch.uint8)
        self.held.append(workspace)
        inputs = (self.q, *map(as_planes, self.caches), *self.state)
        return kernel.bind(node, Tensors(inputs, (as_planes(y),), (), workspace), None), y


def test_sinks_are_declined_by_name():
    node = Step([(1, 20)]).node
    assert Attention().refuses(node) is None
    assert Attention().refuses(replace(node, weight=(Value("sinks", (6,)),))).reason == "it has no sinks"


def test_chunks_are_declined_by_name():
    assert Attention().refuses(replace(Step([(1, 20)]).node, chunk=8)).reason == "it reads no chunks apart"


MIXED = [(1, 700), (70, 300), (0, 40), (3, 129)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_are_the_same_for_any_number_of_threads(threads):
    found, step = [], Step(MIXED)
    for count in (1, 2, 5):
        threads(count)
        launch, (y,) = step.bind()
        launch()
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_results_are_the_same_in_a_chain():
    step = Step(MIXED)
    launches, outputs = zip(*(step.bind() for _ in range(2)), strict=True)
    launches[0]()
    chained(launches)()
    assert torch.equal(outputs[0][0], outputs[1][0])


def test_lengths_are_read_at_each_launch():
    step = Step([(1, 700)])
    launch, (y,) = step.bind()
    launch()
    step.state[1].fill_(5)
    launch()
    other = Step([(1, 700)])
    other.state[1].fill_(5)
    afresh, (expected,) = other.bind()
    afresh()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("heads", [(6, 2, 32), (4, 2, 80)], ids=["blocks-in-heads", "blocks-across-heads"])
def test_q8_32_is_what_core_stores_of_the_f32_result(heads):
    step = Step([(1, 300), (40, 40), (2, 0)], heads=heads)
    (plain, (y,)), (quantised, planes) = step.bind(), step.bind("q8_32")
    plain()
    quantised()
    expected = empty_planes(step.node.outputs[0].stored("q8_32"))
    quantize_planes("q8_32", y, expected)
    qs, scales, sums = planes
    assert (qs.int() - expected[0].int()).abs().max() <= 1
    torch.testing.assert_close(scales, expected[1])
    torch.testing.assert_close(sums, expected[2], atol=float(scales.max()), rtol=1e-5)
    assert not any(plane[-2:].any() for plane in planes)


def test_q8_32_is_offered_where_rows_are_whole_blocks():
    kernel = Attention()
    assert lookup("q8_32").block == 32
    assert "q8_32" not in kernel.outputs(Step([(1, 3)], heads=(3, 1, 20)).node)[0]
    assert "q8_32" in kernel.outputs(Step([(1, 3)]).node)[0]

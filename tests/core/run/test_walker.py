"""Walks: the right order, the right numbers, the right memory, and who is to blame where one fails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_backend import CPU, FakeKernel, chain, compute, graphs, plan_for, silu_graph, whole_backend
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import KernelmuxError, LaunchError
from kernelmux.graph.formats import Weight
from kernelmux.graph.graph import Builder
from kernelmux.graph.ops import Operands
from kernelmux.run.walker import Walker


def walker_for(graph, leaves=None, weights=None, policy="", max_rows=8, **backends):
    with registry.isolated(**backends or {"a": whole_backend()}) as found:
        plan = plan_for(graph, found, policy, max_rows=max_rows)
    if leaves is None:
        leaves = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    return Walker(plan, PackedWeights(weights or {}, CPU), leaves)


def test_steps_run_in_order_and_leaves_are_skipped():
    seen = []
    log = FakeKernel(work=lambda node, tensors: seen.append(node.name))
    walk = walker_for(chain("silu", "add", "mul", "silu"), a=backend(silu=log, add=log, mul=log)).bind(m=2)
    assert not seen
    walk()
    assert seen == ["n0", "n1", "n2", "n3"]


def test_a_walk_returns_the_number_of_launches_that_its_kernels_declare():
    kernels = {"silu": FakeKernel(launches=2), "add": FakeKernel(launches=1)}
    assert walker_for(chain("silu", "add", "silu"), a=backend(**kernels)).bind(m=1)() == 5


def test_a_walk_computes():
    x = torch.tensor([[0.0, 1.0, -2.0, 3.0]])
    walk = walker_for(chain("silu", "add", columns=4), {"x": x}).bind(m=1)
    walk()
    torch.testing.assert_close(walk.outputs["n1"], torch.nn.functional.silu(x) + x)


def _evaluate(graph, rows, leaves, weights):
    """The graph by the ops' references, every value in memory of its own."""
    values = {name: leaf.double() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}
    values |= {name: weight.dequantize(torch.float64) for name, weight in weights.items()}
    for node in graph.ops:
        parts = [[values[value.name] for value in part] for part in (node.inputs, node.weight, node.bias, node.gamma)]
        results = node.contract.reference(node.resolve({"m": rows}), Operands(*map(tuple, parts)))
        values |= {value.name: result for value, result in zip(node.outputs, results, strict=True)}
    return {name: values[name] for name in graph.outputs}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(graph=graphs(), rows=st.integers(1, 8), seed=st.integers(0, 2**31), half=st.booleans())
def test_any_graph_gives_what_its_ops_give_one_after_another(graph, rows, seed, half):
    generator = torch.Generator().manual_seed(seed)
    leaves, weights = {}, {}
    for leaf in graph.leaves:
        (value,) = leaf.outputs
        value = value.resolve({"m": rows})
        drawn = torch.randn(value.extents, generator=generator) / value.extents[-1] ** 0.5
        if leaf.role == "weight":
            stored = drawn.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[value.format])
            weights[value.name] = Weight(value.name, value.extents, value.format, (stored,))
        else:
            leaves[value.name] = drawn if value.format == "f32" else torch.arange(value.extents[0], dtype=torch.int32)
    # Every second op in bfloat16, so that values are converted between neighbours.
    narrow = FakeKernel(takes=["bf16"], emits=["bf16"], work=compute)
    kernels = {"mul_mat": narrow, "mul": narrow, "rope": narrow} if half else {}
    expected = _evaluate(graph, rows if graph.values["x"].shape[0] == "m" else 3, leaves, weights)
    walk = walker_for(graph, leaves, weights, a=whole_backend(**kernels)).bind(m=rows)
    tolerance = {"rtol": 0.1, "atol": 0.1} if half else {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(2):
        walk()
        for name, wanted in expected.items():
            torch.testing.assert_close(walk.outputs[name].double(), wanted, **tolerance)


# Where a launch fails.


def _failing(error):
    def work(node, tensors):
        if node.name == "n1":
            raise error

    return FakeKernel("tiled", work=work)


@pytest.mark.parametrize("error", [ValueError("no such tile"), KeyError("tile"), StopIteration("tile")])
def test_a_kernel_that_raises_is_named_with_node_shapes_and_device(error):
    walk = walker_for(chain("silu", "silu", "silu"), a=backend(silu=_failing(error))).bind(m=3)
    with pytest.raises(LaunchError) as caught:
        walk()
    for part in ("a:tiled", "n1", "silu", "step 2 of 3", "cpu", "n0 [3, 8] f32", type(error).__name__, "tile"):
        assert part in str(caught.value)
    assert caught.value.__cause__ is error
    assert (caught.value.node, caught.value.kernel, caught.value.device, caught.value.step) == (
        "n1",
        "a:tiled",
        "cpu",
        2,
    )


@pytest.mark.parametrize("fails", ["n0", "n2"])
def test_the_first_and_the_last_step_are_blamed_rightly(fails):
    def work(node, tensors):
        if node.name == fails:
            raise RuntimeError("x")

    walk = walker_for(chain("silu", "silu", "silu"), a=backend(silu=FakeKernel(work=work))).bind(m=1)
    with pytest.raises(LaunchError, match=f"raised at {fails} "):
        walk()


def test_a_walk_works_again_after_a_launch_has_failed():
    broken = [True]

    def work(node, tensors):
        if broken.pop() if broken else False:
            raise RuntimeError("once")
        compute(node, tensors)

    walk = walker_for(silu_graph(), a=backend(silu=FakeKernel(work=work))).bind(m=1)
    with pytest.raises(LaunchError, match="once"):
        walk()
    assert walk() == 1


class _Unbindable(FakeKernel):
    def bind(self, node, tensors, stream):
        raise RuntimeError("does not compile")


class _Unpackable(FakeKernel):
    def prepare(self, weights, device):
        raise RuntimeError("does not pack")


@pytest.mark.parametrize("kernel", [_Unbindable("tiled"), _Unpackable("tiled")])
def test_a_kernel_that_cannot_be_bound_is_named_too(kernel):
    with pytest.raises(KernelmuxError, match=r"(?s)(?=.*a:tiled)(?=.*\by\b).*does not"):
        walker_for(silu_graph(), a=backend(silu=kernel)).bind(m=1)


# Bound walks and their memory.


def test_a_walk_of_the_same_extents_is_the_same_object():
    walker = walker_for(silu_graph())
    assert walker.bind(m=3) is walker.bind(m=3)
    assert walker.bind(m=3) is not walker.bind(m=4)


def test_walks_are_bound_once():
    kernel = FakeKernel(work=compute)
    walker = walker_for(silu_graph(), {"x": torch.zeros(64, 8)}, max_rows=64, a=backend(silu=kernel))
    walks = [walker.bind(m=rows) for rows in range(1, 65)]
    assert [walker.bind(m=rows) for rows in range(1, 65)] == walks
    assert len(kernel.bound) == 64


def test_a_kernel_is_bound_to_exact_extents():
    kernel = FakeKernel()
    x = torch.zeros(8, 8)
    walker_for(silu_graph(), {"x": x}, a=backend(silu=kernel)).bind(m=5)
    ((node, tensors),) = kernel.bound
    assert node.inputs[0].shape == node.outputs[0].shape == (5, 8)
    assert tensors.inputs[0].shape == tensors.outputs[0].shape == (5, 8)
    assert tensors.inputs[0].data_ptr() == x.data_ptr()


def test_extents_that_are_not_asked_for_come_from_the_buffers():
    b = Builder("g")
    rows = [b.leaf(name, ("m", 4), role="state") for name in ("k", "v")]
    slots = b.leaf("slots", ("m",), "i32", role="state")
    caches = [b.leaf(f"{name}_cache", ("pages", "page_size", 1, 4), role="cache") for name in "kv"]
    graph = b.build(*b.node("copy", "copy", *rows, slots, *caches, num_kv_heads=1, head_dim=4))
    leaves = {"k": torch.ones(8, 4), "v": torch.full((8, 4), 2.0), "slots": torch.arange(8, dtype=torch.int32)}
    leaves |= {f"{name}_cache": torch.zeros(3, 2, 1, 4) for name in "kv"}
    kernel = FakeKernel(work=compute)
    walk = walker_for(graph, leaves, a=backend(copy=kernel)).bind(m=3)
    walk()
    assert kernel.bound[0][0].inputs[3].shape == (3, 2, 1, 4)
    # The caches are updated where their owner holds them.
    assert leaves["k_cache"].flatten(0, 1)[:, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert leaves["v_cache"].flatten(0, 1)[:, 0, 0].tolist() == [2, 2, 2, 0, 0, 0]


def test_a_second_walk_reads_what_its_owner_wrote_and_overwrites_the_outputs():
    x = torch.full((8, 8), -1.0)
    walk = walker_for(silu_graph(), {"x": x}).bind(m=2)
    walk()
    before, address = walk.outputs["y"].clone(), walk.outputs["y"].data_ptr()
    x.fill_(2.0)
    walk()
    assert walk.outputs["y"].data_ptr() == address
    torch.testing.assert_close(walk.outputs["y"], torch.nn.functional.silu(x[:2]))
    assert not torch.equal(walk.outputs["y"], before)


def test_several_planes_arrive_as_a_tuple():
    narrow, wide = FakeKernel(emits=["q8_32"], work=compute), FakeKernel(takes=["q8_32"], work=compute)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    walker = walker_for(chain("silu", "add", columns=64), {"x": x}, a=whole_backend(silu=narrow, add=wide))
    walk = walker.bind(m=4)
    walk()
    planes = wide.bound[0][1].inputs[0]
    assert [(tuple(plane.shape), plane.dtype) for plane in planes] == [
        ((4, 64), torch.int8),
        ((4, 2), torch.float32),
        ((4, 2), torch.float32),
    ]
    torch.testing.assert_close(walk.outputs["n1"], torch.nn.functional.silu(x) + x, rtol=0, atol=0.05)


@pytest.mark.parametrize("scratch", [lambda node: 1000, lambda node: 4096 // node.inputs[0].extents[0]])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_kernel_gets_the_scratch_that_it_asks_for_at_its_rows(scratch, rows):
    """Split sums need more scratch at fewer rows: what a kernel gets is as large as it says, and its own."""

    def work(node, tensors):
        result = torch.nn.functional.silu(tensors.inputs[0])
        tensors.workspace.fill_(255)
        tensors.outputs[0].copy_(result)

    kernel = FakeKernel(scratch=scratch, work=work)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    b = Builder("g")
    y = b.value("silu", "y", b.leaf("x", ("m", 8), role="state"))
    graph = b.build(b.value("add", "sum", y, b.value("silu", "z", y)))
    walk = walker_for(graph, {"x": x}, a=whole_backend(silu=kernel)).bind(m=rows)
    assert [len(tensors.workspace) for node, tensors in kernel.bound] == [scratch(node) for node, _ in kernel.bound]
    walk()
    first = torch.nn.functional.silu(x[:rows])
    torch.testing.assert_close(walk.outputs["sum"], first + torch.nn.functional.silu(first))


def test_preparing_packs_each_weight_before_anything_is_bound():
    b = Builder("g")
    w = b.leaf("w", (8, 8))
    y = b.value("mul_mat", "one", b.leaf("x", ("m", 8), role="state"), weight=(w,))
    graph = b.build(b.value("mul_mat", "two", y, weight=(w,)))
    kernel = FakeKernel(work=compute)
    weights = {"w": Weight("w", (8, 8), "f32", (torch.eye(8),))}
    walker = walker_for(graph, weights=weights, a=backend(mul_mat=kernel))
    assert [each.stage for each in walker.prepare()] == ["packing weights"]
    assert (kernel.prepared, kernel.bound) == ([["w"]], [])
    walker.bind(m=1)
    assert kernel.prepared == [["w"]]

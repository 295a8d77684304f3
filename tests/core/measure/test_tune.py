"""Times of a model's nodes, as a plan looks them up: every kernel once, one that fails told and left out."""

from fake_backend import CPU, FakeKernel, llama_graph, whole_backend
from kernelmux.contract import registry
from kernelmux.measure.times import look_up
from kernelmux.measure.tune import time_works
from kernelmux.measure.works import model_works


def broken(node, tensors):
    raise ValueError("boom")


def test_every_kernel_is_timed_once_for_each_size_and_row_count_and_one_that_fails_is_told():
    works = [work for rows in (1, 4) for work in model_works(llama_graph(3), ["silu", "mul_mat"], rows, 16)]
    kernels = [FakeKernel("good"), FakeKernel("bad", work=broken)]
    told, found = [], {}
    with registry.isolated(a=whole_backend(silu=kernels)) as backends:
        time_works(works, backends, CPU, found, lambda name, kernel, work: kernel.name != "f32", told.append)
        families = found[FakeKernel.__module__.partition(".")[0]]
        assert families.keys() == {"silu good"}
        (sizes,) = families.values()
        assert [set(rows) for rows in sizes.values()] == [{"1", "4"}]
        assert len(told) == 2
        assert all("a:bad at" in line and "boom" in line for line in told)
        node = next(work.node for work in works if work.node.op == "silu")
        us, other = look_up(families, kernels[0], node, 1)
        assert (us, other) == (next(iter(sizes.values()))["1"], "")
        # What is known is not timed again.
        time_works(works, backends, CPU, found, lambda name, kernel, work: kernel.name == "good", told.append)
        assert len(told) == 2

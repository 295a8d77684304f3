"""What backends' tests are given: a backend of a few kernels, its cases of few rows, one of them run."""

import pytest
import torch

from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend, few_rows, nmse, one_node, pass_or_skip
from kernelmux.contract import Declined, registry
from kernelmux.errors import GraphError
from kernelmux.graph.formats import Value

RIGHT = FakeKernel(work=compute)


def test_few_rows_are_all_cases_of_the_backend_up_to_that_many_rows():
    before = registry.current()
    alone, some = few_rows(backend(silu=RIGHT, add=RIGHT), 17)
    _, all_of_them = few_rows(backend(silu=RIGHT, add=RIGHT), 10**9)
    assert {job.case.op for job in some} == {"silu", "add"}
    assert [job.name for job in some] == [job.name for job in all_of_them if job.case.inputs[0].extents[0] <= 17]
    assert max(job.case.inputs[0].extents[0] for job in some) == 17
    assert list(alone.backends) == ["mine"]
    assert registry.current() is before


def test_a_case_passes_fails_with_what_was_wrong_or_is_skipped_with_the_reason():
    def only_five(node, m):
        return RIGHT if m == 5 else Declined("five rows alone", kernel="f32")

    alone, cases = few_rows(backend(silu=only_five, add=FakeKernel()))
    by_name = {job.name: job for job in cases}
    pass_or_skip(by_name["silu-m5-n576"], alone)
    with pytest.raises(pytest.skip.Exception, match="five rows alone"):
        pass_or_skip(by_name["silu-m1-n576"], alone)
    with pytest.raises(pytest.fail.Exception, match=r"add\[\d+, \d+\] = .*, expected "):
        pass_or_skip(by_name["add-m5-n576"], alone)


def test_one_node_is_checked_as_a_graphs_and_an_op_that_is_none_has_no_hook():
    x = Value("x", (5, 8))
    assert [value.shape for value in one_node("silu", x).outputs] == [(5, 8)]
    with pytest.raises(GraphError, match=r"node \(add\)"):
        one_node("add", x)
    assert {name for name in vars(backend(silu=RIGHT, add=None)) if name.startswith("dispatch_")} == {"dispatch_silu"}


def test_an_errors_size_is_relative():
    assert nmse(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.01, rel=1e-5)

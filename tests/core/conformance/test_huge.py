"""Cases of huge offsets, at a limit that a test has memory for: what counts in fewer bits fails."""

import dataclasses

import pytest
import torch

from kernelmux.conformance import Filter, jobs
from kernelmux.conformance import huge as module
from kernelmux.conformance.huge import LIMIT, PERIOD, far_pages, huge_cases, make_huge
from kernelmux.conformance.run import run_case
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.device import Platform
from wrong.cache import Fresh, Scatter
from wrong.kernel import Right

SMALL = 2**19
FEW = {huge.case.name: huge for huge in make_huge(SMALL, columns=256)}


class WrapsRows(Right):
    """A weight's offset in 19 bits, signed or not, at rows of 256."""

    def answer(self, node, operands):
        (weight,) = operands.weight
        wrapped = weight[torch.arange(len(weight)) % (SMALL // 256)]
        return super().answer(node, dataclasses.replace(operands, weight=(wrapped,)))


class WrapsIds(Fresh):
    def ids(self, ids, rows):
        return ids % (SMALL // 256)


class WrapsSlots(Scatter):
    def launch(self, node, tensors):
        width = node.inputs[3].extents[2] * node.inputs[3].extents[3]
        k, v, slots, *caches = tensors.inputs
        wrapped = torch.where(slots < 0, slots, slots % (SMALL // width))
        super().launch(node, dataclasses.replace(tensors, inputs=(k, v, wrapped, *caches)))


class WrapsPages(Right):
    def answer(self, node, operands):
        q, k, v, starts, lengths, table = operands.inputs
        wrapped = table % (SMALL // k[0].numel())
        return super().answer(node, dataclasses.replace(operands, inputs=(q, k, v, starts, lengths, wrapped)))


KERNELS = {"mul_mat": (Right, WrapsRows), "embed": (Fresh, WrapsIds), "copy": (Scatter, WrapsSlots)}
KERNELS |= {"attention": (Right, WrapsPages)}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "_made", lambda limit: FEW)


def run(case, kernel):
    with registry.isolated(fake=backend(**{case.op: kernel})) as current:
        return run_case(case, "fake:kernel", current)


@pytest.mark.parametrize("name", [name for name, huge in FEW.items() if huge.case.op in KERNELS])
def test_an_offset_that_wraps_fails_and_one_that_does_not_passes(few, name):
    case = FEW[name].case
    right, wrong = KERNELS[case.op]
    outcome = run(case, right())
    assert outcome.passed, outcome
    failed = run(case, wrong())
    assert failed.status == "fail"
    assert failed.failures[0].startswith(("error: ", "finite: ", "inputs: ")), failed


def test_every_case_passes_the_limit_in_elements_and_in_bytes():
    for name, huge in huge_cases().items():
        values = [v for v in (*huge.case.fields.get("weight", ()), *huge.case.inputs) if v.nbytes > LIMIT]
        assert values, name
        for value in values:
            elements = 1
            for extent in value.extents:
                elements *= extent
            assert elements > LIMIT, name
            assert value.nbytes > LIMIT, name
        assert huge.case.marks == {"huge"}
    assert {huge.case.op for huge in huge_cases().values()} >= {"mul_mat", "embed", "copy", "attention"}


def test_where_memory_does_not_suffice_they_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(Platform, "free_bytes", lambda self, device: 10**9)
    case = huge_cases()["mul_mat-bf16-m1-huge-offsets"].case
    outcome = run(case, Right())
    assert outcome.status == "refused"
    assert outcome.reason.startswith("it takes ")
    assert outcome.reason.endswith(" GB of memory, of cpu 1.0 GB are free")


class Takes(Right):
    """More memory than it states, and than there is."""

    def launch(self, node, tensors):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB. 4.62 GiB is free.")


def test_a_kernel_for_which_memory_does_not_suffice_is_refused_too(few):
    outcome = run(FEW["mul_mat-bf16-m1-huge-offsets"].case, Takes())
    assert (outcome.status, outcome.failures) == ("refused", ())
    assert outcome.reason == "cpu is out of memory (16.00 GiB were asked for, 4.62 GiB are free)"


class StoresAgain(Scatter):
    """All of the cache is decoded and stored again, where a number that is none loses its bits, as on a card."""

    def launch(self, node, tensors):
        super().launch(node, tensors)
        for cache in tensors.outputs:
            cache.view(torch.int16)[cache.isnan()] = 0x7FFF


def test_a_cache_that_is_stored_again_as_it_was_is_unchanged(few):
    outcome = run(FEW["copy-bf16-huge-offsets"].case, StoresAgain())
    assert outcome.passed, outcome


def test_they_are_a_selection_of_their_own():
    with registry.isolated(fake=backend(embed=Fresh())) as current:
        names = {wanted: [job.name for job in jobs("fake", current, wanted=Filter(huge=wanted))] for wanted in (0, 1)}
    assert not any(name.endswith("-huge-offsets") for name in names[0])
    assert [name for name in names[1] if name.endswith("-huge-offsets")] == [
        name for name in huge_cases() if "embed" in name
    ]


def test_pages_lie_far_apart_and_none_twice():
    assert far_pages(5, 1000).tolist() == [999, 199, 997, 597, 995]
    assert len(set(far_pages(64, 300).tolist())) == 64
    assert PERIOD % 128 == 0

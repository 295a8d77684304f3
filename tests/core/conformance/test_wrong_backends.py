"""The suite tests itself: kernels with one mistake each, every one caught by the check that is named for it."""

from contextlib import closing
from fnmatch import fnmatch

import pytest
import torch

from kernelmux.conformance import Filter, jobs
from kernelmux.contract import registry
from wrong import PLANTED
from wrong.kernel import Right, offering

RIGHT = list(dict.fromkeys((planted.op, planted.right, planted.device) for planted in PLANTED))
GPU = {"cpu": [], "cuda": [pytest.mark.gpu]}
"""Marks by device: `make gpu-test` runs what needs a card."""
CHECKS = {
    *("error", "finite", "written", "repeatable", "guards", "inputs", "in place", "declarations", "raises", "captured"),
    *("asking", "process", "scales", "strided"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The cases are small: on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcomes(kernel, op, device, first="", smoke=False):
    """Each case's outcome; the random numbers that a kernel draws for itself are the same in every run."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: capture cannot be tried")
    torch.manual_seed(0)
    with registry.isolated(wrong=offering(kernel, op)) as current:
        every = jobs("wrong", current, device, Filter(op=op, smoke=smoke))
        # The small cases early: most mistakes show there.
        for job in sorted(every, key=lambda job: (not fnmatch(job.name, first), "smoke" not in job.case.marks)):
            yield job.run(current, device)


@pytest.mark.parametrize("planted", [pytest.param(each, id=str(each), marks=GPU[each.device]) for each in PLANTED])
def test_a_wrong_kernel_is_caught_by_the_check_of_that_name(planted):
    found = set()
    # Closed at once: while it is open, no other backend exists.
    with closing(outcomes(planted.kernel, planted.op, planted.device, planted.first)) as every:
        for outcome in every:
            names = {failure.partition(":")[0] for failure in outcome.failures}
            if planted.check in names:
                assert outcome.status == "fail"
                return
            found |= names
    pytest.fail(f"no case of {planted.op} fails by `{planted.check}`; by others: {sorted(found) or 'none'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "kernel", "device"),
    [pytest.param(*each, id=f"{each[0]}-{each[1].__name__}", marks=GPU[each[2]]) for each in RIGHT],
)
def test_the_right_kernel_that_it_is_an_edit_of_passes(op, kernel, device):
    # All cases are tried once an op: on the reference's own steps.
    with closing(outcomes(kernel, op, device, smoke=kernel is not Right)) as every:
        for outcome in every:
            assert outcome.passed, f"{outcome.case}: {outcome.reason} {outcome.failures}"


def test_every_check_has_a_kernel_that_it_catches():
    assert {planted.check for planted in PLANTED} == CHECKS


def test_wrong_kernels_are_edits_of_right_ones():
    wrong = {planted.kernel for planted in PLANTED}
    assert not wrong & {planted.right for planted in PLANTED}
    assert len(PLANTED) == len(wrong)

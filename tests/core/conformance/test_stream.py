"""Which stream a kernel launches on: shown on a kind of device whose streams keep what they are given while busy."""

from __future__ import annotations

import pytest

from fake_backend import FakeKernel, compute
from fake_platform import Npu
from kernelmux.conformance.run import run_case
from kernelmux.conformance.testing import backend
from kernelmux.contract import device as devices
from kernelmux.contract import registry
from kernelmux.graph.ops import OPS


class OnItsStream(FakeKernel):
    def bind(self, node, tensors, stream):
        return lambda: stream.enqueue(lambda: compute(node, tensors))


class OnTheCurrentStream(FakeKernel):
    def __init__(self, platform):
        super().__init__()
        self.platform = platform

    def bind(self, node, tensors, stream):
        return lambda: self.platform.current(None).enqueue(lambda: compute(node, tensors))


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Npu:
    platform = Npu()
    monkeypatch.setitem(devices.PLATFORMS, "npu", platform)
    return platform


@pytest.mark.parametrize("op", ["silu", "copy", "attention"])
@pytest.mark.parametrize("whose", ["its own", "the current"])
def test_a_kernel_launches_on_the_stream_that_it_was_bound_to_whichever_is_current(npu: Npu, op: str, whose: str):
    kernel = OnItsStream() if whose == "its own" else OnTheCurrentStream(npu)
    case = next(case for case in OPS[op].cases() if "smoke" in case.marks)
    with registry.isolated(mine=backend(**{op: kernel})) as found:
        outcome = run_case(case, "mine:f32", found, "npu")
    assert outcome.passed == (whose == "its own")
    wrong = "stream: it is launched on torch's current stream, not on the one that it was bound to"
    assert list(outcome.failures) == ([] if outcome.passed else [wrong])


class InTwoSteps(FakeKernel):
    """The second step, which waits for the stream, reads what the first left in the workspace."""

    def __init__(self):
        super().__init__()
        self.found = []

    def workspace(self, node):
        return 64

    def bind(self, node, tensors, stream):
        def second():
            self.found.append(int(tensors.workspace[0]))
            compute(node, tensors)

        def launch():
            tensors.workspace.fill_(7)
            stream.busy = True
            stream.enqueue(second)
            # The suite makes one of torch's calls raise: the last one, too.
            tensors.workspace.data_ptr()

        return launch


def test_what_a_launch_had_begun_when_it_raised_ends_before_its_memory_is_filled_again(npu: Npu):
    kernel = InTwoSteps()
    case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
    with registry.isolated(mine=backend(silu=kernel)) as found:
        run_case(case, "mine:f32", found, "npu")
    assert set(kernel.found) == {7}

"""The card as a value, and its streams; a full one, and one that is not there: one clear line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernelmux
from command import run_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance.run import run_case
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.device import described_device, find_device, is_out_of_memory, on_stream
from kernelmux.errors import PlanError
from kernelmux.graph.ops import OPS
from kernelmux.run.pages import CapacityError


def test_a_cache_that_does_not_fit_is_refused_with_what_there_is(tiny: Path):
    model = kernelmux.load(tiny)
    plan = model.plan(use=["mul_mat=torch:bf16"], device="cuda")
    with pytest.raises(CapacityError, match=r"cuda:0 \(.*\) has .* GB free; weights need .*, the cache .* GB"):
        model.session(plan, 10**9)


FILLS = """
import torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - 4e6), dtype=torch.uint8, device="cuda")
print("full", flush=True)
input()
"""


@pytest.fixture
def full_device() -> Iterator[None]:
    """Another process holds all memory that is left."""
    torch.cuda.empty_cache()
    command = [sys.executable, "-c", FILLS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "full\n"
        yield
        other.communicate("\n")


def test_a_full_device_is_one_line_and_exit_code_2(tiny: Path, full_device: None):
    result = run_command("run", tiny, "-p", "hello", "--device", "cuda", "--max-tokens", 8)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert "free" in result.err or "out of memory" in result.err


def test_an_error_of_the_allocator_is_known_as_such():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)


def test_a_card_that_is_not_there_is_one_line():
    with pytest.raises(PlanError, match=r"'cuda:99' was asked for, torch sees \d+ CUDA devices"):
        find_device("cuda:99")


def test_the_card_is_what_its_device_class_describes():
    found = find_device("cuda")
    assert described_device(found.device_class) == replace(found, memory=0)
    assert found.memory > 2**30


class _Wrapped(FakeKernel):
    """torch launches on its current stream: the wrapper makes that the one that the kernel was bound to."""

    def bind(self, node, tensors, stream):
        return on_stream(super().bind(node, tensors, stream), stream)


@pytest.mark.parametrize(("kernel", "passes"), [(FakeKernel, False), (_Wrapped, True)])
def test_a_kernel_that_launches_on_another_stream_than_its_own_is_caught(kernel: type[FakeKernel], passes: bool):
    case = next(case for case in OPS["silu"].cases() if "smoke" in case.marks)
    with registry.isolated(mine=backend(silu=kernel(work=compute, launches=100))) as found:
        outcome = run_case(case, "mine:f32", found, "cuda")
    assert outcome.passed == passes, outcome.failures
    assert passes or any(failure.startswith("stream: ") for failure in outcome.failures)


def test_a_launch_on_the_stream_that_is_current_already_switches_nothing():
    stream, seen = torch.cuda.Stream(), []
    launch = on_stream(lambda: seen.append(torch.cuda.current_stream()), stream)
    launch()
    with torch.cuda.stream(stream):
        launch()
    assert seen == [stream, stream]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert on_stream(launch, None) is launch

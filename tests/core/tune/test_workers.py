"""A kernel that ends its process, or does not come back, costs an answer and nothing else."""

from __future__ import annotations

import pytest

import unruly
from kernelmux.tune.worker import SmokeCases
from kernelmux.tune.workers import Worker

PATIENCE = 0.2


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(unruly.install(tmp_path)))
    monkeypatch.setenv("KERNELMUX_BACKENDS", "unruly,reference")
    with Worker("cpu", PATIENCE) as worker:
        yield worker


@pytest.mark.slow
def test_crashes_hangs_and_corruption_are_told_apart_and_the_next_task_is_answered(worker):
    crashed = worker.ask(SmokeCases("silu", "unruly:crashes"))
    assert crashed.fault.startswith("its process crashed: SIGSEGV (case silu-")
    hung = worker.ask(SmokeCases("silu", "unruly:hangs"))
    assert hung.fault.startswith("it hung, or is far too slow: case silu-")
    case, failure = worker.ask(SmokeCases("silu", "unruly:corrupts")).value
    assert case.startswith("silu-")
    assert "guards" in failure
    assert worker.ask(SmokeCases("silu", "unruly:good")).value is None


def test_an_error_is_an_answer_and_the_process_goes_on(worker):
    answer = worker.ask(SmokeCases("silu", "nobody:good"))
    assert answer.fault.startswith("BackendError: unknown backend 'nobody'")
    assert not answer.over

"""What a step takes beside its calls: storage that differs from what was timed, and the host."""

from __future__ import annotations

import pytest

from fake_backend import FakeKernel
from kernelmux.contract.device import Ceilings, described_device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux.measure.predict import Predictor
from kernelmux.measure.steps import is_captured, step_time, storing
from kernelmux.measure.table import Tables
from kernelmux.measure.times import Known

H200 = described_device("cuda sm_90 NVIDIA H200")
CEILINGS = Ceilings(1e9, 1e9, {"f32": 1e12}, enqueue=10e-6, turn=100e-6)


def silu(format="f32"):
    return make_node("silu", "y", Value("x", ("m", 512), format))


def test_each_format_costs_the_bytes_that_are_more_than_those_that_are_timed():
    either, narrow = ["f32", "bf16", "q8_32"], ["bf16"]
    (reads,), (writes,) = storing(FakeKernel(takes=either, emits=narrow), silu(), 2000, "bf16", 1e12)
    # 512 columns: 1024 bytes as bf16, 2048 as f32, 512 with 16 scales and 16 sums of 4 as q8_32.
    assert list(reads) == either
    assert reads == {"bf16": 0.0, "f32": pytest.approx(2.048), "q8_32": pytest.approx(-0.768)}
    assert writes == {"bf16": 0.0}


def test_what_cannot_be_stored_in_the_platforms_format_is_timed_in_the_kernels_best():
    (reads,), _ = storing(FakeKernel(takes=["f16", "f32"]), silu(), 1000, "bf16", 1e12)
    assert reads == {"f16": 0.0, "f32": pytest.approx(1.024)}


def test_ids_and_caches_cost_nothing_beside():
    node = make_node("embed", "e", Value("ids", ("m",), "i32"), weight=(Value("w", (9, 512), "bf16"),))
    (ids,), _ = storing(FakeKernel(), node, 1000, "bf16", 1e12)
    assert ids == {"i32": 0.0}


def test_a_plans_node_takes_its_call_and_what_its_formats_add():
    predictor, kernel = Predictor(H200, Tables(H200)), FakeKernel(takes=["f32", "bf16"], emits=["f32", "bf16"])
    wide, narrow = make_node("silu", "y", Value("x", ("m", 512))), silu("bf16")
    (reads,), (writes,) = predictor.storing(kernel, wide, 4096)
    call = predictor.of(kernel, wide, 4096).us
    assert predictor.in_step(kernel, wide, 4096).us == pytest.approx(call + reads["f32"] + writes["f32"])
    # Stored as where it is timed; what the graph states is the same to it.
    assert predictor.of(kernel, narrow, 4096).us == pytest.approx(call)
    assert predictor.in_step(kernel, narrow, 4096).us == pytest.approx(call + writes[narrow.outputs[0].format])


def test_the_gap_between_launches_comes_to_what_was_measured(monkeypatch):
    monkeypatch.setattr(Tables, "time", lambda self, kernel, node, rows, context: (Known(7.0), "measured here"))
    found = Predictor(H200, Tables(H200)).of(FakeKernel(launches=3), silu(), 1)
    assert found.us == pytest.approx(7.0 + 3 * H200.platform.ceilings(H200).gap * 1e6)


@pytest.mark.parametrize(("rows", "capturable", "captured"), [(64, True, True), (64, False, False), (65, True, False)])
def test_few_rows_are_captured_where_every_kernel_can_be(rows, capturable, captured):
    assert is_captured(H200, rows, capturable) == captured
    assert not is_captured(described_device("cpu"), rows, capturable)


def test_python_is_waited_for_only_where_it_takes_longer_than_the_work():
    assert step_time(500.0, 90, True, CEILINGS) == 500.0
    assert step_time(500.0, 40, False, CEILINGS) == 600.0
    assert step_time(500.0, 90, False, CEILINGS) == pytest.approx(1000.0)

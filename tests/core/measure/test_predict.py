"""What a call is going to take: as measured, or in proportion to another card; and what it takes at least."""

from dataclasses import replace

import pytest

from fake_backend import FakeKernel
from kernelmux.contract.device import described_device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import make_node
from kernelmux.measure.predict import Predictor, human_time
from kernelmux.measure.table import Tables
from kernelmux.measure.times import Known

H200, H100 = (described_device(f"cuda sm_90 NVIDIA {name}") for name in ("H200", "H100 80GB HBM3"))


def matrix(n=4096, k=4096):
    return make_node("mul_mat", "y", Value("x", ("m", k)), weight=(Value("w", (n, k), "f32"),))


def predictor(device=H200):
    return Predictor(device, Tables(device))


@pytest.fixture
def shipped(monkeypatch):
    source = "shipped for NVIDIA H200 at 8x8x5.0"
    monkeypatch.setattr(Tables, "time", lambda self, kernel, node, rows, context: (Known(100.0), source))
    return source


def test_times_of_such_a_card_are_taken_as_they_are(shipped):
    found = predictor().of(FakeKernel(), matrix(), 1)
    assert (found.source, found.elsewhere, found.declared) == (shipped, "", False)


@pytest.mark.parametrize(("rows", "ceiling"), [(1, "read"), (4096, "f32")])
def test_times_of_another_card_are_in_proportion_to_what_bounds_them(shipped, rows, ceiling):
    here, there = predictor().of(FakeKernel(), matrix(), rows), predictor(H100).of(FakeKernel(), matrix(), rows)
    assert there.elsewhere == "NVIDIA H200"
    assert there.source == f"{shipped}, in proportion"
    rates = [
        getattr(each.ceilings, ceiling, None) or each.ceilings.gemm[ceiling] for each in (predictor(), predictor(H100))
    ]
    assert there.us / here.us == pytest.approx(rates[0] / rates[1], rel=0.03)


def test_at_the_ceilings_a_call_takes_its_longer_part_and_its_launches():
    ceilings = predictor().ceilings
    one = predictor().least(FakeKernel(launches=3), matrix(), 1)
    assert one.reading == pytest.approx(4 * 4096**2 / ceilings.read * 1e6, rel=1e-2)
    assert one.launching == pytest.approx(3 * ceilings.launch * 1e6)
    assert one.us == pytest.approx(one.reading + one.launching)
    assert one.bound == "reading"
    many = predictor().least(FakeKernel(), matrix(), 4096)
    assert many.multiplying == pytest.approx(2 * 4096**3 / ceilings.gemm["f32"] * 1e6)
    assert many.bound == "f32 arithmetic"
    assert replace(many, reading=0.0).us == many.us


def test_packed_weights_count_as_they_are_packed():
    packed = predictor().least(FakeKernel(packed="small", packed_bytes=4096**2), matrix(), 1)
    assert packed.reading == pytest.approx(predictor().least(FakeKernel(), matrix(), 1).reading / 4, rel=1e-2)


def test_times_are_told_in_three_digits():
    assert [human_time(us) for us in (0.5, 9.1449, 999.4, 1150, 64_400_000)] == [
        "0.5 us",
        "9.14 us",
        "999 us",
        "1.15 ms",
        "64.4 s",
    ]


def test_beyond_the_rows_that_were_measured_a_time_grows_as_the_kernel_declares(monkeypatch):
    kernel, device = FakeKernel(), predictor()
    declared = [device.of(kernel, matrix(), rows).us for rows in (512, 2048)]
    monkeypatch.setattr(Tables, "time", lambda self, *_: (Known(100.0, rows=512), "measured here"))
    found = device.of(kernel, matrix(), 2048)
    assert found.us == pytest.approx(100.0 * declared[1] / declared[0], rel=0.02)
    assert found.source == "measured here, from 512 rows"


def test_far_beyond_them_it_tells_nothing(monkeypatch):
    """One row is mostly launching: what it took says little of a prompt, where another kernel may be far faster."""
    kernel, device = FakeKernel(), predictor()
    declared = device.of(kernel, matrix(), 2048)
    monkeypatch.setattr(Tables, "time", lambda self, *_: (Known(100.0, rows=1), "measured here"))
    assert device.of(kernel, matrix(), 2048) == declared

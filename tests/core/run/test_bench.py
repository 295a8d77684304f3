"""A timed model: rates that follow from the times, sequences left as they were, and the memory of the plan."""

from __future__ import annotations

import pytest

import kernelmux_reference
from fake_backend import FakeKernel
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.measure.timing import Timing
from kernelmux.policy.policy import parse_policy
from kernelmux.run.bench import Load, ModelTiming, decode_steps, time_model
from kernelmux.run.model import Model, load_random


@pytest.fixture(scope="module")
def model() -> Model:
    return load_random("tiny:Q4_0")


def test_a_model_is_timed_at_any_batch(model: Model):
    load = Load(prompt=40, context=20, batch=3, decode=4)
    plan = model.plan(use=["*=torch,reference"], max_rows=32)
    timed = time_model(model, plan, load)
    assert timed.prefill_rate > 0
    assert timed.decode_rate == pytest.approx(3 / timed.decode.median * 1e6)
    assert timed.host is None
    assert timed.launches == plan.schedule(3, 3).launches
    assert timed.memory["weights"] == plan.packed_bytes
    assert timed.memory["cache"] == 3 * 24 * plan.kv_bytes_per_token


def test_a_kernel_that_raises_meanwhile_is_told_with_the_times(model: Model):
    def fails(node, tensors):
        raise ValueError("never worked")

    with registry.isolated(flaky=backend(rope=FakeKernel(work=fails)), reference=kernelmux_reference):
        plan = model.plan(parse_policy('[defaults]\nuse = ["flaky"]\non_error = "next"\n', "p.toml"), max_rows=8)
        timed = time_model(model, plan, Load(prompt=2, context=2, decode=1))
    assert {(each.kernel, each.instead) for each in timed.replaced} == {("flaky:f32", ("reference:f32",))}


def test_decoding_feeds_each_sequence_its_likeliest_token(model: Model):
    plan = model.plan(use=["*=torch,reference"])
    ids = model.generate([0], plan, max_tokens=5)
    list(ids)
    session = model.session(plan, 16)
    sequence = session.open()
    decode_steps(session, [sequence], 5)
    assert sequence.length == 5
    after = session.feed(sequence, ids.ids[4:])
    again = session.open()
    session.close(sequence)
    assert session.feed(again, [0, *ids.ids[:4], *ids.ids[4:]]).argmax() == after.argmax()


def test_rows_turn_times_into_rates():
    timing = Timing(1000.0, 500.0, 2000.0)
    timed = ModelTiming(Load(100, 8, 4, 2), timing, timing, timing, 7, {})
    prompt, decode, host = timed.rows()
    assert (prompt["median"], prompt["p10 to p90"]) == (100_000.0, [50_000.0, 200_000.0])
    assert decode["median"] == 4000.0
    assert (host["median"], host["unit"]) == (1000.0, "us")

"""A timed model: rates that follow from the times, sequences left as they were, and the memory of the plan."""

from __future__ import annotations

import pytest

import kernelmux_reference
from fake_backend import FakeKernel
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.errors import PlanError
from kernelmux.measure.timing import Timing
from kernelmux.policy.policy import parse_policy
from kernelmux.run import bench
from kernelmux.run.bench import Load, ModelTiming, decode_steps, time_model, time_step
from kernelmux.run.drawing import Drawing
from kernelmux.run.model import Model, load_random
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Session


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


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of each step that a session takes: for each sequence its length before, and the tokens that it is given."""
    taken: list[list[tuple[int, int]]] = []
    run = Session._run_checked

    def recorded(self, feeds, m):
        taken.append([(feed.sequence.length, len(feed.ids)) for feed in feeds])
        return run(self, feeds, m)

    monkeypatch.setattr(Session, "_run_checked", recorded)
    return taken


def test_a_step_of_few_rows_decodes_a_sequence_each_at_the_context(model: Model, stepped):
    timed = time_step(model, model.plan(use=["*=torch,reference"], max_rows=8), 3, context=40)
    assert timed.p10 > 0
    assert not timed.captured
    lengths = {length for feeds in stepped for length, _ in feeds}
    assert (min(lengths), max(lengths)) == (39, 39 + len(lengths) - 1)
    assert len(lengths) <= bench.STEPS
    assert {tuple(count for _, count in feeds) for feeds in stepped} == {(1, 1, 1)}


def test_a_step_of_many_rows_is_one_prompt(model: Model, stepped, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "LONGEST", 0.0)
    plan = model.plan(use=["*=torch,reference"], max_rows=200)
    assert time_step(model, plan, 200, context=40).median > 0
    assert stepped == [[(0, 200)]] * 2
    with pytest.raises(PlanError, match="the plan takes up to 200 rows, 201 were asked for"):
        time_step(model, plan, 201, context=40)


def test_plans_of_one_model_pack_a_weight_once_while_a_session_holds_it(model: Model, monkeypatch: pytest.MonkeyPatch):
    plans = [model.plan(use=["*=torch:f32,torch"], max_rows=rows) for rows in (4, 8)]
    holder = model.session(plans[0], 1)
    for _ in holder.prepare(()):
        pass
    monkeypatch.setattr("kernelmux.models.random.random_planes", None)
    assert time_step(model, plans[1], 4, context=8).median > 0


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


def test_a_drawn_load_draws_and_its_table_says_so(model: Model, monkeypatch: pytest.MonkeyPatch):
    started, start = [], Drawing.start
    monkeypatch.setattr(Drawing, "start", lambda self, samplers: started.append(samplers) or start(self, samplers))
    plan = model.plan(use=["*=torch,reference"], max_rows=8)
    load = Load(prompt=4, context=4, batch=2, decode=2, sampling=Sampling(temperature=0.8, top_p=0.95))
    assert time_model(model, plan, load).rows()[1]["work"] == "decode at 2 x 4, temperature 0.8, top_p 0.95"
    assert [[each.sampling for each in samplers] for samplers in started] == [[load.sampling] * 2] * (bench.DECODES + 1)
    started.clear()
    assert time_model(model, plan, Load(prompt=4, context=4, batch=2, decode=2)).rows()[1]["work"] == "decode at 2 x 4"
    assert not started


def test_rows_turn_times_into_rates():
    timing = Timing(1000.0, 500.0, 2000.0)
    timed = ModelTiming(Load(100, 8, 4, 2), timing, timing, timing, 7, {})
    prompt, decode, host = timed.rows()
    assert (prompt["median"], prompt["p10 to p90"]) == (100_000.0, [50_000.0, 200_000.0])
    assert decode["median"] == 4000.0
    assert (host["median"], host["unit"]) == (1000.0, "us")

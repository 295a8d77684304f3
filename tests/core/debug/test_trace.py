"""A trace has every node of the steps, the kernels that are slow stand out, and what could be gained adds up."""

import json
import time
from dataclasses import replace

import pytest

import kernelmux
import kernelmux_reference
from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.contract.device import Ceilings
from kernelmux.debug import trace as tracing
from kernelmux.debug.times import Span
from kernelmux.debug.trace import NodeTime, StepTrace, cost_of_event, trace_model
from kernelmux.measure.timing import Timing

DELAY = 0.004
CEILINGS = Ceilings(copy=1e10, read=1e10, gemm={"f32": 1e11, "bf16": 1e10})


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measuring them takes seconds."""
    monkeypatch.setattr(tracing, "measure_ceilings", lambda device: CEILINGS)


@pytest.fixture
def traced(tiny):
    """A model of which one op's kernel sleeps."""

    def slow(node, tensors):
        time.sleep(DELAY)
        compute(node, tensors)

    with registry.isolated(slow=backend(rms_norm=FakeKernel("late", work=slow)), reference=kernelmux_reference):
        model = kernelmux.load(tiny)
        plan = model.plan(use=["*=reference", "rms_norm=slow"])
        yield trace_model(model, plan, 5, 4, 2), plan


def test_every_node_of_both_steps_is_there_and_the_slow_op_stands_out(traced):
    found, plan = traced
    prompt, decode = found.steps
    for step, rows in ((prompt, 8), (decode, 2)):
        schedule = plan.schedule(rows, 1 if step is prompt else 2)
        assert [node.node for node in step.nodes] == [each.node.name for each in schedule.steps]
        assert [node.kernel for node in step.nodes] == [each.choice.name for each in schedule.steps]
        first, *_ = step.groups("op")
        assert (first.name, first.count) == ("rms_norm", sum(each.node.op == "rms_norm" for each in schedule.steps))
        assert first.us >= first.count * DELAY * 1e6
        assert first.us <= step.us
        assert step.groups("kernel")[0].name == "slow:late"
    assert (prompt.work, prompt.tokens, decode.work, decode.tokens) == ("prompt of 5", 5, "decode at 2 x 5", 2)


def test_bytes_and_products_are_those_of_the_tokens_that_are_cached(traced):
    _, decode = traced[0].steps
    attention = next(node for node in decode.nodes if node.op == "attention")
    # Four heads of 16, two sequences that see six tokens each.
    assert attention.flops == 4 * 4 * 16 * 6 * 2
    product = next(node for node in decode.nodes if node.node == "logits")
    assert product.flops == 2 * 2 * 64 * 269
    assert product.nbytes == 4 * (64 * 269 + 2 * 64 + 2 * 269)
    assert product.reading == pytest.approx(product.nbytes / 1e10 * 1e6)
    assert product.multiplying == pytest.approx(product.flops / 1e11 * 1e6)


def node(name="n", op="mul", layer=None, us=10.0, reading=4.0, multiplying=1.0, kernel="a:b"):
    return NodeTime(name, op, layer, kernel, "", 1, us, 1.0, 100, 50, reading, multiplying, "reading")


def test_groups_add_up_to_the_step():
    nodes = (
        node("x", us=30),
        node("y", us=10, reading=20),
        node("z", "add", 0, 40, 10, 30, "c:d"),
        node("w", "add", 1),
    )
    step = StepTrace("decode", 1, False, Timing(100, 99, 101), nodes)
    assert [(group.name, group.count, group.us) for group in step.groups("op")] == [("add", 2, 50), ("mul", 2, 40)]
    mul = step.groups("op")[1]
    # What takes less than at the ceiling gains nothing, and makes up for nothing.
    assert (mul.share, mul.ceiling, mul.gain) == pytest.approx((0.4, 0.6, 0.26))
    assert str(mul) == "mul: 40.0% of the step, 60% of reading; better kernels gain at most 26.0% of the step"
    assert [group.name for group in step.groups("layer")] == ["none", "0", "1"]
    assert sum(group.us for group in step.groups("kernel")) == step.us == 90
    assert str(step) == (
        "decode: 100 us a step (99 us to 101 us); its 4 nodes one by one take 90 us, 90% of it, between launches 4 us"
    )


def test_usual_steps_are_those_in_the_middle():
    walks = [[Span(us, None), Span(2 * us, None)] for us in (900.0, 10.0, 11.0, 1.0, 12.0, 10.0, 9.0, 800.0)]
    assert [spans[0].us for spans in tracing._usual(walks)] == [10, 10, 11, 12]
    assert tracing._usual(walks[:1]) == walks[:1]


def test_the_command_prints_writes_and_refuses(tiny, tmp_path):
    page, events = tmp_path / "t.html", tmp_path / "t.json"
    asked = ("trace", tiny, "--prompt", 4, "--decode", 2, "--exact")
    result = call_command(*asked, "--html", page, "--chrome", events)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("prompt of 4: ")
    assert lines[1].split("\t")[:3] == ["op", "nodes", "time"]
    assert any(line.startswith("decode at 1 x 4: ") for line in lines)
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(events.read_text())["traceEvents"]
    (tmp_path / "saved").mkdir()
    document = json.loads(call_command(*asked, "--json", "--save", tmp_path / "saved" / "trace.json").out)
    assert call_command("report", tmp_path / "saved", "-o", tmp_path / "report.html").code == 0
    assert "Where the time goes: decode at 1 x 4" in (tmp_path / "report.html").read_text()
    assert [step["work"] for step in document["steps"]] == ["prompt of 4", "decode at 1 x 4"]
    assert {"by_op", "by_layer", "by_kernel", "nodes", "us", "step"} <= document["steps"][0].keys()
    told = "a context of 332 tokens was asked for, the model holds 256"
    assert_one_line_error(call_command("trace", tiny, "--prompt", 300), told)
    twice = call_command(*asked, "--html", page, "--chrome", page)
    assert twice.code == 2
    assert "the page asked for" in twice.err


@pytest.mark.parametrize(("step", "cost"), [(114, 1.5), (100, 2.0), (116, 1.0), (119, 0.5), (300, 0.5)])
def test_an_event_costs_what_a_replay_lacks_within_what_was_measured(step, cost):
    walks = [[Span(us, None) for us in (30.0, 40.0, 20.0, 30.0)] for _ in range(2)]
    assert cost_of_event(walks, step, 1.0) == pytest.approx(cost)


def test_what_a_device_waits_for_python_is_the_rest_of_an_eager_step():
    nodes = tuple(replace(node(us=us), gap=None) for us in (10, 20))
    eager = StepTrace("prompt of 8", 8, False, Timing(100, 99, 101), nodes)
    assert eager.between == 70.0
    assert replace(eager, captured=True).between is None

"""A trace as a page and as events: whole, escaped, and nothing of it elsewhere."""

import json

from kernelmux.contract.device import Ceilings
from kernelmux.debug.trace import NodeTime, StepTrace, Trace
from kernelmux.debug.trace_page import trace_events, trace_html
from kernelmux.measure.timing import Timing

CEILINGS = Ceilings(copy=1e10, read=1e10, gemm={"f32": 1e11, "bf16": 1e10})


def node(name, op="mul", layer=None, us=10.0):
    return NodeTime(name, op, layer, "a:b", "", 1, us, 1.0, 100, 50, 4.0, 1.0, "reading")


def test_the_page_escapes_and_needs_nothing_beside_itself():
    step = StepTrace("decode", 1, True, Timing(100, 99, 101), (node("<b>x</b>", us=0.0), node("y")))
    page = trace_html(Trace("<i>m</i>", "cpu", "p.toml", "0", CEILINGS, (step,)))
    assert "<b>x" not in page
    assert "<i>m" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<svg" in page
    for outside in ("http:", "https:", "<script", "<link", "url("):
        assert outside not in page


def test_events_lie_one_after_the_other():
    step = StepTrace("decode", 1, True, Timing(100, 99, 101), (node("x", us=3.0), node("y", "add", 2)))
    events = json.loads(trace_events(Trace("m", "cpu", "p.toml", "0", CEILINGS, (step, step))))["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["cat"], e["pid"], e["ts"], e["dur"]) for e in complete[:2]] == [
        ("x", "mul", 0, 0.0, 3.0),
        ("y", "add", 0, 4.0, 10.0),
    ]
    assert complete[1]["args"]["layer"] == 2
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["decode", "decode"]
    assert {e["pid"] for e in complete} == {0, 1}

"""A trace as one HTML page that needs nothing beside itself, and as events for a viewer of timelines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kernelmux.debug.trace import StepTrace, Trace
from kernelmux.graph.formats import human_bytes
from kernelmux.measure.predict import human_time
from kernelmux.page import render_page


def trace_html(trace: Trace) -> str:
    """The page; every text in it is escaped."""
    filters = {"time": human_time, "bytes": human_bytes, "percent": lambda part: f"{part:.1%}"}
    return render_page("kernelmux.debug", "trace.html.jinja", filters, trace=trace)


def trace_events(trace: Trace) -> str:
    """JSON of complete events, as chrome://tracing and Perfetto read it: the nodes of each step, one after the other.

    The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format).
    """
    events = [event for number, step in enumerate(trace.steps) for event in _events(number, step)]
    about = {"model": trace.model, "device": trace.device, "policy": trace.policy, "plan": trace.fingerprint}
    return json.dumps({"displayTimeUnit": "ns", "otherData": about, "traceEvents": events})


def _events(number: int, step: StepTrace) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": step.work}}
    start = 0.0
    for node in step.nodes:
        told = {key: getattr(node, key) for key in ("kernel", "variant", "layer", "rows", "nbytes", "flops", "bound")}
        told["ceiling_us"] = round(node.least, 3)
        yield {
            **{"ph": "X", "name": node.node, "cat": node.op, "pid": number, "tid": 0},
            **{"ts": round(start, 3), "dur": round(node.us, 3), "args": told},
        }
        start += node.us + (node.gap or 0.0)

"""The page of speeds, of a synthetic result of the choice: the table, who loses, and the plot."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PLOT = "performance.md", "results/prediction.svg"
SVG = {"svg": "http://www.w3.org/2000/svg"}

Render = Callable[[Path], dict[str, str]]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Iterator[Render]:
    monkeypatch.syspath_prepend(DOCS)
    yield importlib.import_module("performance").render
    for name in ("performance", "choices", "scatter", "tables"):
        sys.modules.pop(name, None)


def timed(plan: str, m: int, us: float, **more: Any) -> dict[str, Any]:
    row = {"model": "llama-8b:Q4_K_M", "m": m, "plan": plan, "alone": plan not in ("auto", "tuned")}
    row |= {"us": us, "p10 to p90": [us, us], "tokens/s": round(m / us * 1e6, 1), "captured": True}
    row |= {"predicted us": us, "measured": 1.0, "choice": f"{plan}:k 225", "less exact": [], "weights GB": 4.9}
    return row | more


ROWS = [
    timed("auto", 1, 1900.0, **{"predicted us": 1710.0}),
    timed("tuned", 1, 1800.0),
    timed("cupy", 1, 2000.0),
    timed("torch", 1, 5000.0),
    timed("triton", 1, 1000.0, **{"less exact": ["mul_mat triton:k"]}),
    timed("auto", 2048, 55_000.0, **{"predicted us": 99_000.0, "measured": 0.2}),
    timed("tuned", 2048, 50_000.0),
    {"model": "llama-8b:Q4_K_M", "m": 2048, "plan": "cupy", "alone": True, "fault": "a step of 64 rows took 7.0 s"},
    timed("torch", 2048, 50_000.0),
    timed("triton", 2048, 60_000.0),
    *({"model": "llama-8b:Q4_K_M", "m": m, "plan": "acme", "alone": True, "fault": "PlanError: no"} for m in (1, 2048)),
    timed("auto", 1, 4000.0, model="llama-1b:bf16", choice="triton:bf16 113"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    head = {"title": "The choice beside every backend alone on X", "machine": "NVIDIA H200", "method": "whole steps"}
    tail = {"versions": {"torch": "2.11.0"}, "commit": "abc1234", "date": "2026-11-29", "notes": []}
    (tmp_path / "h200-choice.json").write_text(json.dumps({**head, **tail, "rows": ROWS}), "utf-8")
    return tmp_path


def lines(page: str, first: str) -> list[str]:
    """The table below a heading's row."""
    table = page[page.index(first) :].split("\n\n", 1)[0]
    return table.splitlines()


def test_a_choice_stands_beside_the_backends_alone(render: Render, results: Path):
    head, _, decode, prompt = lines(render(results)[PAGE], "| m | auto | tuned | cupy")
    assert head.startswith("| m | auto | tuned | cupy | torch | triton | auto against the best alone | tuned against")
    # Faster, but less exact, is no rival; nor is it the fastest.
    assert decode == "| 1 | 526 | **556** | 500 | 200 | 1,000* | 5.0% faster | 10% faster |"
    assert prompt == "| 2048 | 37,236 | **40,960** |  | **40,960** | 34,133 | **10% slower** | 0.0% faster |"


def test_the_choice_and_what_did_not_run_are_told(render: Render, results: Path):
    page = render(results)[PAGE]
    assert lines(page, "| m | auto's products | tuned's products |")[2:] == [
        "| 1 | auto:k 225 | tuned:k 225 |",
        "| 2048 | auto:k 225 | tuned:k 225 |",
    ]
    assert "cupy: a step of 64 rows took 7.0 s (m = 2048).\n" in page
    assert "acme: PlanError: no.\n" in page
    assert "### llama-1b:bf16\n\n| m | auto | auto against the best alone |\n" in page


def test_how_often_a_choice_loses_is_told_for_all_models(render: Render, results: Path):
    page = render(results)[PAGE]
    assert (
        "auto: 1 of 2 times slower than the fastest backend alone by more than 2%, "
        "at worst 10% slower (llama-8b:Q4_K_M, m = 2048), in the median 2.5% slower." in page
    )
    assert "tuned: 0 of 2 times slower" in page


def test_predictions_are_plotted_and_their_medians_told(render: Render, results: Path):
    made = render(results)
    assert "from measured kernels: off by 5% in the median of 2." in made[PAGE]
    assert "from what kernels declare: off by 80% in the median of 1." in made[PAGE]
    assert f"]({PLOT})" in made[PAGE]
    drawn = ElementTree.fromstring(made[PLOT])
    points = {c.find("svg:title", SVG).text: c for c in drawn.iterfind("svg:circle", SVG)}
    assert set(points) == {
        *(f"llama-8b:Q4_K_M, H200, m = {m}" for m in (1, 2048)),
        "llama-1b:bf16, H200, m = 1",
    }
    assert points["llama-8b:Q4_K_M, H200, m = 2048"].get("fill") == "#ffffff"
    assert points["llama-8b:Q4_K_M, H200, m = 1"].get("fill") != "#ffffff"
    # Exactly predicted: on the diagonal, as far from the left as from the bottom.
    (square,) = drawn.iterfind("svg:clipPath/svg:rect", SVG)
    left, bottom = float(square.get("x")), float(square.get("y")) + float(square.get("height"))
    right = points["llama-1b:bf16, H200, m = 1"]
    assert math.isclose(float(right.get("cx")) - left, bottom - float(right.get("cy")), abs_tol=0.11)
    assert max(float(c.get("cx")) for c in points.values()) < left + float(square.get("width"))
    legend = " ".join(text.text for text in drawn.iterfind("svg:g/svg:text", SVG))
    assert "llama-1b:bf16, H200" in legend
    assert "off by up to 15%" in legend


def test_without_such_a_result_there_is_neither_section_nor_plot(render: Render, tmp_path: Path):
    assert set(render(tmp_path)) == {PAGE}
    rows = [{"model": "m", "m": 1, "plan": "auto", "alone": False, "fault": "PlanError: no"}]
    document = {"title": "T", "machine": "M", "method": "n", "versions": {}, "commit": "", "date": "", "rows": rows}
    (tmp_path / "cpu-choice.json").write_text(json.dumps(document), "utf-8")
    made = render(tmp_path)
    assert set(made) == {PAGE}
    assert "auto: PlanError: no." in made[PAGE]

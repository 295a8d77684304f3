"""The report: a matrix whose counts add up, in JSON, Markdown, and text for terminals and pipes."""

import json
import math
import random
from dataclasses import replace

import pytest

from kernelmux.conformance import Outcome
from kernelmux.conformance.report import Report, print_report, summary, to_json, to_markdown

OK = Outcome("silu-a", "silu", "x:f32", "", "pass", error=1e-12, worst=1e-6, bound=1e-10)
WRONG = replace(OK, case="silu-b", status="fail", failures=("error: NMSE 1 is over", "guards: overwritten"), error=1.0)
REFUSED = Outcome("silu-c", "silu", "x:f32", "", "refused", reason="no columns of [7] | or so")
KNOWN = replace(WRONG, case="silu-d", status="known", reason="rounds down (https://example.org/1)")


def report_of(*outcomes):
    return Report(outcomes, "cpu", {"kernelmux": "1", "backend x": "2"}, "2026-01-01 00:00 UTC")


def many(count=300):
    """Outcomes over three ops, formats and kernels, in no order."""
    random.seed(7)
    ops, formats, kernels = ("silu", "mul_mat", "rope"), ("", "f32", "Q4_0"), ("x:f32", "x:f16", "y:f32")
    pick = random.choice
    return [replace(pick((OK, WRONG, REFUSED, KNOWN)), op=pick(ops), weight_format=pick(formats), kernel=pick(kernels))
            for _ in range(count)]  # fmt: skip


def test_the_matrix_counts_every_outcome_once():
    outcomes = many()
    document = to_json(report_of(*outcomes))
    keys = [(row["op"], row["weight_format"], row["kernel"]) for row in document["matrix"]]
    assert len(set(keys)) == len(keys)
    for status, total in document["totals"].items():
        assert sum(row[status] for row in document["matrix"]) == total
    assert sum(document["totals"].values()) == len(outcomes) == len(document["outcomes"])


def test_rows_of_an_op_stand_together_whatever_the_order_of_the_run():
    ops = [cell.op for cell in report_of(*many()).cells]
    assert len([op for op, before in zip(ops, [None, *ops], strict=False) if op != before]) == 3


@pytest.mark.parametrize(
    ("outcomes", "status", "text"),
    [
        ([OK, REFUSED], "pass", "✓1 –1"),
        ([REFUSED, REFUSED], "refused", "–2"),
        ([OK, KNOWN], "known", "!1 ✓1"),
        ([OK, WRONG, KNOWN, REFUSED], "fail", "✗1 !1 ✓1 –1"),
    ],
)
def test_a_cell_is_as_bad_as_its_worst_case(outcomes, status, text):
    (cell,) = report_of(*outcomes).cells
    assert (cell.status, cell.text) == (status, text)


def test_the_worst_case_is_the_one_that_takes_most_of_its_bound():
    tight = replace(OK, case="tight", error=5e-11)
    loose = replace(OK, case="loose", error=1e-6, bound=1e-3)
    (cell,) = report_of(OK, tight, loose, REFUSED).cells
    assert cell.worst == tight
    assert report_of(REFUSED).cells[0].worst is None


def test_a_bound_of_nothing_is_missed_by_any_error():
    exact, off = replace(OK, bound=0.0, error=0.0), replace(OK, case="off", bound=0.0, error=1e-30)
    assert report_of(exact, off, OK).cells[0].worst == off


def test_refusals_are_named_once_each_with_how_often():
    other = replace(REFUSED, reason="no bias")
    report = report_of(other, REFUSED, REFUSED)
    assert list(report.refusals.items()) == [(("x:f32", REFUSED.reason), 2), (("x:f32", "no bias"), 1)]
    assert report.cells[0].reasons == ("no bias", REFUSED.reason)


@pytest.mark.parametrize(("said", "found"), [([True, True], True), ([True, None, False], False), ([None], None)])
def test_a_cell_is_batch_invariant_where_every_case_that_says_so_is(said, found):
    (cell,) = report_of(*(replace(OK, batch_invariant=one) for one in said)).cells
    assert cell.batch_invariant is found


def test_json_is_strict_and_each_outcome_has_its_command():
    endless = replace(WRONG, error=math.inf, worst=math.inf, failures=("finite: element (0, 0) is nan",))
    document = json.loads(json.dumps(to_json(report_of(OK, endless)), allow_nan=False))
    fine, wrong = document["outcomes"]
    assert (fine["error"], fine["bound"], fine["status"]) == (1e-12, 1e-10, "pass")
    assert (wrong["error"], wrong["failures"]) == (None, ["finite: element (0, 0) is nan"])
    assert wrong["command"] == endless.command
    assert document["matrix"][0]["worst"]["case"] == "silu-b"
    assert document["device"] == "cpu"


def test_to_a_pipe_each_failure_comes_with_its_checks_and_its_command(capsys):
    print_report(report_of(OK, WRONG, REFUSED, KNOWN))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t")[:4] == ["op", "weight", "kernel", "fail"]
    assert lines[1].split("\t")[3:7] == ["1", "1", "1", "1"]
    at = lines.index("fail: x:f32 silu-b")
    assert lines[at + 1 : at + 4] == [*(f"  {failure}" for failure in WRONG.failures), f"  again: {WRONG.command}"]
    assert f"known: x:f32 silu-d: {KNOWN.reason}" in lines
    assert lines[-1].startswith("1 pass, 1 refused, 1 fail, 1 known; on cpu, kernelmux 1")


def test_on_a_terminal_nothing_is_taken_for_markup(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    named = replace(WRONG, case="silu-[red]x", failures=("error: [bold]NMSE[/bold]",))
    print_report(report_of(OK, named, REFUSED))
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    for text in ("silu-[red]x", "[bold]NMSE[/bold]", REFUSED.reason, named.command, "✗1 ✓1 –1"):
        assert text in shown


def test_markdown_is_the_same_where_only_the_errors_differ():
    ours, theirs = (to_markdown(report_of(replace(OK, error=error), REFUSED)) for error in (1e-12, 3e-13))
    assert ours == theirs
    assert "| silu |  | ✓1 –1 (1e-10) |" in ours
    assert "| `x:f32` | 1 | no columns of [7] \\| or so |" in ours


def test_markdown_is_the_same_whichever_kernel_was_offered_first():
    kernels = [replace(OK, kernel=f"torch:{name}") for name in ("f32", "bf16")]
    refused = [replace(REFUSED, kernel=outcome.kernel) for outcome in kernels]
    there, back = (to_markdown(report_of(*outcomes, *refused)) for outcomes in (kernels, kernels[::-1]))
    assert there == back


def test_markdown_has_a_table_a_backend():
    page = to_markdown(report_of(*many()))
    assert page.count("### x") == page.count("### y") == 1
    assert "| op | weight | `y:f32` |" in page


def test_a_stale_entry_has_a_row_of_its_own():
    stale = Outcome("rope-*", "", "x:f32", "", "fail", failures=("stale: known_failures.toml names rope-*",))
    report = report_of(OK, stale)
    assert "known_failures.toml" in to_markdown(report)
    assert summary(report.totals) == "1 pass, 0 refused, 1 fail, 0 known"

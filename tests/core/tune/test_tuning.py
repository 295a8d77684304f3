"""Tuning as a whole, with a worker that only says so: the fastest plan holds at each row count, and nothing ends it."""

from __future__ import annotations

import pytest

from fake_tuning import Record, Told
from kernelmux.contract.device import described_device
from kernelmux.measure.timing import Timing
from kernelmux.policy.policy import parse_policy
from kernelmux.run.model import load_random
from kernelmux.tune.plans import Divergence, Named, Steps
from kernelmux.tune.result import compared_lines, frontier_lines, policy_text
from kernelmux.tune.tuning import Asked, Tuning
from kernelmux.tune.worker import Answer, SmokeCases

pytestmark = pytest.mark.slow

H200 = described_device("cuda sm_90 NVIDIA H200")
ROWS = (1, 8, 64)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path))


class Says:
    """A worker: kernels take as long as their names are, whole plans what `steps` says of their label and rows."""

    def __init__(self, steps):
        self.steps, self.ran = steps, []

    def ask(self, task):
        if isinstance(task, SmokeCases):
            return Answer(None)
        if isinstance(task, Steps):
            self.ran.append(task.contender.label)
            found = {rows: self.steps(task.contender.label, rows) for rows in task.counts}
            return Answer(fault="its process crashed: SIGSEGV") if None in found.values() else Answer(found)
        if isinstance(task, Divergence):
            return Answer((1e-4, 2e-4))
        return Answer((Timing.of([float(len(task.kernel))]), "", ""))


def tuned(steps, seconds=1e6, record=None, **asked):
    model, told = load_random("tiny:Q4_1"), Told()
    target = Asked(Named("tiny:Q4_1", True), H200, ROWS, 16, seconds, **asked)
    tuning = Tuning(target, model, record or Record(), told)
    worker = Says(steps)
    return model, tuning.run(worker), told, worker


def kernels(plan, rows):
    return {step.node.name: step.choice.name for step in plan.schedule(rows, rows).steps}


def test_where_nothing_is_faster_the_policy_is_the_plan_by_what_was_measured():
    model, found, _, _ = tuned(lambda label, rows: 10.0)
    assert set(found.winners.values()) == {"tuned"}
    again = model.plan(device=H200, max_rows=64, context=16)
    for rows in ROWS:
        assert kernels(found.plan, rows) == kernels(again, rows)
    assert found.notes == ()
    # What was measured is in this machine's table from now on.
    choice = next(step.choice for step in again.schedule(1, 1).steps if step.node.op == "mul_mat")
    assert choice.predicted is not None
    assert "measured here" in choice.predicted.source


def test_a_backend_that_is_faster_at_some_rows_is_taken_there_and_up_to_half_way_to_the_next():
    model, found, _, worker = tuned(lambda label, rows: 5.0 if (label, rows) == ("torch", 64) else 10.0)
    assert found.winners == {1: "tuned", 8: "tuned", 64: "torch"}
    torch = model.plan(device=H200, max_rows=64, use=("*=torch",), context=16)
    assert kernels(found.plan, 64) == kernels(torch, 64)
    assert kernels(found.plan, 23) == kernels(torch, 23)
    assert kernels(found.plan, 22) != kernels(torch, 22)
    # Who seems to win is timed twice, and so is what was put together.
    assert worker.ran.count("torch") == worker.ran.count("tuned") == 2
    assert found.compared[0].label == "policy"


def test_who_is_faster_once_and_not_again_is_not_taken():
    turns = iter([5.0, 20.0])
    _, found, _, worker = tuned(lambda label, rows: next(turns) if (label, rows) == ("torch", 64) else 10.0)
    assert worker.ran.count("torch") == 2
    assert set(found.winners.values()) == {"tuned"}


def test_two_percent_are_noise():
    _, found, _, _ = tuned(lambda label, rows: 9.85 if label == "torch" else 10.0)
    assert set(found.winners.values()) == {"tuned"}


def test_a_plan_that_crashes_is_told_and_the_others_are_compared():
    _, found, told, _ = tuned(lambda label, rows: None if label == "cupy" else 10.0)
    assert any(line.startswith("cupy was not timed: its process crashed") for line in told.lines)
    (cupy,) = [way for way in found.compared if way.label == "cupy"]
    assert cupy.times == {}
    assert cupy.note == "its process crashed: SIGSEGV"


def test_with_no_time_the_tuned_plan_is_timed_all_the_same_and_no_other():
    _, found, _, worker = tuned(lambda label, rows: 10.0, seconds=1e-9)
    assert worker.ran == ["tuned"]
    assert found.measured.left > 0
    assert {way.note for way in found.compared[1:]} == {"there was no time left"}


def test_the_file_says_where_it_is_from_and_what_it_gave_and_makes_the_plan():
    model, found, _, _ = tuned(lambda label, rows: 10.0 * rows**0.5)
    asked = Asked(Named("tiny:Q4_1", True), H200, ROWS, 16, 60.0)
    text = policy_text(asked, found, "kernelmux tune --random tiny:Q4_1", {"torch": "2.13.0"})
    assert text.startswith("# Written by `kernelmux tune --random tiny:Q4_1` on ")
    assert "NVIDIA H200: torch 2.13.0" in text
    assert 'tuned_for = "cuda sm_90 NVIDIA H200"' in text
    for line in (*compared_lines(found, ROWS, 100), *frontier_lines(found, 100)):
        assert f"# {line}".rstrip() in text
    plan = model.plan(parse_policy(text, "p.toml"), device=H200, max_rows=64)
    assert [kernels(plan, rows) for rows in ROWS] == [kernels(found.plan, rows) for rows in ROWS]
    assert plan.notes == ()


def test_an_error_budget_is_the_policys_too():
    _, found, _, _ = tuned(lambda label, rows: 10.0, max_error=1e-9)
    assert "max_error = 1e-09" in found.policy
    assert {step.choice.kernel.precision <= 1e-9 for step in found.plan.steps} == {True}


def test_the_frontier_has_float32_the_policy_and_what_larger_budgets_let_in():
    _, found, _, _ = tuned(lambda label, rows: 10.0)
    labels = [point.label for point in found.frontier]
    assert labels[:2] == ["float32", "this policy"]
    assert found.frontier[0].divergence == (0.0, 0.0)
    assert found.frontier[1].divergence == (1e-4, 2e-4)
    budgets = [point.max_error for point in found.frontier[2:]]
    assert budgets
    assert budgets == sorted(budgets)


def test_what_is_on_record_as_failed_is_told_at_once_and_in_the_result():
    record = Record()
    record.note("mul_mat", "torch:bf16", "mul_mat-m1: guards")
    _, found, told, _ = tuned(lambda label, rows: 10.0, record=record)
    assert told.lines[0] == "mul_mat torch:bf16 is left out: mul_mat-m1: guards"
    assert found.measured.faults == {"mul_mat torch:bf16": "mul_mat-m1: guards"}


def test_forgetting_empties_this_machines_tables():
    model, _, _, _ = tuned(lambda label, rows: 10.0)
    tuning = Tuning(Asked(Named("tiny:Q4_1", True), H200, ROWS, 16, 1.0), model, Record(), Told())
    left = len(tuning.questions())
    tuning.forget()
    assert len(tuning.questions()) > left + 100


def test_a_backend_that_is_less_exact_than_the_default_is_shown_and_not_taken(monkeypatch):
    monkeypatch.setattr("kernelmux.tune.tuning.less_exact", lambda plan, m, outs: ["mul_mat cupy:rough"])
    _, found, _, _ = tuned(lambda label, rows: 1.0 if label == "cupy" else 10.0)
    assert set(found.winners.values()) == {"tuned"}
    (cupy,) = [way for way in found.compared if way.label == "cupy"]
    assert set(cupy.times.values()) == {1.0}

"""Measuring goes on whatever a kernel does, keeps what it learns as it comes, and stops in time."""

from __future__ import annotations

import time

import pytest

from fake_backend import CPU, FakeKernel, llama_graph, whole_backend
from fake_tuning import Record, Told
from kernelmux.contract import registry
from kernelmux.measure.table import Tables, remember
from kernelmux.measure.timing import Timing
from kernelmux.plan.offers import Offers
from kernelmux.plan.selection import Selector
from kernelmux.policy.policy import parse_policy
from kernelmux.tune.measuring import measure
from kernelmux.tune.questions import find_questions
from kernelmux.tune.worker import Answer, SmokeCases, Timed

AUTO = parse_policy('[defaults]\nuse = ["auto"]\n', "p.toml")
PACKAGE = FakeKernel.__module__.partition(".")[0]


class Answers:
    """A worker that answers by the kernel's name."""

    def __init__(self, p90=8.0, **faults):
        self.faults, self.asked, self.timing = faults, [], Timing(7.0, 6.0, p90)

    def ask(self, task):
        self.asked.append(task)
        fault = self.faults.get(task.kernel.partition(":")[2], "")
        if isinstance(task, SmokeCases):
            return Answer(("silu-m1", "guards: broken")) if fault == "smoke" else Answer(None)
        return Answer(fault=fault) if fault else Answer((self.timing, "", ""))


def asked(registry_, counts=(1, 4), context=16):
    selector = Selector(AUTO, Offers(registry_, CPU))
    return find_questions(llama_graph(3), selector, counts, Tables(CPU), context)


def test_every_kernel_of_alike_nodes_is_asked_about_once_a_row_count_the_heaviest_nodes_first():
    kernels = [FakeKernel("one"), FakeKernel("two")]
    with registry.isolated(a=whole_backend(silu=kernels)) as found:
        questions = asked(found)
    of_silu = [(q.kernel, q.work.m) for q in questions if q.work.node.op == "silu"]
    assert sorted(of_silu) == [("a:one", 1), ("a:one", 4), ("a:two", 1), ("a:two", 4)]
    assert len({(q.family, q.size, q.work.m) for q in questions}) == len(questions)
    weights = [q.weight for q in questions if q.work.m == 4 and not q.alone]
    assert weights[0] == max(weights)


def test_what_is_in_this_machines_table_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path))
    with registry.isolated(a=whole_backend(silu=[FakeKernel("one")])) as found:
        first = asked(found)
        (one,) = [q for q in first if q.work.node.op == "silu" and q.work.m == 4]
        remember(PACKAGE, CPU, times={one.family: {one.size: {"4": 3.0}}})
        again = asked(found)
    assert {(q.subject, q.work.m) for q in first} - {(q.subject, q.work.m) for q in again} == {("silu a:one", 4)}


def test_a_kernel_that_is_far_too_slow_by_its_own_account_is_not_asked_about():
    kernels = [FakeKernel("fast", reading=0.9), FakeKernel("hopeless", reading=1e-5)]
    with registry.isolated(a=whole_backend(silu=kernels)) as found:
        assert {q.kernel for q in asked(found) if q.work.node.op == "silu"} == {"a:fast"}


def test_what_fails_is_told_once_noted_and_left_out_and_the_rest_is_kept():
    kernels = [FakeKernel(name) for name in ("good", "crashes", "wrong")]
    kept, told, record = [], Told(), Record()
    worker = Answers(crashes="its process crashed: SIGSEGV", wrong="smoke")
    with registry.isolated(a=whole_backend(silu=kernels)) as found:
        questions = [q for q in asked(found) if q.work.node.op == "silu"]
        measured = measure(questions, worker, lambda *answer: kept.append(answer), record, told)
    assert measured.faults == {
        "silu a:crashes": "its process crashed: SIGSEGV",
        "silu a:wrong": "smoke case silu-m1: guards: broken",
    }
    assert sorted(told.lines) == [f"{subject} is left out: {fault}" for subject, fault in measured.faults.items()]
    assert {(q.kernel, us) for q, us, *_ in kept} == {("a:good", 7.0)}
    assert (measured.answered, measured.unsteady) == (len(kept), 0) == (2, 0)
    # The choice must not take it either: it is on record.
    assert record.known == {
        "silu a:good": "",
        "silu a:crashes": "its process crashed: SIGSEGV",
        "silu a:wrong": "silu-m1",
    }


@pytest.mark.parametrize("task", [SmokeCases, Timed])
@pytest.mark.parametrize("times", [1, 2])
def test_a_kernel_that_hangs_once_is_asked_again_and_goes_on_record_the_second_time(task, times):
    """A laptop may have slept meanwhile, or a machine been busy as it compiled."""
    record, left = Record(), [Answer(fault="it hung", over=True, hung=True)] * times

    class Sleepy(Answers):
        def ask(self, asked):
            return left.pop() if left and isinstance(asked, task) else super().ask(asked)

    with registry.isolated(a=whole_backend(silu=[FakeKernel("good")])) as found:
        questions = [q for q in asked(found) if q.work.node.op == "silu"]
        measured = measure(questions, Sleepy(), lambda *answer: None, record, Told())
    assert bool(measured.faults) == (times == 2)
    assert (record.known["silu a:good"] == "") == (times == 1)


def test_smoke_cases_that_are_known_to_have_passed_do_not_run_again():
    worker = Answers()
    with registry.isolated(a=whole_backend(silu=[FakeKernel("good")])) as found:
        questions = [q for q in asked(found) if q.work.node.op == "silu"]
        measure(questions, worker, lambda *answer: None, Record(["silu a:good"]), Told())
    assert not any(isinstance(task, SmokeCases) for task in worker.asked)


def test_when_time_is_up_the_rest_is_left():
    told = Told()
    with registry.isolated(a=whole_backend(silu=[FakeKernel("good")])) as found:
        questions = asked(found)
        measured = measure(questions, Answers(), lambda *answer: None, Record(), told, until=time.monotonic() - 1)
    assert (measured.answered, measured.left) == (0, len(questions))


def test_a_time_that_varies_is_asked_for_twice_and_then_not_kept():
    kept, worker = [], Answers(p90=13.0)
    with registry.isolated(a=whole_backend(silu=[FakeKernel("good")])) as found:
        questions = [q for q in asked(found) if q.work.node.op == "silu"]
        measured = measure(questions, worker, lambda *answer: kept.append(answer), Record(["silu a:good"]), Told())
    assert len(worker.asked) == 2 * len(questions)
    assert (measured.unsteady, kept) == (len(questions), [])


def test_where_time_ends_between_two_kernels_of_one_work_neither_is_kept(monkeypatch):
    """One that was measured beside one that only declares would decide by how busy the machine was."""
    kept, clock = [], iter(range(100))
    monkeypatch.setattr("kernelmux.tune.measuring.time.monotonic", lambda: next(clock))
    with registry.isolated(a=whole_backend(silu=[FakeKernel("one"), FakeKernel("two")])) as found:
        questions = [q for q in asked(found) if q.work.node.op == "silu"]
        record = Record(["silu a:one", "silu a:two"])
        measured = measure(questions, Answers(), lambda *answer: kept.append(answer), record, Told(), until=2)
    assert (measured.answered, measured.left, len(kept)) == (3, 1, 2)
    assert len({question.work.m for question, *_ in kept}) == 1

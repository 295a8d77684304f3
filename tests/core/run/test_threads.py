"""A session is for one caller at a time: a second one is refused, and nobody's numbers are spoiled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import kernelmux
import kernelmux_reference
from command import TIMEOUT
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.run.feeds import Feed
from kernelmux.run.model import Model
from kernelmux.run.session import BusyError

PROMPTS = [[1, 2, 3, 4, 5], [9] * 17, [100, 30], [7, 8, 9] * 10]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module")
def plan(model: Model):
    return model.plan(use=["*=reference:f32"], max_rows=32)


@pytest.fixture(scope="module")
def expected(model: Model, plan):
    """The logits of each prompt's last row."""
    return [_first_logits(model.session(plan, 64), ids) for ids in PROMPTS]


def _first_logits(session, ids):
    return session.feed(session.open(), ids)


class Blocking(FakeKernel):
    """Waits in its first launch until it is let go."""

    def __init__(self):
        super().__init__(work=self._launch)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _launch(self, node, tensors):
        self.reached.set()
        assert self.go_on.wait(TIMEOUT)
        compute(node, tensors)


def test_whatever_a_second_thread_asks_while_the_first_is_in_a_step_is_refused(model: Model, expected):
    kernel = Blocking()
    with registry.isolated(slow=backend(embed=kernel), reference=kernelmux_reference):
        plan = model.plan(use=["*=slow,reference:f32"], max_rows=32)
    session = model.session(plan, 200, sequences=2)
    first, second = session.open(), session.open()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(session.feed, first, PROMPTS[0])
        assert kernel.reached.wait(TIMEOUT)
        asked = {
            "step": lambda: session.step([Feed(second, PROMPTS[1])]),
            "feed": lambda: session.feed(second, PROMPTS[1]),
            "decode": lambda: next(session.decode([second], [1], 4)),
            "prepare": lambda: next(session.prepare()),
            "close": lambda: session.close(first),
        }
        for call in asked.values():
            with pytest.raises(BusyError, match=r"at work, in another thread .*: take one session a thread"):
                call()
        kernel.go_on.set()
        torch.testing.assert_close(found.result(TIMEOUT), expected[0])
    assert (second.pages, second.length) == ([], 0)
    torch.testing.assert_close(session.feed(second, PROMPTS[1]), expected[1])


def test_threads_that_hammer_one_session_are_refused_or_right(model: Model, plan, expected):
    session = model.session(plan, 400, sequences=len(PROMPTS))
    start, refused = threading.Barrier(len(PROMPTS)), []

    def ask(index):
        right = 0
        start.wait(TIMEOUT)
        while right < 5:
            sequence = session.open()
            try:
                logits = session.feed(sequence, PROMPTS[index])
            except BusyError:
                refused.append(index)
                continue
            torch.testing.assert_close(logits, expected[index])
            right += 1
            while sequence.pages:
                try:
                    session.close(sequence)
                except BusyError:
                    refused.append(index)
        return right

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, range(len(PROMPTS)), timeout=TIMEOUT)) == [5] * len(PROMPTS)
    assert refused


def test_sessions_of_threads_of_their_own_share_the_weights(model: Model, expected):
    kernel = FakeKernel(work=compute, packed_bytes=64)
    with registry.isolated(mine=backend(mul_mat=kernel), reference=kernelmux_reference):
        plan = model.plan(use=["*=mine,reference:f32"], max_rows=32)
    sessions = [model.session(plan, 200) for _ in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(
            pool.map(lambda session, ids: session.feed(session.open(), ids), sessions, PROMPTS, timeout=TIMEOUT)
        )
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert kernel.prepared
    assert len({tuple(names) for names in kernel.prepared}) == len(kernel.prepared)


# A decode has the session to itself.


def test_two_decodes_cannot_take_turns_and_the_first_goes_on_unharmed(model: Model, plan):
    session = model.session(plan, 200, sequences=2)
    sequences = [session.open() for _ in range(2)]
    tokens = [int(session.feed(s, ids)[-1].argmax()) for s, ids in zip(sequences, PROMPTS, strict=False)]
    alone = [ids for (ids,) in session.decode(sequences[:1], tokens[:1], 6)]
    sequences[0].length = len(PROMPTS[0])
    steps = session.decode(sequences[:1], tokens[:1], 6)
    found = [next(steps)[0]]
    for call in (lambda: next(session.decode(sequences[1:], tokens[1:], 6)), lambda: session.close(sequences[0])):
        with pytest.raises(BusyError, match="close what is left early"):
            call()
    assert found + [ids for (ids,) in steps] == alone


@pytest.mark.parametrize("ends", ["it is closed", "it ends", "it raises"])
def test_after_a_decode_the_session_is_free_however(model: Model, plan, ends: str):
    session = model.session(plan, 100)
    sequence = session.open()
    session.feed(sequence, PROMPTS[0])
    steps = session.decode([sequence], [1], 2)
    next(steps)
    if ends == "it is closed":
        steps.close()
    elif ends == "it ends":
        list(steps)
    else:
        with pytest.raises(KeyError):
            steps.throw(KeyError())
    session.close(sequence)
    assert session.feed(session.open(), PROMPTS[0]).isfinite().all()


def test_an_answer_that_is_left_early_leaves_the_session_free(model: Model, plan):
    answer = model.generate("hello", plan, max_tokens=8)
    pieces = iter(answer)
    while len(answer.ids) < 2:
        next(pieces)
    with pytest.raises(BusyError):
        answer.session.step([Feed(answer.session.open(), [1])])
    pieces.close()
    answer.session.step([Feed(answer.session.open(), [1])])

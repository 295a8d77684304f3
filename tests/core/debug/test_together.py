"""Observers side by side: each sees whole walks, those that it wants, and every launch is made once."""

import pytest

import kernelmux
from kernelmux.debug.together import Together
from kernelmux.run.watch import Observer


class Counting(Observer):
    def __init__(self, every):
        self.every, self.walks, self.seen = every, 0, []

    def wants(self, walk, rehearsal):
        self.walks += 1
        return self.walks % self.every == 0

    def before(self, walk, index):
        self.seen.append("before")

    def launch(self, walk, index, call):
        self.seen.append("launch")
        call()

    def after(self, walk, index):
        self.seen.append("after")

    def end(self, walk):
        self.seen.append("end")


def test_observers_together_each_see_the_walks_that_they_want(tiny):
    model = kernelmux.load(tiny)
    session = model.session(model.plan(use=["*=reference"]), 64)
    sequence = session.open()
    plain = session.feed(sequence, [1, 2, 3]).clone()
    one, two = Counting(1), Counting(2)
    with session.watched(Together([one, two])):
        for _ in range(5):
            session.close(sequence)
            sequence = session.open()
            assert session.feed(sequence, [1, 2, 3]).equal(plain)
    steps = len(session.plan.schedule(3, 1).steps)
    assert one.seen == [*["before", "launch", "after"] * steps, "end"] * 5
    assert two.seen == [*["before", "launch", "after"] * steps, "end"] * 2


def test_a_rehearsal_is_seen_by_those_alone_who_ask_for_it(tiny):
    class Always(Counting):
        def wants(self, walk, rehearsal):
            return True

    model = kernelmux.load(tiny)
    session = model.session(model.plan(use=["*=reference"]), 64)
    usual, always = Observer(), Always(1)
    walk = session.walker.bind(m=1, outs=1, seqs=1)
    usual.launch = lambda walk, index, call: pytest.fail("it saw a rehearsal")
    with session.watched(Together([usual, always])):
        walk.rehearse()
    assert always.seen == [*["before", "launch", "after"] * len(walk.steps), "end"]
    with session.watched(usual):
        walk.rehearse()

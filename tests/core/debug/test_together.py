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


class Recordable(Counting):
    def __init__(self, recorded):
        super().__init__(1)
        self.as_recorded = recorded

    def recorded(self, walk):
        return self.as_recorded


def test_a_graph_holds_the_looks_of_all_or_of_none():
    first, second = Observer(), Observer()
    both = Together([Recordable(first), Recordable(second)])
    recorded = both.recorded(None)
    assert recorded is both.recorded(None)
    assert Together([Recordable(first), Counting(1)]).recorded(None) is None


def test_a_graph_holds_the_looks_of_those_alone_that_want_the_walk():
    often, seldom = Recordable(Observer()), Recordable(Observer())
    seldom.every = 2
    both = Together([often, seldom])
    both.wants(None, rehearsal=False)
    alone = both.recorded(None)
    both.wants(None, rehearsal=False)
    together = both.recorded(None)
    both.wants(None, rehearsal=False)
    assert alone is both.recorded(None)
    assert alone is not together


def test_another_kernels_launch_passes_before_all_of_them():
    class Named(Observer):
        def __init__(self):
            self.names = []

        def launch_beside(self, walk, index, kernel, call):
            self.names.append(kernel)
            call()

    made, one, two = [], Named(), Named()
    Together([one, two]).launch_beside(None, 0, "odd:f32", lambda: made.append(1))
    assert (made, one.names, two.names) == ([1], ["odd:f32"], ["odd:f32"])

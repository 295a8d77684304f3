"""Observers side by side: each sees whole walks, those that it wants, and every launch is made once."""

import kernelmux
from kernelmux.debug.together import Together
from kernelmux.run.watch import Observer


def test_observers_together_each_see_the_walks_that_they_want(tiny):
    class Counting(Observer):
        def __init__(self, every):
            self.every, self.walks, self.seen = every, 0, []

        def wants(self, walk):
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

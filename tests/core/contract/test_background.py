"""Work in the background: when it is done, when it waits, and how it ends."""

import time
from threading import Event

import pytest

from kernelmux.contract import background as module
from kernelmux.contract.background import Background


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.05)


def never(error):
    raise AssertionError(error)


def test_jobs_are_done_in_order_and_finish_waits_for_them():
    done, background = [], Background(never)
    for number in range(5):
        background.add(lambda number=number: (time.sleep(0.01), done.append(number)))
    assert not done
    background.finish()
    assert done == [0, 1, 2, 3, 4]
    background.add(lambda: done.append(5))
    background.finish()
    background.finish()
    assert done[5:] == [5]


def test_they_wait_while_somebody_is_at_work_and_begin_by_themselves_afterwards():
    done, background = Event(), Background(never)
    background.add(done.set)
    with background.in_use():
        background.start()
        assert not done.wait(0.3)
    assert done.wait(10)


def test_finish_waits_for_nobody_who_is_at_work():
    done, background = [], Background(never)
    with background.in_use():
        background.add(lambda: (background.go_on(), done.append(1)))
        background.start()
        background.finish()
    assert done == [1]


def test_the_first_that_raises_is_the_last_and_is_told():
    done, told = [], []
    background = Background(told.append)
    background.add(lambda: 1 / 0)
    background.add(lambda: done.append(1))
    background.finish()
    background.add(lambda: done.append(2))
    background.finish()
    assert not done
    assert [type(error) for error in told] == [ZeroDivisionError]


def test_stop_ends_the_job_at_its_next_look_and_drops_the_others():
    begun, done, background = Event(), [], Background(never)

    def long():
        begun.set()
        while True:
            background.go_on()
            time.sleep(0.01)

    background.add(long)
    background.add(lambda: done.append(1))
    background.start()
    assert begun.wait(10)
    background.stop()
    background.finish()
    assert not done

"""What something costs, counted instead of timed: the number is the same on every machine."""

import sys


def work(function, *arguments):
    """Python calls that a function makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return calls

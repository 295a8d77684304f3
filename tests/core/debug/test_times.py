"""What the clock says of launches, and of the time between them."""

import time
from types import SimpleNamespace

from kernelmux.debug.times import Clock


def test_a_launch_is_timed_and_so_is_the_way_to_the_next():
    clock, walk = Clock(), SimpleNamespace()
    for _ in range(2):
        for index in range(3):
            clock.launch(walk, index, lambda: time.sleep(0.002))
            time.sleep(0.001)
        clock.end(walk)
    for spans in clock.walks:
        assert all(span.us >= 2000 for span in spans)
        assert [span.gap >= 1000 for span in spans] == [True, True, False]

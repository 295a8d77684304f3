"""How many device launches a captured graph is, read with a driver that says what the test wants."""

import ctypes

import pytest

from kernelmux.contract.cuda import count_launches

KERNEL, MEMCPY, MEMSET, HOST, EMPTY = 0, 1, 2, 3, 5


class Driver:
    """CUDA's driver, as far as it reads graphs: a node's handle is its place, counted from 1."""

    def __init__(self, kinds, status=0):
        self.kinds, self.status = kinds, status

    def cuGraphGetNodes(self, graph, nodes, number):
        assert graph.value == 7
        for index in range(len(self.kinds) if nodes else 0):
            nodes[index] = index + 1
        number._obj.value = len(self.kinds)
        return self.status

    def cuGraphNodeGetType(self, node, kind):
        assert isinstance(kind._obj, ctypes.c_int)
        kind._obj.value = self.kinds[node.value - 1]
        return 0


@pytest.mark.parametrize(
    ("kinds", "launches"),
    [([], 0), ([KERNEL], 1), ([MEMSET, KERNEL, MEMCPY, KERNEL], 4), ([EMPTY, KERNEL, HOST], 1)],
)
def test_kernels_copies_and_fills_are_launches_and_nothing_else_is(kinds, launches):
    assert count_launches(7, Driver(kinds)) == launches


def test_what_the_driver_cannot_read_is_an_error():
    with pytest.raises(RuntimeError, match="error 400"):
        count_launches(7, Driver([KERNEL], status=400))

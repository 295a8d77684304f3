"""What a launch passes on to Triton, without a card."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kernelmux_triton.launch import bind


class Kernel:
    """A jitted function, and what it is compiled to; both note what they are given."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def warmup(self, *args, grid, num_warps):
        self.compiled.append((args, grid, num_warps))
        return self

    def __getitem__(self, grid):
        return lambda *args, stream=None: self.launched.append((grid, args, stream))


@pytest.mark.parametrize("handle", [0, 4711])
def test_a_launch_goes_to_the_stream_that_it_was_bound_to(handle):
    """0 is the handle of the default stream; told None, Triton would look the current one up at each launch."""
    kernel, x = Kernel(), torch.empty(4)
    launch = bind(kernel, (2, 3), x, 5, stream=SimpleNamespace(cuda_stream=handle), num_warps=4)
    assert kernel.compiled == [((x, 5), (2, 3, 1), 4)]
    assert not kernel.launched
    launch()
    launch()
    assert kernel.launched == [((2, 3, 1), (x, 5), handle)] * 2
    assert len(kernel.compiled) == 1

"""The step's buffers: what is written is there, at addresses that stay."""

import torch

from fake_backend import CPU
from kernelmux.run.state import HostCopy, StepState

EXTENTS = {"tokens": (5,), "table": (3, 4), "lengths": (3,)}


def test_buffers_have_their_extents_and_start_where_kernels_may_use_their_widest_loads():
    state = StepState(EXTENTS, CPU)
    start = state.buffers["tokens"].data_ptr()
    for name, shape in EXTENTS.items():
        buffer = state.buffers[name]
        assert (tuple(buffer.shape), buffer.dtype) == (shape, torch.int32)
        assert (buffer.data_ptr() - start) % 256 == 0


def test_the_first_items_are_written_and_the_rest_stays():
    state = StepState(EXTENTS, CPU)
    state.write({"tokens": [7, 8, 9], "lengths": [1]}, {"table": [[1, 2], [3]]})
    state.write({"tokens": [6]}, {"table": [[5]]})
    assert state.buffers["tokens"].tolist() == [6, 8, 9, 0, 0]
    assert state.buffers["lengths"].tolist() == [1, 0, 0]
    assert state.buffers["table"].tolist() == [[5, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]]


def test_on_the_cpu_the_mirror_is_the_buffers():
    state = StepState(EXTENTS, CPU)
    for name, buffer in state.buffers.items():
        assert state.host[name].data_ptr() == buffer.data_ptr()


def test_a_host_copy_holds_what_was_there_when_it_started():
    source = torch.tensor([1, 2], dtype=torch.int32)
    copy = HostCopy(source, CPU)
    copy.start()
    source.zero_()
    assert copy.wait() == [1, 2]

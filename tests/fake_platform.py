"""A kind of device that tests bring, `npu`: torch calls it `cpu`; its streams keep what they are given while busy."""

from __future__ import annotations

from contextlib import contextmanager

from kernelmux.contract.device import Device, Platform


class Stream:
    """Runs what it is given at once, unless it is busy."""

    def __init__(self):
        self.busy, self.waiting = False, []

    def enqueue(self, work):
        if self.busy:
            self.waiting.append(work)
        else:
            work()

    def wait_stream(self, other):
        assert not other.busy


class Npu(Platform):
    """`stream.enqueue` is how its kernels launch. `free` is what `free_bytes` says."""

    kind = "npu"
    lost = ("tile memory is gone",)

    def __init__(self):
        self.free, self.now, self.streams = None, Stream(), []

    def find(self, index):
        return Device("npu", index, "Test NPU", arch="v2", processors=16)

    def stream(self, device):
        self.streams.append(Stream())
        return self.streams[-1]

    def current(self, device):
        return self.now

    @contextmanager
    def on(self, stream):
        before, self.now = self.now, stream or self.now
        yield
        self.now = before

    def synchronize(self, device):
        for stream in self.streams:
            stream.busy = False
            while stream.waiting:
                stream.waiting.pop(0)()

    def keep_busy(self, stream):
        stream.busy = True

    def free_bytes(self, device):
        return self.free

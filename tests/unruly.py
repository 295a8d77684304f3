"""A backend whose kernels end, hang or corrupt the process that runs them, as a folder that is found as installed ones.

Each has the numbers right where it is not what it is for; `unruly:good` has nothing wrong.
"""

from __future__ import annotations

from pathlib import Path

SOURCE = '''\
import ctypes
import time

import torch

from kernelmux.contract import Kernel, hookimpl

CONTRACT = 2


class Good(Kernel):
    """Right, and said to be fast, so that it is chosen."""

    ops = ("silu",)
    name = "good"
    precision = 1e-10
    devices = ("cpu",)
    input_formats = output_formats = ("f32",)

    def bind(self, node, tensors, stream):
        (x,), (y,) = tensors.inputs, tensors.outputs
        return lambda: torch.mul(x, torch.sigmoid(x), out=y)


class Crashes(Good):
    name = "crashes"

    def bind(self, node, tensors, stream):
        return lambda: ctypes.string_at(0)


class Hangs(Good):
    name = "hangs"

    def bind(self, node, tensors, stream):
        return lambda: time.sleep(3600)


class Corrupts(Good):
    """Writes one element too far."""

    name = "corrupts"

    def bind(self, node, tensors, stream):
        right, (y,) = super().bind(node, tensors, stream), tensors.outputs
        past = y.as_strided((1,), (1,), y.storage_offset() + y.numel())

        def launch():
            right()
            past.fill_(1.0)

        return launch


class CrashesLate(Good):
    """Only where rows are wider than in the smoke cases."""

    name = "crashes_late"

    def bind(self, node, tensors, stream):
        return super().bind(node, tensors, stream) if node.inputs[0].extents[1] != 1536 else lambda: ctypes.string_at(0)


@hookimpl
def kernel_classes():
    return [Good, Crashes, Hangs, Corrupts, CrashesLate]
'''


def install(folder: Path) -> Path:
    """Writes it into a folder, which is to be on the path."""
    package, info = folder / "kernelmux_unruly", folder / "kernelmux_unruly-0.1.dist-info"
    for made in (package, info):
        made.mkdir()
    (package / "__init__.py").write_text(SOURCE, "utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernelmux-unruly\nVersion: 0.1\n", "utf-8")
    (info / "entry_points.txt").write_text("[kernelmux.backends]\nunruly = kernelmux_unruly\n", "utf-8")
    return folder

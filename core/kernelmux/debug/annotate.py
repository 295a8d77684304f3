"""Launches under the names of their nodes and kernels, for torch's profiler and for the device's (NVTX, as nsys shows).

Enters: an observer for a session's steps. Leaves: ranges; steps are made launch by launch.
"""

from __future__ import annotations

from kernelmux.contract.kernel import Launch
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer


class Annotate(Observer):
    """Names each launch, as `blk.0.ffn_down mul_mat torch:f32`."""

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        from torch.profiler import record_function

        step = walk.steps[index]
        name = f"{step.node.name} {step.node.op} {step.choice.name}"
        with record_function(name), walk.device.platform.range(name):
            call()

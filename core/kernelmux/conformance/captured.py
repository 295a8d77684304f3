"""What is checked of a launch in a captured graph: that it gives the same bytes, and how many device launches it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernelmux.conformance.guarded import POISONS, same
from kernelmux.contract.kernel import Launch

if TYPE_CHECKING:
    from kernelmux.conformance.trial import Trial


def captured(trial: Trial, call: Launch, first: list[torch.Tensor]) -> None:
    """The same launch, replayed from a captured graph, gives the same bytes, in as many device launches as declared.

    It is captured while the inputs hold other numbers: a graph keeps addresses, and nothing of what was there.
    """
    platform = trial.device.platform
    graph = platform.graph(keep=True)
    trial.restore(trial.other)
    trial.synchronize()
    try:
        with platform.capturing(graph, trial.stream):
            call()
    # Whatever library the kernel is written in may raise here, each an exception of its own.
    except Exception as error:
        trial.failures.append(f"captured: declared capturable, but capturing raises: {error}")
        return
    if (found := platform.count_launches(graph) or 0) > trial.kernel.launches:
        trial.failures.append(f"declarations: launches says {trial.kernel.launches}, a captured call has {found}")
    graph.instantiate()
    if not same(trial.launch(graph.replay, POISONS[1]), first):
        trial.failures.append("captured: a replayed CUDA graph gives other bytes than the launch itself")

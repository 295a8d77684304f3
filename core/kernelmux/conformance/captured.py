"""What is checked of a launch in a CUDA graph: that it gives the same bytes, and how many device launches it is."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from kernelmux.conformance.guarded import POISONS, same
from kernelmux.contract.hookspecs import Launch

if TYPE_CHECKING:
    from kernelmux.conformance.trial import Trial

LAUNCHES = (0, 1, 2)
"""The graph nodes that are device launches, by CUDA's number for the type (CUgraphNodeType): kernel, memcpy, memset."""


def captured(trial: Trial, call: Launch, first: list[torch.Tensor]) -> None:
    """The same launch, replayed from a CUDA graph, gives the same bytes, in as many device launches as declared.

    It is captured while the inputs hold other numbers: a graph keeps addresses, and nothing of what was there.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    trial.restore(trial.other)
    trial.synchronize()
    try:
        with torch.cuda.graph(graph, stream=trial.stream):
            call()
    # Whatever library the kernel is written in may raise here, each an exception of its own.
    except Exception as error:
        trial.failures.append(f"captured: declared capturable, but capturing raises: {error}")
        return
    if (found := count_launches(graph.raw_cuda_graph(), driver())) > trial.kernel.launches:
        trial.failures.append(f"declarations: launches says {trial.kernel.launches}, a captured call has {found}")
    graph.instantiate()
    if not same(trial.launch(graph.replay, POISONS[1]), first):
        trial.failures.append("captured: a replayed CUDA graph gives other bytes than the launch itself")


def driver() -> Any:
    """CUDA's driver library, which torch has loaded already."""
    return ctypes.CDLL("libcuda.so.1")


def count_launches(graph: int, driver: Any) -> int:
    """How many kernels, copies and fills a CUDA graph holds, by its handle (cudaGraph_t, CUgraph for the driver)."""
    handle, number = ctypes.c_void_p(graph), ctypes.c_size_t()
    _succeed(driver.cuGraphGetNodes(handle, None, ctypes.byref(number)))
    nodes = (ctypes.c_void_p * number.value)()
    if number.value:
        _succeed(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)))
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        _succeed(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kinds.append(kind.value)
    return sum(kind in LAUNCHES for kind in kinds)


def _succeed(status: int) -> None:
    """RuntimeError unless a driver call returned CUDA_SUCCESS."""
    if status:
        raise RuntimeError(f"the CUDA driver could not read a captured graph: error {status}")

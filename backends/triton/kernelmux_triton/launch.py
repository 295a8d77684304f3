"""Triton kernels bound to their arguments: compiled when bound, launched without Triton's own argument handling."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from kernelmux.contract import Launch


def bind(kernel: Any, grid: tuple[int, ...], *args: object, stream: Any, num_warps: int) -> Launch:
    """A call that launches `kernel` on a stream of torch's; `args` are all of its arguments, constants too, in order.

    Nothing is launched here. Under TRITON_INTERPRET=1 the call interprets the kernel.
    """
    filled = (*grid, 1, 1)[:3]
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    # What is compiled is loaded on the current device.
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        compiled = kernel.warmup(*args, grid=filled, num_warps=num_warps)
        if compiled is None:
            return partial(kernel[filled], *args, num_warps=num_warps)
        # Told its stream, Triton asks neither for the current one nor for the device at each launch.
        return partial(compiled[filled], *args, stream=None if stream is None else stream.cuda_stream)

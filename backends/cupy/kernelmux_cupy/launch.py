"""A CUDA function bound to its arguments: the block of argument pointers is made once, a launch is one driver call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from kernelmux.hookspecs import Launch

STATIC = 48 * 1024
"""Bytes of shared memory a block that no function has to ask for."""

Argument = torch.Tensor | np.generic | None
"""A tensor (its address is passed), a numpy scalar of the very C type, or None: a null pointer."""


def bind(
    function: Any,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Argument],
    stream: Any,
    shared: int = 0,
) -> Launch:
    """A call that launches a CuPy function on a torch stream; it keeps its tensors alive.

    `grid` and `block` of up to three extents; `shared` bytes of dynamic shared memory. Nothing is launched here. A
    launch allocates nothing and waits for nothing, so that a CUDA graph can hold it.
    """
    from cupy_backends.cuda.api import driver

    if shared > STATIC:
        driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        # All that a multiprocessor has, so that as many blocks run at once as fit.
        driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    values = [_as_bytes(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    extents = (*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
    numbers = (function.ptr, *extents, shared, stream.cuda_stream, ctypes.addressof(pointers), 0)
    launch = partial(driver.launchKernel, *numbers)
    # What the numbers point to lives as long as the call.
    vars(launch)["kept"] = (args, values, pointers, function)
    return launch


def _as_bytes(arg: Argument) -> Any:
    """The argument's bytes at an address that stays."""
    if arg is None or isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(0 if arg is None else arg.data_ptr())
    raw = arg.tobytes()
    return (ctypes.c_char * len(raw)).from_buffer_copy(raw)

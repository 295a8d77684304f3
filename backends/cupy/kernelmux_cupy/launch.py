"""A CUDA function bound to its arguments: the block of argument pointers is made once, a launch is one driver call.

From compute capability 9.0 on a launch may overlap with the kernel before it: what that asks of a kernel is in
cuda/order.cuh.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from kernelmux.contract import Launch

STATIC = 48 * 1024
"""Bytes of shared memory a block that no function has to ask for."""

OVERLAPPING = (9, 0)
"""The first compute capability with programmatic dependent launch."""

Argument = torch.Tensor | np.generic | None
"""A tensor (its address is passed), a numpy scalar of the very C type, or None: a null pointer."""


def bind(
    function: Any, grid: Sequence[int], block: Sequence[int], args: Sequence[Argument], stream: Any, shared: int = 0
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
    if _capability(stream.device) < OVERLAPPING:
        numbers = (function.ptr, *extents, shared, stream.cuda_stream, ctypes.addressof(pointers), 0)
        launch = partial(driver.launchKernel, *numbers)
    else:
        config = _Config(*extents, shared, stream.cuda_stream, ctypes.pointer(_overlap()), 1)
        launch = partial(_launch_function(), ctypes.byref(config), function.ptr, pointers, None)
    # What the numbers point to lives as long as the call.
    vars(launch)["kept"] = (args, values, pointers, function)
    return launch


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute: an id, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@cache
def _overlap() -> _Attribute:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed."""
    return _Attribute(6, 1)


@cache
def _launch_function() -> Any:
    """The driver's cuLaunchKernelEx, which CuPy does not wrap; raises CuPy's error."""
    from cupy_backends.cuda.api import driver

    launch = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    # CuPy's check raises for a status that is not 0.
    launch.restype = driver.check_status
    return launch


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _as_bytes(arg: Argument) -> Any:
    """The argument's bytes at an address that stays."""
    if arg is None or isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(0 if arg is None else arg.data_ptr())
    raw = arg.tobytes()
    return (ctypes.c_char * len(raw)).from_buffer_copy(raw)

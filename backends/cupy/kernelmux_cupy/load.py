"""A function of `cuda/`, loaded for the device that a tensor is on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kernelmux.device import Device, find_device
from kernelmux_cupy.source import compile


def function(file: str, name: str, like: torch.Tensor, **defines: int | str) -> Any:
    """The CuPy function `name` of `cuda/FILE.cu`, its macros defined so, for the device of `like`."""
    return _function(file, name, like.get_device(), tuple(sorted(defines.items())))


@cache
def _function(file: str, name: str, index: int, defines: tuple[tuple[str, int | str], ...]) -> Any:
    return compile(file, _device(index), **dict(defines)).get_function(name)


@cache
def _device(index: int) -> Device:
    return find_device(f"cuda:{index}")

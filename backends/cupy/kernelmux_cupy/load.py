"""A function of `cuda/`, loaded once for a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kernelmux.contract.device import Device, find_device
from kernelmux_cupy.source import compile


def function(file: str, name: str, device: torch.device, **defines: int | str) -> Any:
    """The CuPy function `name` of `cuda/FILE.cu`, its macros defined so."""
    return _function(file, name, device, tuple(sorted(defines.items())))


@cache
def _function(file: str, name: str, device: torch.device, defines: tuple[tuple[str, int | str], ...]) -> Any:
    return compile(file, _described(device), **dict(defines)).get_function(name)


@cache
def _described(device: torch.device) -> Device:
    return find_device(str(device))

"""A function of `cuda/`, loaded once for a device."""

from __future__ import annotations

from functools import cache
from typing import Any

from kernelmux.contract.device import Device
from kernelmux_cupy.source import compile


def function(file: str, name: str, device: Device, **defines: int | str) -> Any:
    """The CuPy function `name` of `cuda/FILE.cu`, its macros defined so."""
    return _function(file, name, device, tuple(sorted(defines.items())))


@cache
def _function(file: str, name: str, device: Device, defines: tuple[tuple[str, int | str], ...]) -> Any:
    return compile(file, device, **dict(defines)).get_function(name)

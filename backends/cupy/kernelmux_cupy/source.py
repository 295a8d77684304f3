"""CUDA C of this package, compiled by NVRTC through CuPy, cached on disk, loaded once a process.

Enters: a file of `cuda/`, a device, the values of its macros. Leaves: a CuPy module whose functions can be launched.
Imports cupy only when asked: whether it is there is what `refusal` tells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.contract import Declined
from kernelmux.contract.cache import Cache, files_hash
from kernelmux.errors import BackendError

if TYPE_CHECKING:
    from kernelmux.contract.device import Device

FOLDER = Path(__file__).parent / "cuda"
OLDEST = (6, 1)
"""The first compute capability with DP4A."""
HEADERS = ("cuda_runtime/include", "cu13/include", "cu12/include")
"""Where NVIDIA's wheels put the toolkit's headers, below `nvidia`."""


def refusal(device: Device) -> Declined | None:
    """Why this backend has nothing for a device: no CUDA, too old a card, no CuPy, no NVRTC."""
    if device.kind != "cuda":
        return Declined(f"its kernels run on CUDA, the plan is for {device.kind}", "device")
    if device.capability is not None and device.capability < OLDEST:
        major, minor = device.capability
        return Declined(f"DP4A needs compute capability 6.1, {device.name} has {major}.{minor}", "capability")
    return _missing(device.capability or OLDEST)


@cache
def _missing(capability: tuple[int, int]) -> Declined | None:
    if find_spec("cupy") is None:
        return Declined("CuPy is not installed: install kernelmux-cupy[cuda12] or [cuda13]", "missing dependency")
    try:
        from cupy_backends.cuda.libs import nvrtc

        oldest = min(nvrtc.getSupportedArchs())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Declined(f"NVRTC cannot be loaded ({reason}): it comes with the CUDA toolkit", "missing dependency")
    if capability[0] * 10 + capability[1] < oldest:
        return Declined(f"this NVRTC knows cards from {oldest / 10} on: an older toolkit knows this one", "capability")
    return None


def function(file: str, name: str, device: Device, **defines: int | str) -> Any:
    """The CuPy function `name` of `cuda/FILE.cu`, its macros defined so; from the cache on disk where that has it.

    BackendError, with NVRTC's own words, where it does not compile.
    """
    return _module(file, device, tuple(sorted(defines.items()))).get_function(name)


@cache
def _module(file: str, device: Device, defines: tuple[tuple[str, int | str], ...]) -> Any:
    import cupy

    assert device.capability is not None
    code = _code(file, device.capability, defines)
    with cupy.cuda.Device(device.index):
        module = cupy.cuda.function.Module()
        module.load(code)
    return module


def _code(file: str, capability: tuple[int, int], defines: tuple[tuple[str, int | str], ...]) -> bytes:
    """The code from the cache, or compiled and put there: by its source, what compiles it, and how that is told to."""
    from cupy_backends.cuda.libs import nvrtc

    sources = (FOLDER / f"{file}.cu", *FOLDER.glob("*.cuh"))
    cache = Cache("cupy")
    # The options name the card and the macros.
    key = cache.key(files_hash(sources, FOLDER), nvrtc.getVersion(), _options(capability, dict(defines)))
    code = cache.get(key)
    if not code:
        code = translate(file, capability, **dict(defines)).code
        cache.put(key, code)
    return code


@dataclass(frozen=True)
class Compiled:
    """Code for one card, and what the assembler says of it: registers, spills, shared memory."""

    code: bytes
    log: str


def translate(file: str, capability: tuple[int, int], **defines: int | str) -> Compiled:
    """`cuda/FILE.cu` as machine code (PTX for a card newer than this NVRTC knows). Needs no device."""
    from cupy_backends.cuda.libs import nvrtc

    headers = sorted(FOLDER.glob("*.cuh"))
    program = nvrtc.createProgram(
        (FOLDER / f"{file}.cu").read_text("utf-8"),
        f"{file}.cu",
        [path.read_bytes() for path in headers],
        [path.name.encode() for path in headers],
    )
    try:
        try:
            nvrtc.compileProgram(program, _options(capability, defines))
        except nvrtc.NVRTCError:
            raise BackendError(f"{file}.cu does not compile: {nvrtc.getProgramLog(program)}") from None
        code = nvrtc.getCUBIN(program) if _known(capability) else nvrtc.getPTX(program)
        return Compiled(bytes(code), nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _options(capability: tuple[int, int], defines: dict[str, int | str]) -> tuple[str, ...]:
    number = capability[0] * 10 + capability[1]
    # Machine code is for one card; PTX for the newest one known before it, to be translated by the driver.
    known = max(arch for arch in architectures() if arch <= number)
    named = tuple(f"-D{name}={value}" for name, value in defines.items())
    folders = tuple(f"-I{folder}" for folder in _header_folders())
    kind = "sm" if known == number else "compute"
    return (f"--gpu-architecture={kind}_{known}", "--std=c++17", "--ptxas-options=-v", *folders, *named)


def architectures() -> tuple[int, ...]:
    """The cards that this NVRTC makes machine code for, as 90 for compute capability 9.0."""
    from cupy_backends.cuda.libs import nvrtc

    return tuple(nvrtc.getSupportedArchs())


def _known(capability: tuple[int, int]) -> bool:
    return capability[0] * 10 + capability[1] in architectures()


@cache
def _header_folders() -> tuple[Path, ...]:
    """Where headers of the CUDA toolkit may be; a source that includes none needs none."""
    spec = find_spec("nvidia")
    wheels = [Path(place) / folder for place in (spec and spec.submodule_search_locations) or () for folder in HEADERS]
    toolkit = Path(os.environ.get("CUDA_PATH") or "/usr/local/cuda") / "include"
    return tuple(folder for folder in (*wheels, toolkit) if folder.is_dir())

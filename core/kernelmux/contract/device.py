"""Devices: the value that a plan is made for, and the kind behind it, which finds such devices and orders their work.

Enters: a name (`cpu`, `cuda:1`), or the words that describe a card that is not there. Leaves: a Device. What differs by
kind is one class, a Platform, made known by `add_platform`: nothing else in core asks which kind a device is. Nothing
here imports torch before a device is found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from kernelmux.errors import PlanError

ENTRY_POINTS = "kernelmux.platforms"
"""The entry point group by which an installed package brings a kind of device: each names a Platform class."""


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best; measured, or stated by its platform."""

    copy: float
    """Bytes a second, read and written."""
    read: float
    """Bytes a second."""
    gemm: Mapping[str, float]
    """Flops a second of large products, by element format."""
    launch: float = 0.0
    """Seconds that a launch takes beside its work, in a step as it is run: captured, where the device captures."""
    gap: float = 0.0
    """Of these seconds what a kernel's measured time lacks: launched over and over, one starts while the last ends."""
    enqueue: float = 0.0
    """Seconds of the host's that a launch takes where the step is not captured, and the device works meanwhile."""
    turn: float = 0.0
    """Seconds between two such steps in which the device waits: the host reads what came out and prepares the next."""


@dataclass(frozen=True)
class Device:
    """What kernels are chosen by; 0 or nothing where it is not known. Its platform fills in what is usual for it."""

    kind: str
    index: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None for every other kind."""
    arch: str = ""
    """As compilers call it: `sm_90`, `gfx942`, `avx512_bf16`."""
    memory: int = 0
    """Bytes."""
    processors: int = 0
    """Multiprocessors (compute units): how many blocks run at once."""
    shared_memory: int = 0
    """Bytes that one block may ask for."""
    features: frozenset[str] = frozenset()
    """What not all of a kind have, as `bf16` of a CPU: products of bfloat16 are native."""

    def __post_init__(self) -> None:
        usual = {"name": self.kind, **(PLATFORMS[self.kind].usual(self) if self.kind in PLATFORMS else {})}
        for field, value in usual.items():
            if not getattr(self, field):
                object.__setattr__(self, field, value)

    @property
    def platform(self) -> Platform:
        """The kind's platform; PlanError where there is none."""
        return _platform(self.kind, self.kind)

    @property
    def torch(self) -> str:
        """What torch calls it."""
        return self.platform.torch_name(self.index)

    @property
    def device_class(self) -> str:
        """What a lock is valid for, as `described_device` reads it: `cuda sm_90 NVIDIA H200`."""
        words = (self.kind, self.arch, self.name if self.name != self.kind else "")
        odd = self.processors and self.processors != self.platform.usual(self).get("processors")
        return " ".join(filter(None, words)) + (f", {self.processors} processors" if odd else "")


class Platform:
    """A kind of device. This one works in host memory and has done its work when a call returns: no streams, no graphs.

    A stream, where a kind has them, is None for the methods here; so is a capture.
    """

    kind: ClassVar[str] = "cpu"
    arch: ClassVar[str] = r"\S+"
    """What its architectures look like, as a regular expression."""
    example: ClassVar[str] = "cpu avx512_bf16"
    """A device class of this kind."""
    host_memory: ClassVar[bool] = True
    """Whether buffers are host memory; else step state has a pinned mirror, and its copies are awaited."""
    captures: ClassVar[bool] = False
    """Whether a walk can be captured as a graph."""
    activations: ClassVar[str] = "f32"
    """The format that a bench stores activations in, unless told."""
    method: ClassVar[str] = "operands rotated past the cache; microseconds a launch, medians of up to 40 rounds"
    """How a bench measures."""
    copied_bytes: ClassVar[int] = 2**27
    """Bytes that are copied to find the memory's ceiling."""
    matrix_size: ClassVar[int] = 1024
    """Rows and columns of the matrices that are multiplied to find the arithmetic's ceiling."""
    past_cache: ClassVar[int] = 64 * 2**20
    """Bytes that operands in rotation cover at least."""
    full: ClassVar[tuple[str, ...]] = ("out of memory",)
    """Words by which an error, of whatever type, says that the device's memory is full."""
    lost: ClassVar[tuple[str, ...]] = ()
    """Words by which an error says that the device is lost to this process: every later call fails too."""

    def torch_name(self, index: int) -> str:
        """What torch calls the device."""
        return "cpu"

    def usual(self, device: Device) -> Mapping[str, Any]:
        """Fields that a device has unless it is told others."""
        return {}

    def find(self, index: int) -> Device:
        """The device on this machine; PlanError where it has none."""
        return Device(self.kind, index)

    def check_here(self, device: Device) -> None:
        """PlanError where a plan for that device cannot run on this machine, as one for a described card."""

    def gemm_formats(self, device: Device) -> tuple[str, ...]:
        """The formats whose GEMM is measured as a ceiling."""
        return "bf16", "f32"

    def ceilings(self, device: Device) -> Ceilings:
        """What such a device does at best, from what is published of its kind; nothing is measured."""
        threads = device.processors or 1
        native = "bf16" in device.features
        # A core of these years: two vector units of 256 or 512 bits at some 3 GHz; bfloat16 without a unit is emulated.
        f32 = (150e9 if native else 60e9) * threads
        gemm = {"f32": f32, "bf16": 4 * f32 if native else f32 / 5}
        return Ceilings(copy=10e9 * threads, read=12e9 * threads, gemm=gemm, launch=6e-6)

    # Streams and graphs.

    def stream(self, device: Device) -> Any:
        """A new stream."""
        return None

    def current(self, device: Device) -> Any:
        """torch's current stream."""
        return None

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Makes a stream torch's current one."""
        return nullcontext()

    def on_stream(self, launch: Callable[[], object], stream: Any) -> Callable[[], object]:
        """The launch with `stream` as torch's current one while it runs."""
        return launch

    def synchronize(self, device: Device) -> None:
        """Returns when the device has done all its work."""

    def keep_busy(self, stream: Any) -> None:
        """Enqueues some milliseconds of nothing."""

    def graph(self, keep: bool = False) -> Any:
        """An empty graph, to fill within `capturing` and to `replay`; `keep` keeps its nodes for `count_launches`."""
        raise PlanError(f"{self.kind} has no graphs: nothing is captured there")

    def capturing(self, graph: Any, stream: Any) -> AbstractContextManager[object]:
        """What is launched on the stream meanwhile goes into the graph."""
        raise PlanError(f"{self.kind} has no graphs: nothing is captured there")

    def is_capturing(self) -> bool:
        """Whether torch's current stream is being captured."""
        return False

    def count_launches(self, graph: Any) -> int | None:
        """Device launches that a kept graph holds; None where nobody can tell."""
        return None

    # Memory.

    def free_bytes(self, device: Device) -> int | None:
        """Bytes that may still be allocated; None where nobody can tell."""
        return None

    def cache_bytes(self, device: Device) -> int:
        """Bytes of the cache that operands must outrun to be measured; 0 where `past_cache` will do."""
        return 0

    def allocations(self, device: Device) -> int:
        """How many blocks of its memory torch has handed out so far; 0 where nobody counts."""
        return 0

    def peak_bytes(self, device: Device) -> int | None:
        """The most bytes that torch ever held; None where nobody can tell."""
        return None


class Cpu(Platform):
    """The processor that torch runs on. Its architecture is named only where it makes a difference to a choice."""

    arch = "avx512_bf16"

    def usual(self, device: Device) -> Mapping[str, Any]:
        return {"features": frozenset({"bf16"})} if device.arch == self.arch else {}

    def find(self, index: int) -> Device:
        if index:
            raise PlanError(f"there is no device cpu:{index}: the processor is one device, cpu")
        import torch

        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # Both variables make torch's kernels, or oneDNN's, those for an older processor.
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
        return Device(self.kind, arch=self.arch if native and wide and limit.upper() not in WITHOUT_BF16 else "")


WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits of oneDNN (ONEDNN_MAX_CPU_ISA in its documentation) under which bfloat16 products are emulated."""

PLATFORMS: dict[str, Platform] = {}
"""Every kind that is known, by name."""


def add_platform(platform: Platform) -> None:
    """Makes a kind of device known, in place of an earlier one of its name."""
    PLATFORMS[platform.kind] = platform


add_platform(Cpu())


def find_device(name: str = "cpu") -> Device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`); PlanError where this machine has no such device."""
    kind, _, index = name.partition(":")
    if index and not index.isdigit():
        raise _unknown(name)
    return _platform(kind, name).find(int(index or 0))


def described_device(words: str) -> Device:
    """The device that `KIND [ARCH] [NAME][, N processors]` says, as its `device_class` does; it need not be here."""
    kind, _, rest = words.strip().partition(" ")
    platform = _platform(kind, words)
    read = re.fullmatch(rf"(?P<arch>{platform.arch})?(?:(?:^| )(?P<name>.*?))?(?:, (?P<count>\d+) processors)?", rest)
    if read is None or (not read["arch"] and (rest or not platform.host_memory)):
        raise PlanError(f"{words!r} describes no device: the architecture follows {kind}, as in {platform.example!r}")
    return Device(kind, name=read["name"] or "", arch=read["arch"] or "", processors=int(read["count"] or 0))


def _platform(kind: str, asked: str) -> Platform:
    if kind not in PLATFORMS and kind not in known_kinds():
        raise _unknown(asked)
    return PLATFORMS[kind]


def known_kinds() -> tuple[str, ...]:
    """Every kind of device that this environment has a platform for, whether or not there is such a device."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in PLATFORMS:
            add_platform(entry.load()())
    return tuple(PLATFORMS)


def _unknown(asked: str) -> PlanError:
    known = [f"{kind}{n}" for kind in PLATFORMS for n in ("", ":N") if not n or PLATFORMS[kind].torch_name(0) != "cpu"]
    return PlanError(f"unknown device {asked!r}; known: {', '.join(known)}")


def on_stream(launch: Callable[[], object], stream: Any) -> Callable[[], object]:
    """The launch with torch's current stream being the one that a kernel was bound to; itself where that is None."""
    if stream is None:
        return launch
    return next(p for p in PLATFORMS.values() if p.torch_name(0).startswith(stream.device.type)).on_stream(
        launch, stream
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, in the words of torch or of some kind of device."""
    words = {word for platform in PLATFORMS.values() for word in platform.full}
    return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)


def out_of_memory(device: str, error: BaseException) -> str:
    """What torch's lengthy message says, as the start of a line: the device, what was asked for, what is free."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    free = re.search(r"([\d.]+ \w+) is free", str(error))
    sizes = [f"{asked[1]} were asked for"] if asked else []
    sizes += [f"{free[1]} are free"] if free else []
    return f"{device} is out of memory" + (f" ({', '.join(sizes)})" if sizes else "")

"""Devices: the value that a plan is made for, and the kind behind it, which finds such devices and orders their work.

Enters: a name (`cpu`, `cuda:1`), or the words that describe a card that is not there. Leaves: a Device. What differs by
kind is one class, a Platform, made known by `add_platform`: nothing else in core asks which kind a device is. Nothing
here imports torch before a device is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from threading import Thread
from typing import Any, ClassVar

from kernelmux.errors import PlanError, contained, named, told, where_raised

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
    chained: float = 0.0
    """Seconds that one takes among others of its kernel's `chain`."""
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
    """As compilers call it: `sm_90`, `gfx942`; of a processor its class, as `avx2`, `amx`."""
    memory: int = 0
    """Bytes."""
    processors: int = 0
    """Multiprocessors (compute units), or threads: how many blocks run at once."""
    shared_memory: int = 0
    """Bytes that one block may ask for."""
    features: frozenset[str] = frozenset()
    """What not all of a kind have, as of processors `avx2`, `avx512`, `bf16` (native products of bfloat16), `amx`."""

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
        usual = self.platform.usual(self).get("processors")
        odd = self.platform.counted and self.processors and self.processors != usual
        return " ".join(filter(None, words)) + (f", {self.processors} processors" if odd else "")


class Platform:
    """A kind of device. This one works in host memory and has done its work when a call returns: no streams, no graphs.

    A stream, where a kind has them, is None for the methods here; so is a capture.
    """

    kind: ClassVar[str] = "cpu"
    arch: ClassVar[str] = r"\S+"
    """What its architectures look like, as a regular expression."""
    example: ClassVar[str] = "cpu avx2"
    """A device class of this kind."""
    counted: ClassVar[bool] = True
    """Whether kernels choose by the number of processors: then it is part of a device class."""
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
    full: ClassVar[tuple[str, ...]] = ("out of memory", "can't allocate memory")
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
        # What is known of neither tells nothing: a bare device is that of its kind.
        found = self.find(device.index)
        if device.arch and found.device_class != device.device_class:
            raise PlanError(
                f"the plan is for {device.device_class}, {device.torch} here is {found.device_class}: "
                f"make one with device={device.torch!r}"
            )

    def gemm_formats(self, device: Device) -> tuple[str, ...]:
        """The formats whose GEMM is measured as a ceiling."""
        return "bf16", "f32"

    def ceilings(self, device: Device) -> Ceilings:
        """What such a device does at best, from what is published of its kind; nothing is measured."""
        # As a thread of a processor does; a kind that is none states its own.
        threads = device.processors or 1
        return Ceilings(copy=12e9 * threads, read=12e9 * threads, gemm={"f32": 100e9 * threads}, launch=6e-6)

    def counts_as(self, device: Device) -> str:
        """The device whose rates a device has of which nobody stated them, as `H100`; "" where somebody did."""
        return ""

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

    def start(self, index: int) -> None:
        """Does what takes long before a device can be used for the first time: called in a thread of its own."""

    def enter_thread(self, device: Device) -> None:
        """Called first in a thread that is going to bind kernels for a device."""

    def settings(self) -> Mapping[str, object]:
        """What the process has told the kind's library, by what it is called: kernels leave it as it is."""
        return {}

    def synchronize(self, device: Device) -> None:
        """Returns when the device has done all its work."""

    def range(self, name: str) -> AbstractContextManager[object]:
        """What is launched meanwhile has that name in the device's own profiler."""
        return nullcontext()

    def keep_busy(self, stream: Any) -> None:
        """Enqueues some milliseconds of nothing."""

    def graph(self, keep: bool = False) -> Any:
        """An empty graph, to fill within `capturing` and to `replay`; `keep` keeps its nodes for `count_launches`."""
        raise PlanError(f"{self.kind} has no graphs: nothing is captured there")

    def graph_pool(self) -> Any:
        """Memory for what is allocated while graphs are captured that never run at the same time."""
        return None

    def capturing(self, graph: Any, stream: Any, pool: Any = None) -> AbstractContextManager[object]:
        """What is launched on the stream meanwhile goes into the graph; what is allocated comes from the pool."""
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


PLATFORMS: dict[str, Platform] = {}
"""Every kind that is known, by name."""
BROKEN: dict[str, str] = {}
"""Kinds whose package raised when it was imported, and what."""


def add_platform(platform: Platform) -> None:
    """Makes a kind of device known, in place of an earlier one of its name."""
    PLATFORMS[platform.kind] = platform


def find_device(name: str = "cpu") -> Device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`); PlanError where this machine has no such device."""
    kind, _, index = name.partition(":")
    if index and not index.isdigit():
        raise _unknown(name)
    return _platform(kind, name).find(int(index or 0))


def start_device(name: str) -> None:
    """Begins with what takes long before a device of that name can be used, while the caller does something else."""
    kind, _, index = name.partition(":")
    if kind in known_kinds() and not index.strip("0123456789"):
        Thread(target=PLATFORMS[kind].start, args=(int(index or 0),), name="start device", daemon=True).start()


def described_device(words: str) -> Device:
    """The device that `KIND [ARCH] [NAME][, N processors]` says, as its `device_class` does; it need not be here."""
    kind, _, rest = " ".join(words.split()).partition(" ")
    platform = _platform(kind, words)
    read = re.fullmatch(rf"(?P<arch>{platform.arch})?(?:(?:^| )(?P<name>.*?))?(?:, (?P<count>\d+) processors)?", rest)
    if read is None or (not read["arch"] and (rest or not platform.host_memory)):
        first = rest.partition(" ")[0]
        wrong = f"{first!r} is none" if first else "there is none"
        said = f"an architecture follows {kind}, and {wrong}"
        raise PlanError(f"{words!r} describes no device: {said}, as in {platform.example!r}")
    return Device(kind, name=read["name"] or "", arch=read["arch"] or "", processors=int(read["count"] or 0))


def _platform(kind: str, asked: str) -> Platform:
    if kind not in PLATFORMS and kind not in known_kinds():
        raise _unknown(asked)
    return PLATFORMS[kind]


def known_kinds() -> tuple[str, ...]:
    """Every kind of device that this environment has a platform for, whether or not there is such a device."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in PLATFORMS and entry.name not in BROKEN:
            try:
                add_platform(entry.load()())
            except BaseException as error:
                BROKEN[entry.name] = f"{named(contained(error))} ({where_raised(error)})"
    return tuple(PLATFORMS)


def _unknown(asked: str) -> PlanError:
    if (fault := BROKEN.get(asked.partition(":")[0])) is not None:
        return PlanError(f"the package that brings the device {asked!r} is broken: {fault}")
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
    said, words = told(error), {word for platform in PLATFORMS.values() for word in platform.full}
    return type(error).__name__ == "OutOfMemoryError" or any(word in said for word in words)


def out_of_memory(device: str, error: BaseException) -> str:
    """What torch's lengthy message says, as the start of a line: the device, what was asked for, what is free."""
    said = told(error)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
    free = re.search(r"([\d.]+ \w+) is free", said)
    sizes = [f"{asked[1]} were asked for"] if asked else []
    sizes += [f"{free[1]} are free"] if free else []
    return f"{device} is out of memory" + (f" ({', '.join(sizes)})" if sizes else "")

"""The device that a plan is made for: enough to choose kernels by, and nothing that differs between two alike cards."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from kernelmux.errors import PlanError


@dataclass(frozen=True)
class Device:
    """A torch device and its class: kind (`cpu`, `cuda`), name, and CUDA's compute capability."""

    kind: str
    index: int = 0
    name: str = "cpu"
    capability: tuple[int, int] | None = None

    @property
    def torch(self) -> str:
        """What torch calls it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def device_class(self) -> str:
        """What a locked plan is valid for."""
        if self.capability is None:
            return self.kind
        major, minor = self.capability
        return f"{self.kind} {self.name} sm_{major}{minor}"


def find_device(name: str = "cpu") -> Device:
    """The device of that torch name (`cpu`, `cuda`, `cuda:1`); PlanError where this machine has no such device."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device("cpu")
    if kind != "cuda" or (index and not index.isdigit()):
        raise PlanError(f"unknown device {name!r}; known: cpu, cuda, cuda:N")
    import torch

    with warnings.catch_warnings():
        # torch warns of an old driver here, and says the same in the error below.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count()
    number = int(index or 0)
    if number >= count:
        raise PlanError(f"device {name!r} was asked for, torch sees {count} CUDA devices{_why_none(count)}; cpu works")
    return Device("cuda", number, torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))


def _why_none(count: int) -> str:
    """Why torch has no CUDA device: built without CUDA, no driver, a driver too old. Empty where it has some."""
    import torch

    if count:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).strip().splitlines()[0].rstrip('.')})"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full: torch's allocator, CUDA itself, or cuBLAS."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in text or "_ALLOC_FAILED" in text


def out_of_memory(device: str, error: BaseException) -> str:
    """What torch's lengthy message says, as the start of a line: the device, what was asked for, what is free."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    free = re.search(r"([\d.]+ \w+) is free", str(error))
    sizes = [f"{asked[1]} were asked for"] if asked else []
    sizes += [f"{free[1]} are free"] if free else []
    return f"{device} is out of memory" + (f" ({', '.join(sizes)})" if sizes else "")

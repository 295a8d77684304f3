"""The device that a plan is made for: enough to choose kernels by, and nothing that differs between two alike cards."""

from __future__ import annotations

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

    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise PlanError(f"device {name!r} was asked for, torch sees {count} CUDA devices; cpu works")
    number = int(index or 0)
    return Device("cuda", number, torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))

"""How the numbers of a case are spread, by name, so that a file of cases can say so too.

Enters: a name and a shape. Leaves: a tensor from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Spread(Protocol):
    """Draws a tensor of any shape."""

    def __call__(self, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor: ...


def extremes() -> Mapping[str, Spread]:
    """Inputs that are not plain noise, by name: what breaks sums, scales and divisions."""
    import torch

    def outliers(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        noise[..., 0] *= 1e4
        return noise

    return {
        "outliers": outliers,
        "denormals": lambda generator, shape: torch.randn(shape, generator=generator) * 1e-42,
        "equal": lambda generator, shape: torch.full(shape, 0.37),
        # A scale that rows share drowns the small ones; float16 still holds the product of any two.
        "uneven": lambda generator, shape: torch.randn(shape, generator=generator) * 30.0 ** (1 - _rows(shape) % 3),
        "zeros": lambda generator, shape: torch.zeros(shape),
        "zero-row": lambda generator, shape: torch.randn(shape, generator=generator) * (_rows(shape) != 1),
    }


def spreads() -> Mapping[str, Spread]:
    """Every spread by name: plain noise, the extremes, and what only some ops are to get right."""
    import torch

    def scaled(factor: float) -> Spread:
        return lambda generator, shape: factor * torch.randn(shape, generator=generator)

    def nan_and_infinity(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        # The second of these NaN is the one that graphics cards make: all bits set but the sign.
        odd = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800000, -0x00800000], dtype=torch.int32).view(torch.float32)
        flat = noise.view(-1)
        flat[::7] = odd.repeat(-(-len(flat[::7]) // 4))[: len(flat[::7])]
        return noise

    return {
        "noise": scaled(1.0),
        **extremes(),
        # A residual or bias of N(0, 1) is less than the error that a kernel of 8-bit activations may make beside it.
        "loud": scaled(256.0),
        "small": scaled(1e-3),
        "large": scaled(1e4),
        # Most of these have no exponent bits in float16, whose smallest normal number is 6.1e-5.
        "f16-subnormals": scaled(1e-5),
        "nan-and-infinity": nan_and_infinity,
        # Of silu these are tiny and none is zero.
        "far-below-zero": lambda generator, shape: torch.empty(shape).uniform_(-80, -25, generator=generator),
    }


AROUND_F16 = {"beyond-f16": 9e4, "below-f16": 2e-7}
"""Numbers up to which some are too large for float16, whose largest is 65504, or nearly nothing in it."""


@dataclass(frozen=True)
class Like:
    """Draws a tensor as the spread of that name does."""

    spread: str
    shape: tuple[int, ...]

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        return spreads()[self.spread](generator, self.shape)


@dataclass(frozen=True)
class Between:
    """Draws a tensor of numbers from `low` to `high`; whole ones, both ends among them, where these are `int`."""

    low: float
    high: float
    shape: tuple[int, ...]

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        import torch

        if isinstance(self.low, int) and isinstance(self.high, int):
            return torch.randint(self.low, self.high + 1, self.shape, generator=generator, dtype=torch.int32)
        return torch.empty(self.shape).uniform_(self.low, self.high, generator=generator)


@dataclass(frozen=True, eq=False)
class Listed:
    """Integers as they stand: nested lists of one shape."""

    numbers: Sequence[int] | Sequence[Sequence[int]]

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        import torch

        return torch.tensor(self.numbers, dtype=torch.int32)


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor's planes as they stand, stored as its value is: numbers that were there, to the bit."""

    planes: tuple[torch.Tensor, ...]

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        return self.planes[0]


Draw = Callable[["torch.Generator"], "torch.Tensor"]
"""What makes a tensor of a case's numbers; one of the classes above where a file of cases is to hold it."""


def _rows(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:]))

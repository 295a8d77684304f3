"""How the next token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.errors import KernelmuxError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Temperature 0 takes the likeliest. Else from softmax(logits / temperature), of the `top_k` likeliest (0: all), and
    of the fewest whose probabilities reach `top_p` (Holtzman et al. 2019, arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        sound = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "seed": -(2**63) <= self.seed < 2**63,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, holds in sound.items() if not holds]:
            raise KernelmuxError(
                f"sampling cannot use {', '.join(wrong)}: temperature is 0 or more, top_p above 0 and at most 1, "
                "top_k 0 or more, and the seed fits 64 bits"
            )

    def sampler(self) -> Sampler:
        return Sampler(self)


class Sampler:
    """Draws token ids; the same seed draws the same ones."""

    def __init__(self, sampling: Sampling) -> None:
        import torch

        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that a device can draw it by itself."""
        return self._sampling.temperature == 0

    def __call__(self, logits: torch.Tensor) -> int:
        """A token id from logits [vocabulary]."""
        import torch

        sampling = self._sampling
        if self.greedy:
            return int(logits.argmax())
        # The likeliest is moved to 0 first: a tiny temperature may then give -inf to the rest, but never NaN.
        scaled = (logits.double() - logits.max()).cpu() / sampling.temperature
        likeliest, ids = scaled.sort(descending=True, stable=True)
        probabilities = likeliest.softmax(dim=0)
        if sampling.top_k:
            probabilities[sampling.top_k :] = 0
        # A token stays while those before it have not reached top_p: the first always does.
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities[before >= sampling.top_p * probabilities.sum()] = 0
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])

"""By what the next token is drawn: settings, and what a sequence carries on from token to token.

Enters: settings, a seed, the tokens before. Leaves: uniform numbers for each token, made on the host, so that every
device draws alike. Touches no logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex

from kernelmux.errors import KernelmuxError, check_type

if TYPE_CHECKING:
    import torch

DRAWS = 16
"""Random numbers a token, whatever the settings, so that the stream is the same."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Temperature 0 takes the likeliest. Else from softmax(logits / temperature), of the `top_k` likeliest (0: all), of
    the fewest whose probabilities reach `top_p` of these (Holtzman et al. 2019, arXiv:1904.09751), and of those that
    have at least `min_p` of the likeliest one's (Nguyen et al. 2024, arXiv:2407.01082). Before all that logits of
    tokens that were there before are divided by `repetition_penalty` where they are above 0, else multiplied (Keskar et
    al. 2019, arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            whole = name in ("top_k", "seed")
            told = f"{name} is a {'whole ' * whole}number"
            check_type(given, SupportsIndex if whole else SupportsFloat, told, KernelmuxError)
        sound = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "seed": -(2**63) <= self.seed < 2**63,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, holds in sound.items() if not holds]:
            raise KernelmuxError(
                f"sampling cannot use {', '.join(wrong)}: temperature is 0 or more, top_p above 0 and at most 1, "
                "top_k 0 or more, min_p from 0 to 1, repetition_penalty above 0, and the seed fits 64 bits"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken whatever was before, so that a device can draw it by itself."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def sampler(self, before: Iterable[int] = ()) -> Sampler:
        """A sampler for what follows the tokens `before`."""
        return Sampler(self, before)


class Sampler:
    """What the next token of one sequence is drawn by: settings, tokens before, random numbers; one seed, one text."""

    def __init__(self, sampling: Sampling, before: Iterable[int] = ()) -> None:
        import torch

        self.sampling = sampling
        self.seen = set(before)
        self.count = 0
        """Tokens drawn so far."""
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._ahead = torch.empty(0, DRAWS, dtype=torch.float64)

    def uniforms(self, first: int, count: int) -> torch.Tensor:
        """Random numbers [count, DRAWS], in float64, of `count` tokens from the `first`-th on, none of which is drawn.

        From 0 to below 1; all 0 where the likeliest is taken, which of ties is then the first.
        """
        import torch

        if self.sampling.temperature == 0:
            return torch.zeros(count, DRAWS, dtype=torch.float64)
        start = first - self.count
        if (missing := start + count - len(self._ahead)) > 0:
            more = torch.rand(missing, DRAWS, dtype=torch.float64, generator=self._generator)
            self._ahead = torch.cat([self._ahead, more])
        return self._ahead[start : start + count]

    def take(self, id: int) -> None:
        """Makes `id` the token that was drawn."""
        self.seen.add(id)
        self.count += 1
        self._ahead = self._ahead[1:]


def each_sampler(sampling: Sampling | Sequence[Sampling | Sampler], tokens: Sequence[int]) -> list[Sampler]:
    """A sampler for each sequence, of which a token is known: one that draws on, or a new one of the settings."""
    each = [sampling] * len(tokens) if isinstance(sampling, Sampling) else sampling
    if len(each) != len(tokens):
        raise KernelmuxError(f"sampling is one for all sequences or one for each: {len(each)} for {len(tokens)}")
    return [one.sampler([token]) if isinstance(one, Sampling) else one for one, token in zip(each, tokens, strict=True)]

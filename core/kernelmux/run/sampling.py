"""How the next token is drawn from logits.

Enters: logits, where they lie; the tokens before. Leaves: a token id. All that is done to the vocabulary is done on the
logits' device, and only as many candidates are sorted as are needed; the host gives a uniform number a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.errors import KernelmuxError

if TYPE_CHECKING:
    import torch

CANDIDATES = 1024
"""Of a large vocabulary so many of the likeliest are sorted, unless these do not reach `top_p`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Temperature 0 takes the likeliest. Else from softmax(logits / temperature), of the `top_k` likeliest (0: all), of
    the fewest whose probabilities reach `top_p` (Holtzman et al. 2019, arXiv:1904.09751), and of those that have at
    least `min_p` of the likeliest one's (Nguyen et al. 2024, arXiv:2407.01082). Before all that logits of tokens that
    were there before are divided by `repetition_penalty` where they are above 0, else multiplied (Keskar et al. 2019,
    arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
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

    def sampler(self, before: Iterable[int] = ()) -> Sampler:
        """A sampler for what follows the tokens `before`."""
        return Sampler(self, before)


class Sampler:
    """Draws token ids, one after another; the same seed draws the same ones."""

    def __init__(self, sampling: Sampling, before: Iterable[int] = ()) -> None:
        import torch

        self._sampling = sampling
        self._seen = dict.fromkeys(before)
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken whatever was before, so that a device can draw it by itself."""
        return self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1

    def __call__(self, logits: torch.Tensor) -> int:
        """A token id from logits [vocabulary]."""
        logits = self._penalised(logits)
        id = int(logits.argmax()) if self._sampling.temperature == 0 else self._draw(logits)
        self._seen[id] = None
        return id

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        import torch

        penalty = self._sampling.repetition_penalty
        if penalty == 1 or not self._seen:
            return logits
        ids = torch.tensor(list(self._seen), device=logits.device)
        seen = logits[ids].double()
        changed = torch.where(seen > 0, seen / penalty, seen * penalty).to(logits.dtype)
        return logits.index_copy(0, ids, changed)

    def _draw(self, logits: torch.Tensor) -> int:
        import torch

        sampling = self._sampling
        # The likeliest is moved to 0 first: a tiny temperature may then give -inf to the rest, but never NaN.
        scaled = (logits.double() - logits.max()) / sampling.temperature
        candidates, ids = _likeliest(scaled, sampling.top_k, sampling.top_p)
        probabilities = candidates.exp()
        # A token stays while those before it have not reached top_p: the first always does.
        reached = probabilities.cumsum(dim=0) - probabilities
        whole = probabilities if sampling.top_k else scaled.exp()
        kept = (reached < sampling.top_p * whole.sum()) & (probabilities >= sampling.min_p)
        probabilities = probabilities * kept
        uniform = torch.rand((), dtype=torch.float64, generator=self._generator)
        sums = probabilities.cumsum(dim=0)
        # Rounding may take the sum past the last that is kept.
        place = torch.searchsorted(sums, sums[-1] * uniform.to(sums.device), right=True)
        return int(ids[torch.minimum(place, kept.nonzero()[-1, 0])])


def _likeliest(scaled: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that may be drawn, and their ids: in order where there is a `top_p`, in that of ids where none is."""
    import torch

    count = len(scaled)
    if not top_k and top_p == 1:
        return scaled, torch.arange(count, device=scaled.device)
    if top_k:
        return tuple(scaled.topk(min(top_k, count)))  # type: ignore[return-value]
    candidates, ids = scaled.topk(min(CANDIDATES, count))
    if len(candidates) < count and candidates.exp().sum() < top_p * scaled.exp().sum():
        return tuple(scaled.sort(descending=True, stable=True))  # type: ignore[return-value]
    return candidates, ids

"""Two plans of a model over the same texts, token by token: how far apart they are, and where they first part.

Enters: a model, two plans, texts as token ids. Leaves: a Comparison. The second plan is held against the first. Logits
are held a step at a time, so that a text may be of any length: it is read in windows that the model holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.errors import LogitsError, ModelError
from kernelmux.models.tokenizer import SpelledIds
from kernelmux.plan.plan import Plan
from kernelmux.run.divergence import logits_of_both, nats_by_row
from kernelmux.run.model import Model
from kernelmux.run.replaced import Replaced

if TYPE_CHECKING:
    import torch

CONTINUED = 16
"""Tokens of both plans' own that are told where they first part."""
SURE = 1.96
"""Standard errors to either side of a mean within which it lies 19 times of 20 (normal distribution)."""


@dataclass(frozen=True)
class Perplexity:
    """e to the mean surprise of a text's tokens, in nats, with the ends of its interval of 95 %; NaN of no token."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Parting:
    """The first position of a text after which the plans hold different tokens for the likeliest."""

    text: int
    position: int
    """In the text, counted from 0."""
    divergence: float
    """Nats."""
    margin: float
    """How far the first plan's likeliest logit is above the one that the second plan takes."""
    before: str
    """The text up to it."""
    continued: tuple[str, str]
    """What each plan says next, a few tokens."""


@dataclass(frozen=True)
class Comparison:
    """How the second plan's next tokens are from the first one's."""

    tokens: int
    divergence: float
    """Kullback-Leibler of the second from the first, nats a token."""
    worst: tuple[int, int, float]
    """The text, the position and the nats of the largest divergence of a token; a NaN is larger than any."""
    agreement: float
    """Of all tokens the share after which both hold the same one for the likeliest."""
    perplexity: tuple[Perplexity, Perplexity]
    """Of each plan."""
    parting: Parting | None
    """None where they agree everywhere."""
    replaced: tuple[Replaced, ...] = ()
    """Kernels that raised and gave way to others, which were compared in their place."""


def compare(
    model: Model, first: Plan, second: Plan, texts: Sequence[Sequence[int]], rows: int | None = None
) -> Comparison:
    """Holds `second` against `first` over all texts; `rows` tokens are fed to it at a time, as many as it takes unless
    told. ModelError where a text has no tokens.
    """
    import torch

    if not texts or not all(texts):
        raise ModelError("a comparison is taken over texts of one token or more")
    nats: list[torch.Tensor] = []
    surprises: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    agreeing, places, parted, replaced = 0, list[tuple[int, int]](), None, set[Replaced]()
    for number, start, window in _windows(texts, model.source.shape.context):
        at = start
        for wanted, found in logits_of_both(model, second, first, window, rows, replaced):
            found = found.to(wanted.device)
            differing = wanted.argmax(-1) != found.argmax(-1)
            each = nats_by_row(wanted, found).cpu()
            if parted is None and bool(differing.any()):
                row = int(differing.int().argmax())
                margin = float(wanted[row].max() - wanted[row, found[row].argmax()])
                parted = (
                    number,
                    at + row,
                    float(each[row]),
                    margin,
                    (int(wanted[row].argmax()), int(found[row].argmax())),
                )
            for into, logits in zip(surprises, (wanted, found), strict=True):
                into.append(_surprise(logits, window[at - start + 1 : at - start + 1 + len(logits)]))
            nats.append(each)
            places += [(number, at + row) for row in range(len(each))]
            agreeing += len(each) - int(differing.sum())
            at += len(each)
    by_token = torch.cat(nats)
    # A NaN counts as more than anything, and is told as what it is.
    worst = int(by_token.nan_to_num(nan=math.inf).argmax())
    return Comparison(
        tokens=len(by_token),
        divergence=float(by_token.mean()),
        worst=(*places[worst], float(by_token[worst])),
        agreement=agreeing / len(by_token),
        perplexity=(_perplexity(surprises[0]), _perplexity(surprises[1])),
        parting=None if parted is None else _parting(model, (first, second), texts, *parted),
        replaced=tuple(sorted(replaced, key=str)),
    )


def _windows(texts: Iterable[Sequence[int]], context: int) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Each text's number, and as much of it as the model holds at a time, with where that begins."""
    for number, ids in enumerate(texts):
        for start in range(0, len(ids), context):
            yield number, start, ids[start : start + context]


def _surprise(logits: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
    """Of rows that a token follows, the nats by which it surprises, float64."""
    import torch

    taken = torch.tensor(list(following), dtype=torch.int64, device=logits.device)
    rows = logits[: len(taken)].double()
    return (rows.logsumexp(-1) - rows.gather(1, taken.unsqueeze(1)).squeeze(1)).cpu()


def _perplexity(parts: Sequence[torch.Tensor]) -> Perplexity:
    import torch

    surprises = torch.cat(list(parts))
    if not len(surprises):
        return Perplexity(math.nan, math.nan, math.nan)
    mean = float(surprises.mean())
    error = SURE * float(surprises.std()) / math.sqrt(len(surprises)) if len(surprises) > 1 else math.inf
    return Perplexity(_exp(mean), _exp(mean - error), _exp(mean + error))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _parting(
    model: Model,
    plans: tuple[Plan, Plan],
    texts: Sequence[Sequence[int]],
    number: int,
    position: int,
    divergence: float,
    margin: float,
    tokens: tuple[int, int],
) -> Parting:
    context = model.source.shape.context
    start = position // context * context
    before = texts[number][start : position + 1]
    one, other = (_continued(model, plan, before, token) for plan, token in zip(plans, tokens, strict=True))
    return Parting(number, position, divergence, margin, written(model, before), (one, other))


def _continued(model: Model, plan: Plan, before: Sequence[int], token: int) -> str:
    """The text of a plan's token and of the likeliest that follow it, as far as the model holds them."""
    taken, count = [token], min(CONTINUED, model.source.shape.context - len(before))
    if count > 1:
        session = model.session(plan, len(before) + count)
        sequence = session.open()
        session.feed(sequence, before)
        # Where its logits are no numbers, what it said until then is told.
        with suppress(LogitsError):
            taken += (ids[0] for ids in session.decode([sequence], [token], count - 1))
    return written(model, taken)


def written(model: Model, ids: Sequence[int]) -> str:
    """The text of tokens; their ids where the model has no tokenizer that is known."""
    try:
        return model.source.tokenizer.decode(ids)
    except ModelError:
        return SpelledIds(frozenset()).decode(ids)

"""Which token is drawn from the nucleus: one that is kept among random ones, or one of all, sorted.

Enters: logits [rows, vocabulary], settings of each row, random numbers. Leaves: ids [rows, 1]. Each algorithm stands
here twice, with the same ids but for rounding: for a graph, in which nothing waits for the host and no shape depends on
a number, and for a host, row by row, where one look mostly saves the rest. Which algorithm a row is drawn by is decided
by its own settings, so that its ids do not depend on who else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kernelmux.run.sampling import DRAWS, Sampling

if TYPE_CHECKING:
    import torch

LEAST_TOP_P = 0.75
"""From here on DRAWS candidates all fail once in 4e9 tokens."""
CANDIDATES = 1024
"""On a host so many of the likeliest are sorted, unless these do not reach `top_p`, or what is drawn."""
BLOCK = 256
"""Numbers of a row that are reduced or summed by themselves first: torch does each with one block of threads."""
AT_ONCE = 2**25
"""Bytes of weights that are held against candidates at once, unless one of each row takes more."""
COLDEST, MOST_PENALTY = 1e-250, 1e9
"""Beyond these nothing is drawn otherwise, and short of them float64 and float32 hold all that comes of them."""
TINY = 1e-40
"""Less than what two float64 sums near 1 may differ by."""


class Way(NamedTuple):
    """What drawing a batch takes: each of these where one of its rows does."""

    rejection: bool
    sorting: bool
    top_p: bool
    min_p: bool
    penalty: bool

    @staticmethod
    def of(samplings: Sequence[Sampling]) -> Way | None:
        """None where each just takes the likeliest."""
        if all(each.greedy for each in samplings):
            return None
        warm = [each for each in samplings if each.temperature]
        return Way(
            rejection=any(by_rejection(each) for each in samplings),
            sorting=not all(by_rejection(each) for each in samplings),
            top_p=any(each.top_p < 1 for each in warm),
            min_p=any(each.min_p > 0 for each in warm),
            penalty=any(each.repetition_penalty != 1 for each in samplings),
        )


def by_rejection(sampling: Sampling) -> bool:
    """Whether a sequence is drawn by rejection, else sorted: without `top_k`, and where most candidates are kept."""
    return sampling.temperature == 0 or (sampling.top_k == 0 and sampling.top_p >= LEAST_TOP_P)


class Rows(NamedTuple):
    """How each row is drawn: tensors [rows, 1], in float64 but for `last` (int64), `penalty` (float32) and a bool."""

    cold: torch.Tensor
    """The temperature below 0: as it stands in a sum, one launch less."""
    last: torch.Tensor
    """The place of the least likely that `top_k` keeps, from 0."""
    rejection: torch.Tensor
    """Whether it is drawn by rejection."""
    top_p: torch.Tensor | None
    least: torch.Tensor | None
    """The least exponent, of a scaled logit less the likeliest one, that `min_p` keeps."""
    penalty: torch.Tensor | None

    @staticmethod
    def of(samplings: Sequence[Sampling], vocab: int) -> Rows:
        """On the host."""
        import torch

        columns = (
            [-max(each.temperature, COLDEST) for each in samplings],
            [min(each.top_k or vocab, vocab) - 1 for each in samplings],
            [by_rejection(each) for each in samplings],
            [each.top_p for each in samplings],
            [math.log(each.min_p) if each.min_p else -math.inf for each in samplings],
            [min(max(each.repetition_penalty, 1 / MOST_PENALTY), MOST_PENALTY) for each in samplings],
        )
        kinds = (torch.float64, torch.int64, torch.bool, torch.float64, torch.float64, torch.float32)
        return Rows(*(torch.tensor(each, dtype=kind)[:, None] for each, kind in zip(columns, kinds, strict=True)))

    def to(self, device: torch.device | str) -> Rows:
        """The same there."""
        return Rows._make(None if column is None else column.to(device) for column in self)

    def some(self, rows: slice) -> Rows:
        """Some of the rows, in the same memory."""
        return Rows._make(None if column is None else column[rows] for column in self)

    def write(self, rows: Rows) -> None:
        """Makes the first rows these, of whatever device, in the same memory."""
        for buffer, values in zip(self, rows, strict=True):
            if buffer is not None and values is not None:
                buffer[: len(values)].copy_(values)

    def used(self, way: Way) -> Rows:
        """The same without what no row uses."""
        return self._replace(
            top_p=self.top_p if way.top_p else None,
            least=self.least if way.min_p else None,
            penalty=self.penalty if way.penalty else None,
        )


def draw_in_graph(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor, way: Way) -> torch.Tensor:
    """Ids [rows, 1] by random numbers [rows, DRAWS]; of a mixed batch each row gets its own algorithm's."""
    import torch

    if not way.sorting:
        return draw_by_rejection(logits, rows, uniforms)
    if not way.rejection:
        return draw_sorted(logits, rows, uniforms)
    sorted_ids = draw_sorted(logits, rows, uniforms)
    return torch.where(rows.rejection, draw_by_rejection(logits, rows, uniforms), sorted_ids)


def draw_on_host(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """The same ids, row by row."""
    import torch

    found = []
    for row in (slice(index, index + 1) for index in range(len(logits))):
        draw = _draw_one_by_one if rows.rejection[row] else _draw_of_likeliest
        found.append(draw(logits[row], rows.some(row), uniforms[row]))
    return torch.cat(found)


# By rejection.


def draw_by_rejection(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids [rows, 1]: of DRAWS candidates, each drawn from all, the first one that is kept.

    It has the distribution of what is kept, renormalised. A token is kept while all that are likelier have less than
    `top_p` of the whole weight, that of what `min_p` cuts included; so all that tie with the least likely one are.
    Where none of the candidates is kept, with a probability of at most (1 - `top_p`) ** DRAWS, it is the likeliest of
    them. What `min_p` cuts is no candidate.
    """
    import torch

    last = logits.shape[1] - 1
    logits = _padded(logits)
    if rows.top_p is None:
        return _candidates(logits, rows, uniforms[:, :1], last)[0]
    ids, weights, whole = _candidates(logits, rows, uniforms, last)
    above = _weight_above(logits, weights, logits.gather(1, ids))
    # All that are kept become equal, and of equal ones the first is taken.
    excess = torch.addcmul(above, rows.top_p, whole, value=-1).clamp_(min=-TINY)
    return ids.gather(1, excess.argmin(dim=1, keepdim=True))


def _draw_one_by_one(logits: torch.Tensor, row: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    last = logits.shape[1] - 1
    logits = _padded(logits)
    ids, weights, whole = _candidates(logits, row, uniforms, last)
    if row.top_p is None or row.top_p == 1:
        return ids[:, :1]
    likely, bound = logits.gather(1, ids), row.top_p * whole
    for place in (slice(index, index + 1) for index in range(DRAWS)):
        if _weight_above(logits, weights, likely[:, place]) < bound:
            return ids[:, place]
    return ids.gather(1, likely.argmax(dim=1, keepdim=True))


def _candidates(
    logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor, last: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids drawn from all that `min_p` keeps, like `uniforms`; the weights of these, else 0; the weight of all."""
    import torch

    exponents = _exponents(logits, highest(logits)[:, None], rows)
    far = None if rows.least is None else exponents < rows.least
    weights, whole = exponents.exp_(), None
    if far is not None:
        whole = None if rows.top_p is None else _in_blocks(weights).sum(dim=2).sum(dim=1, keepdim=True)
        weights.masked_fill_(far, 0)
    sums = _running_sums(weights)
    # A product may round up to the sum of all, and logits may be NaN.
    ids = torch.searchsorted(sums, sums[:, -1:] * uniforms, right=True).clamp_(max=last)
    return ids, weights, sums[:, -1:] if whole is None else whole


def _weight_above(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Of each logit of `likely` [rows, candidates] the weight of all tokens that are likelier.

    Logits are compared, for they are narrower than weights, and as exact.
    """
    import torch

    sums, few = [], max(AT_ONCE // weights.nbytes, 1)
    for first in range(0, likely.shape[1], few):
        likelier = logits[:, None] > likely[:, first : first + few, None]
        blocks = torch.where(likelier, weights[:, None], 0).view(*likelier.shape[:2], -1, BLOCK)
        sums.append(blocks.sum(dim=3).sum(dim=2))
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


# Sorted.


def draw_sorted(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids [rows, 1] by the first of the random numbers, and what is kept likeliest first; of ties the lower ids."""
    return _drawn(*logits.sort(dim=1, descending=True, stable=True), rows, uniforms)


def _draw_of_likeliest(logits: torch.Tensor, row: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """The same where a sort of the whole vocabulary takes the longest of all."""
    count, top_k = logits.shape[1], int(row.last) + 1
    values, ids = _likeliest(logits, CANDIDATES if top_k == count else max(CANDIDATES, top_k))
    held = values.shape[1]
    if top_k <= held:
        return _drawn(values, ids, row, uniforms)
    whole = _exponents(logits, values[:, :1], row).exp_().sum(dim=1, keepdim=True)
    sums, near = _weigh(values, row)
    last = _last_kept(sums, near, whole, row)
    # What ends the candidates may not be the end of what is kept.
    if int(last) < held - 1:
        return ids.gather(1, _place(sums, last, uniforms))
    return draw_sorted(logits, row, uniforms)


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row what a stable sort of all would begin with, `count` at least, and their ids; ties are whole."""
    if count < logits.shape[1]:
        bound = logits.topk(count, sorted=False).values.min()
        (ids,) = (logits[0] >= bound).nonzero(as_tuple=True)
        if len(ids) >= count:
            values, order = logits[:, ids].sort(dim=1, descending=True, stable=True)
            return values, ids[order]
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values, ids


def _drawn(values: torch.Tensor, ids: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids [rows, 1] out of sorted ones, beyond which none is kept."""
    sums, near = _weigh(values, rows)
    last = _last_kept(sums, near, sums.gather(1, rows.last), rows)
    return ids.gather(1, _place(sums, last, uniforms))


def _weigh(values: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of sorted logits the running sums of their weights, that of the likeliest 1; and the last place by `min_p`."""
    import torch

    values = _padded(values)
    exponents = _exponents(values, values[:, :1], rows)
    near = None if rows.least is None else torch.searchsorted(-exponents, -rows.least, right=True) - 1
    return _running_sums(exponents.exp_()), near


def _last_kept(sums: torch.Tensor, near: torch.Tensor | None, whole: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The last place that is kept: a token is while those before it have not reached `top_p`, the first always."""
    import torch

    last = rows.last
    if rows.top_p is not None:
        last = torch.minimum(last, torch.searchsorted(sums, whole * rows.top_p))
    return last if near is None else torch.minimum(last, near)


def _place(sums: torch.Tensor, last: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first place whose sum exceeds the random share of what is kept; any place where logits are NaN."""
    import torch

    share = sums.gather(1, last) * uniforms[:, :1]
    return torch.minimum(torch.searchsorted(sums, share, right=True), last)


# For both.


def highest(logits: torch.Tensor) -> torch.Tensor:
    """Each row's highest logit [rows], by blocks: at once it takes three times as long on a card."""
    return _in_blocks(_padded(logits)).amax(dim=2).amax(dim=1)


def _padded(logits: torch.Tensor) -> torch.Tensor:
    """Whole blocks a row: what is added has no weight."""
    import torch

    missing = -logits.shape[1] % BLOCK
    return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing else logits


def _in_blocks(padded: torch.Tensor) -> torch.Tensor:
    return padded.view(len(padded), -1, BLOCK)


def _exponents(logits: torch.Tensor, likeliest: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Scaled logits less the likeliest one, in float64: in one pass, and 0 there without rounding."""
    import torch

    return torch.addcdiv(likeliest / rows.cold, logits, rows.cold, value=-1)


def _running_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums of padded weights from a row's first on."""
    sums = _in_blocks(weights).cumsum(dim=2)
    # Not `+=`, which writes its result once more.
    sums[:, 1:].add_(sums[:, :-1, -1].cumsum(dim=1)[:, :, None])
    return sums.view_as(weights)

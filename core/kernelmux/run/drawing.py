"""Token ids drawn from logits, where they lie: the whole vocabulary sorted once, or on a host only its likeliest.

Enters: logits [rows, vocabulary], samplers. Leaves: ids [rows]. What a row is drawn by lies in buffers at addresses
that do not change, so that one captured graph serves all settings; sorted, nothing waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kernelmux.contract.device import Device
from kernelmux.run.sampling import Sampler, Sampling

if TYPE_CHECKING:
    import torch

CANDIDATES = 1024
"""On a host so many of the likeliest are sorted, unless these do not reach `top_p`, or what is drawn."""
BLOCK = 512
"""Weights that are summed in a row of their own where there are several rows: torch scans each by one block."""
NUMBERS_AHEAD = 256
"""Steps whose random numbers are made at once."""
COLDEST, MOST_PENALTY = 1e-30, 1e9
"""Beyond these nothing is drawn otherwise, and short of them float64 and float32 hold all that comes of them."""


class Rows(NamedTuple):
    """How each row is drawn: tensors [rows, 1], in float64 but for `last` (int64) and `penalty` (float32)."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    last: torch.Tensor
    """The place of the least likely that `top_k` keeps, from 0."""
    reach: torch.Tensor
    """How far below the likeliest a scaled logit may be, by `min_p`."""
    penalty: torch.Tensor
    uniform: torch.Tensor
    """The random number, from 0 to below 1."""

    @staticmethod
    def of(samplers: Sequence[Sampler], vocab: int) -> Rows:
        """On the host, with the number of each one's next token. Who takes the likeliest draws from that one."""
        import torch

        settings = [sampler.sampling for sampler in samplers]
        cold = [each.temperature == 0 for each in settings]
        columns = (
            [1.0 if first else max(each.temperature, COLDEST) for each, first in zip(settings, cold, strict=True)],
            [each.top_p for each in settings],
            [0 if first else min(each.top_k or vocab, vocab) - 1 for each, first in zip(settings, cold, strict=True)],
            [-math.log(each.min_p) if each.min_p else math.inf for each in settings],
            [min(max(each.repetition_penalty, 1 / MOST_PENALTY), MOST_PENALTY) for each in settings],
            [sampler.uniforms(sampler.count, 1)[0] for sampler in samplers],
        )
        kinds = (torch.float64, torch.float64, torch.int64, torch.float64, torch.float32, torch.float64)
        return Rows(*(torch.tensor(each, dtype=kind)[:, None] for each, kind in zip(columns, kinds, strict=True)))

    def to(self, device: torch.device | str) -> Rows:
        """The same there."""
        return Rows(*(column.to(device) for column in self))


class Drawing:
    """Up to `rows` rows of a batch at a time, drawn step by step by the samplers that it was started with.

    A row that has none, as padding, gets a token all the same, and spoils nobody's.
    """

    def __init__(self, rows: int, vocab: int, device: Device) -> None:
        import torch

        self._pinned = not device.platform.host_memory
        self._draw = draw_sorted if device.platform.captures else draw_of_likeliest
        # Who has no sampler gets the likeliest.
        self._rows = Rows.of([Sampling().sampler()] * rows, vocab).to(device.torch)
        self._seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device.torch)
        self._samplers: Sequence[Sampler] = ()
        self._begun: list[int] = []
        """How many tokens each sampler had drawn when this was started."""
        self._sent = 0
        self._rehearsed: set[int] = set()

    def start(self, samplers: Sequence[Sampler]) -> None:
        """From here on the first rows are drawn by these, on torch's current stream."""
        self._samplers, self._begun, self._sent = samplers, [sampler.count for sampler in samplers], 0
        for buffer, values in zip(self._rows, Rows.of(samplers, self._seen.shape[1]), strict=True):
            buffer[: len(samplers)] = values.to(buffer.device)
        for row, sampler in zip(self._seen, samplers, strict=False):
            if sampler.sampling.repetition_penalty != 1:
                _mark_before(row.zero_(), sampler)

    def send(self) -> None:
        """Sends the next step's random numbers, on torch's current stream, on which the step follows."""
        at = self._sent % NUMBERS_AHEAD
        if at == 0:
            self._ahead = self._numbers()
        self._rows.uniform[: len(self._samplers)].copy_(self._ahead[at], non_blocking=True)
        self._sent += 1

    def _numbers(self) -> torch.Tensor:
        """[NUMBERS_AHEAD, rows, 1], in pinned memory where the device's is another: torch keeps it till it was read."""
        import torch

        pairs = zip(self._samplers, self._begun, strict=True)
        columns = [sampler.uniforms(begun + self._sent, NUMBERS_AHEAD) for sampler, begun in pairs]
        numbers = torch.tensor(columns, dtype=torch.float64).T.contiguous()[:, :, None]
        return numbers.pin_memory() if self._pinned else numbers

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """A token id [rows] of each row of logits [rows, vocabulary], which counts as seen from then on."""
        rows, seen = Rows(*(buffer[: len(logits)] for buffer in self._rows)), self._seen[: len(logits)]
        ids = self._draw(_penalised(logits, rows.penalty, seen), rows)
        seen.scatter_(1, ids, True)
        return ids[:, 0]

    def rehearse(self, rows: int) -> None:
        """Draws once, before it is started: a kernel's first launch loads it, which a capture forbids."""
        if rows not in self._rehearsed:
            self._rehearsed.add(rows)
            self.draw(self._seen[:rows].float())

    def take(self, ids: Sequence[int]) -> None:
        """Tells the samplers what was drawn for them."""
        for sampler, token in zip(self._samplers, ids, strict=True):
            sampler.take(token)


def draw_next(sampler: Sampler, logits: torch.Tensor) -> int:
    """A sequence's next token from logits [vocabulary], taken by its sampler."""
    import torch

    if sampler.sampling.greedy:
        ids = logits.argmax()
    else:
        rows = Rows.of([sampler], len(logits)).to(logits.device)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        _mark_before(seen, sampler)
        ids = draw_of_likeliest(_penalised(logits[None], rows.penalty, seen), rows)
    token = int(ids)
    sampler.take(token)
    return token


def _mark_before(seen: torch.Tensor, sampler: Sampler) -> None:
    """Marks the tokens that a sampler knows of in its row [vocabulary]."""
    import torch

    seen.index_fill_(0, torch.tensor(list(sampler.seen), dtype=torch.int64).to(seen.device), True)


def _penalised(logits: torch.Tensor, penalty: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """In float32; what was seen divided by the row's penalty above 0, else multiplied."""
    import torch

    logits = logits.float()
    # Of all that chooses by sign, what takes a single launch; its channels are the rows.
    lower = torch.nn.functional.prelu(logits[None], penalty[:, 0].square())[0]
    return torch.where(seen, lower / penalty, logits)


def draw_sorted(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Ids [rows, 1] from logits [rows, vocabulary]: the host waits for nothing, and no shape depends on a number."""
    return _drawn(*logits.sort(dim=1, descending=True, stable=True), rows)


def draw_of_likeliest(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The same ids, where a sort of the whole vocabulary takes the longest of all."""
    import torch

    each = [slice(row, row + 1) for row in range(len(logits))]
    return torch.cat([_draw_of_likeliest(logits[row], Rows(*(column[row] for column in rows))) for row in each])


def _draw_of_likeliest(logits: torch.Tensor, row: Rows) -> torch.Tensor:
    count, top_k = logits.shape[1], int(row.last) + 1
    values, ids = _likeliest(logits, CANDIDATES if top_k == count else max(CANDIDATES, top_k))
    held = values.shape[1]
    if top_k <= held:
        return _drawn(values, ids, row)
    whole = _below(logits, values[:, :1], row).neg_().exp_().sum(dim=1, keepdim=True)
    sums, near = _weigh(values, row)
    last = _last_kept(sums, near, whole, row)
    if int(last) < held - 1:
        return ids.gather(1, _place(sums, last, sums.gather(1, last), row))
    # What ends the candidates may not be the end of what is kept, unless everything is.
    if row.top_p == 1 and row.reach == math.inf and whole * row.uniform < sums[:, -1:]:
        return ids.gather(1, _place(sums, last, whole, row))
    return draw_sorted(logits, row)


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


def _drawn(values: torch.Tensor, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Ids [rows, 1] out of sorted ones, beyond which none is kept."""
    sums, near = _weigh(values, rows)
    last = _last_kept(sums, near, sums.gather(1, rows.last), rows)
    return ids.gather(1, _place(sums, last, sums.gather(1, last), rows))


def _weigh(values: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sorted logits the running sums of their weights, that of the likeliest 1; and the last place by `min_p`."""
    import torch

    below = _below(values, values[:, :1], rows)
    near = torch.searchsorted(below, rows.reach, right=True) - 1
    return _running_sums(below.neg_()), near


def _below(logits: torch.Tensor, likeliest: torch.Tensor, rows: Rows) -> torch.Tensor:
    """How far scaled logits lie below the likeliest one, in float64: in one pass, and 0 there without rounding."""
    import torch

    return torch.addcdiv(likeliest / rows.temperature, logits, rows.temperature, value=-1)


def _running_sums(exponents: torch.Tensor) -> torch.Tensor:
    """Sums of exp(exponents) from a row's first on; there may be more behind, all like the last. Overwrites them."""
    import torch

    rows, count = exponents.shape
    if rows == 1:
        return exponents.exp_().cumsum_(dim=1)
    sums = exponents.new_zeros(rows, -(-count // BLOCK), BLOCK)
    torch.exp(exponents, out=sums.view(rows, -1)[:, :count])
    sums.cumsum_(dim=2)
    sums[:, 1:] += sums[:, :-1, -1].cumsum(dim=1)[:, :, None]
    return sums.view(rows, -1)


def _last_kept(sums: torch.Tensor, near: torch.Tensor, whole: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The last place that is kept: a token is while those before it have not reached `top_p`, the first always."""
    import torch

    return torch.minimum(torch.searchsorted(sums, whole * rows.top_p), near)


def _place(sums: torch.Tensor, last: torch.Tensor, kept: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The first place whose sum exceeds the random share of what is kept; any place where logits are NaN."""
    import torch

    return torch.minimum(torch.searchsorted(sums, kept * rows.uniform, right=True), last)

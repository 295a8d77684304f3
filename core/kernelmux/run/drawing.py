"""Token ids drawn from logits, where they lie, step by step.

Enters: logits [rows, vocabulary], samplers. Leaves: ids [rows]. What a row is drawn by lies in buffers at addresses
that do not change, random numbers of many steps among them, so that a captured graph serves all settings that take the
same way, and needs nothing from the host between two replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelmux.contract.device import Device
from kernelmux.run.nucleus import Rows, Way, draw_in_graph, draw_on_host
from kernelmux.run.sampling import DRAWS, Sampler, Sampling

if TYPE_CHECKING:
    import torch

NUMBERS_AHEAD = 256
"""Steps whose random numbers are made, and sent, at once."""


class Drawing:
    """Up to `rows` rows of a batch at a time, drawn step by step by the samplers that it was started with.

    A row that has none, as padding, gets a token all the same, and spoils nobody's.
    """

    def __init__(self, rows: int, vocab: int, device: Device) -> None:
        import torch

        self._pinned = not device.platform.host_memory
        self._in_graph = device.platform.captures
        # Who has no sampler gets the likeliest.
        self._rows = Rows.of([Sampling()] * rows, vocab).to(device.torch)
        self._seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device.torch)
        self._numbers = torch.zeros(rows, NUMBERS_AHEAD, DRAWS, dtype=torch.float64, device=device.torch)
        self._step = torch.zeros(1, dtype=torch.int64, device=device.torch)
        """Whose numbers are next: drawing itself moves it on."""
        self._samplers: Sequence[Sampler] = ()
        self._begun: list[int] = []
        """How many tokens each sampler had drawn when this was started."""
        self._sent = 0
        self._rehearsed: set[tuple[int, Way]] = set()

    def start(self, samplers: Sequence[Sampler]) -> None:
        """From here on the first rows are drawn by these, on torch's current stream."""
        self._samplers, self._begun, self._sent = samplers, [sampler.count for sampler in samplers], 0
        self._rows.write(Rows.of([sampler.sampling for sampler in samplers], self._seen.shape[1]))
        for row, sampler in zip(self._seen, samplers, strict=False):
            if sampler.sampling.repetition_penalty != 1:
                _mark_before(row.zero_(), sampler)

    def send(self) -> None:
        """To be called before each step: every so often sends random numbers, on torch's current stream."""
        if self._sent % NUMBERS_AHEAD == 0:
            self._numbers[: len(self._samplers)].copy_(self._made_ahead(), non_blocking=True)
            self._step.zero_()
        self._sent += 1

    def _made_ahead(self) -> torch.Tensor:
        """The next steps', in pinned memory where the device's is another: torch keeps it till it was read."""
        import torch

        pairs = zip(self._samplers, self._begun, strict=True)
        numbers = torch.stack([sampler.uniforms(begun + self._sent, NUMBERS_AHEAD) for sampler, begun in pairs])
        return numbers.pin_memory() if self._pinned else numbers

    def draw(self, logits: torch.Tensor, way: Way) -> torch.Tensor:
        """A token id [rows] of each row of logits [rows, vocabulary], which counts as seen from then on.

        `way` is that of the samplers' settings, or more.
        """
        some = slice(len(logits))
        rows, seen = self._rows.some(some).used(way), self._seen[some]
        uniforms = self._numbers[some].index_select(1, self._step)[:, 0]
        self._step.add_(1)
        logits = logits.float()
        if rows.penalty is not None:
            logits = _penalised(logits, rows.penalty, seen)
        ids = draw_in_graph(logits, rows, uniforms, way) if self._in_graph else draw_on_host(logits, rows, uniforms)
        if rows.penalty is not None:
            seen.scatter_(1, ids, True)
        return ids[:, 0]

    def rehearse(self, rows: int, way: Way) -> None:
        """Draws once, before it is started: a kernel's first launch loads it, which a capture forbids."""
        if (rows, way) not in self._rehearsed:
            self._rehearsed.add((rows, way))
            self._step.zero_()
            self.draw(self._seen[:rows].float(), way)

    def take(self, ids: Sequence[int]) -> None:
        """Tells the samplers what was drawn for them."""
        for sampler, token in zip(self._samplers, ids, strict=True):
            sampler.take(token)


def draw_next(sampler: Sampler, logits: torch.Tensor) -> int:
    """A sequence's next token from logits [vocabulary], taken by its sampler."""
    import torch

    way = Way.of([sampler.sampling])
    if way is None:
        ids = logits.argmax()
    else:
        rows = Rows.of([sampler.sampling], len(logits)).used(way).to(logits.device)
        logits = logits[None].float()
        if rows.penalty is not None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            _mark_before(seen[0], sampler)
            logits = _penalised(logits, rows.penalty, seen)
        ids = draw_on_host(logits, rows, sampler.uniforms(sampler.count, 1).to(logits.device))
    token = int(ids)
    sampler.take(token)
    return token


def _mark_before(seen: torch.Tensor, sampler: Sampler) -> None:
    """Marks the tokens that a sampler knows of in its row [vocabulary]."""
    import torch

    seen.index_fill_(0, torch.tensor(list(sampler.seen), dtype=torch.int64).to(seen.device), True)


def _penalised(logits: torch.Tensor, penalty: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """What was seen divided by the row's penalty above 0, else multiplied; in float32."""
    import torch

    # Of all that chooses by sign, what takes a single launch; its channels are the rows.
    lower = torch.nn.functional.prelu(logits[None], penalty[:, 0].square())[0]
    return torch.where(seen, lower / penalty, logits)

"""Sequences over a paged cache: step state filled in, the plan walked, tokens sampled.

Enters: a plan, a model's weights, token ids. Leaves: logits, and sampled ids one by one. Knows nothing of text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernelmux.errors import KernelmuxError, LaunchError
from kernelmux.formats import lookup
from kernelmux.memory import PackedWeights
from kernelmux.plan import Plan
from kernelmux.walker import Walk, Walker

if TYPE_CHECKING:
    import torch

PAGE_SIZE = 16
"""Tokens a page of the cache."""


class CapacityError(KernelmuxError):
    """The cache or the batch has no room for what was asked."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence's place in the cache: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Feed:
    """What a sequence is given in one step: its next token ids, and whether every row's logits are wanted."""

    sequence: CachedSequence
    ids: Sequence[int]
    all_logits: bool = False


class Session:
    """A plan at work: one paged cache, any number of sequences in it, steps over batches of them.

    `tokens` is the cache's capacity over all sequences, `sequences` the largest batch.
    """

    def __init__(self, plan: Plan, packed: PackedWeights, tokens: int, sequences: int = 1) -> None:
        import torch

        # Each sequence may waste the rest of its last page.
        pages = -(-tokens // PAGE_SIZE) + sequences - 1
        self._free = list(range(pages))
        self._batch = sequences
        extents = {
            "m": plan.max_rows,
            "outs": plan.max_rows,
            "seqs": sequences,
            "seqs+1": sequences + 1,
            "width": pages,
            "pages": pages,
            "page_size": PAGE_SIZE,
        }
        self._leaves: dict[str, torch.Tensor] = {}
        for leaf in plan.graph.leaves:
            if leaf.role != "weight":
                value = leaf.outputs[0].resolve(extents)
                dtype = lookup(value.format).dtype
                self._leaves[value.name] = torch.zeros(value.extents, dtype=dtype, device=plan.device.torch)
        self.walker = Walker(plan, packed, self._leaves)
        self._logits = plan.graph.outputs[0]

    def prepare(self) -> Iterator[str]:
        """Packs every weight that the plan needs, yielding each node's name; without it, the first steps do it."""
        while True:
            try:
                yield from self.walker.prepare()
                return
            except LaunchError as error:
                self.walker = self.walker.without(error)

    def open(self) -> CachedSequence:
        """A new, empty sequence."""
        return CachedSequence()

    def close(self, sequence: CachedSequence) -> None:
        """Gives a sequence's pages back."""
        self._free = sorted([*self._free, *sequence.pages])
        sequence.pages, sequence.length = [], 0

    def step(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Runs one step over several sequences, and returns logits [rows wanted, vocabulary], in the order of `feeds`.

        Of each feed the last row's logits, or all rows' where it says so. The next step overwrites what is returned.
        CapacityError where rows, sequences or tokens are more than the session was made for; nothing has changed then.
        """
        m = sum(len(feed.ids) for feed in feeds)
        if len(feeds) > self._batch:
            raise CapacityError(f"a step of {len(feeds)} sequences, the session was made for {self._batch}")
        if not feeds or not all(feed.ids for feed in feeds):
            raise CapacityError("a step needs at least one sequence, and every sequence at least one token")
        if len({id(feed.sequence) for feed in feeds}) < len(feeds):
            raise CapacityError("a step feeds one sequence twice: join its tokens, or take two steps")
        vocab = self.walker.plan.graph.values[self._logits].shape[1]
        assert isinstance(vocab, int)
        if odd := [id for feed in feeds for id in feed.ids if not 0 <= id < vocab]:
            raise CapacityError(f"token id {odd[0]} is not in the vocabulary of {vocab}")
        if m > self.walker.plan.max_rows:
            raise CapacityError(
                f"a step of {m} tokens, the plan takes {self.walker.plan.max_rows}: feed fewer at a time"
            )
        self._reserve(feeds)
        outs = self._write_state(feeds)
        walk = self._walk(m=m, outs=outs, seqs=len(feeds))
        for feed in feeds:
            feed.sequence.length += len(feed.ids)
        logits: torch.Tensor = walk.outputs[self._logits]
        return logits

    def feed(self, sequence: CachedSequence, ids: Sequence[int], all_logits: bool = False) -> torch.Tensor:
        """Runs tokens in as many steps as the plan needs; returns a copy of the logits, of the last row or of all."""
        import torch

        if not ids:
            raise CapacityError("a step needs at least one sequence, and every sequence at least one token")
        chunk = self.walker.plan.max_rows
        parts = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        logits = [self.step([Feed(sequence, part, all_logits)]).clone() for part in parts]
        return torch.cat(logits) if all_logits else logits[-1]

    def _walk(self, **dims: int) -> Walk:
        """Walks once; where a kernel raises and the policy says `next`, again without it.

        A step may be run again: its state is unchanged, and what it has written to the cache is written over.
        """
        while True:
            try:
                walk = self.walker.bind(**dims)
                walk()
                return walk
            except LaunchError as error:
                self.walker = self.walker.without(error)

    def _reserve(self, feeds: Sequence[Feed]) -> None:
        """Deals pages for the new tokens."""
        needs = [-(-(f.sequence.length + len(f.ids)) // PAGE_SIZE) - len(f.sequence.pages) for f in feeds]
        if sum(needs) > len(self._free):
            raise CapacityError(
                f"the step needs {sum(needs)} more pages of {PAGE_SIZE} tokens, {len(self._free)} are free: "
                "close sequences, or make the session larger"
            )
        for feed, need in zip(feeds, needs, strict=True):
            feed.sequence.pages += self._free[:need]
            del self._free[:need]

    def _write_state(self, feeds: Sequence[Feed]) -> int:
        """Fills the step's buffers; returns how many rows' logits are wanted."""
        import torch

        ends = list(itertools.accumulate(len(feed.ids) for feed in feeds))
        positions = [range(f.sequence.length, f.sequence.length + len(f.ids)) for f in feeds]
        wanted = [
            row
            for feed, end in zip(feeds, ends, strict=True)
            for row in range(end - (len(feed.ids) if feed.all_logits else 1), end)
        ]
        rows = {
            "tokens": [token for feed in feeds for token in feed.ids],
            "positions": [position for span in positions for position in span],
            "slots": [
                feed.sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
                for feed, span in zip(feeds, positions, strict=True)
                for position in span
            ],
            "logit_rows": wanted,
            "query_start": [0, *ends],
            "kv_len": [span.stop for span in positions],
        }
        self._write(rows)
        table = self._leaves["block_table"]
        for row, feed in enumerate(feeds):
            pages = feed.sequence.pages
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return len(wanted)

    def _write(self, rows: Mapping[str, Sequence[int]]) -> None:
        import torch

        for name, values in rows.items():
            self._leaves[name][: len(values)] = torch.tensor(values, dtype=torch.int32)


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

    def __call__(self, logits: torch.Tensor) -> int:
        """A token id from logits [vocabulary]."""
        import torch

        sampling = self._sampling
        if sampling.temperature == 0:
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


def generate(
    session: Session, ids: Sequence[int], sampling: Sampling, end_ids: frozenset[int], max_tokens: int
) -> Iterator[int]:
    """Token ids after a prompt, up to and with an end token, at most `max_tokens`."""
    sampler = sampling.sampler()
    sequence = session.open()
    try:
        logits = session.feed(sequence, ids)
        for count in range(1, max_tokens + 1):
            token = sampler(logits[-1])
            yield token
            if token in end_ids or count == max_tokens:
                return
            logits = session.step([Feed(sequence, [token])])
    finally:
        session.close(sequence)

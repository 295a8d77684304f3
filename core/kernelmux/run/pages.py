"""The cache's pages: dealt to sequences as they grow, given back when they close.

Enters: a number of pages, and how many tokens each sequence is about to hold. Leaves: the pages of each, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kernelmux.errors import KernelmuxError
from kernelmux.graph.graph import PAGE_SIZE


class CapacityError(KernelmuxError):
    """The cache or the batch has no room for what was asked."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence's place in the cache: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    owner: Pages | None = field(default=None, repr=False)
    """Whose pages they are; None once it is closed."""

    def slot(self, position: int) -> int:
        """Where the token at a position lies in the cache."""
        return self.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE


class Pages:
    """The pages that no sequence has."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))

    def open(self) -> CachedSequence:
        """A new sequence, which has none yet."""
        return CachedSequence(owner=self)

    def check(self, sequences: Sequence[CachedSequence]) -> None:
        """CapacityError where one of these is closed, or was opened by another session: its pages are not from here."""
        for sequence in sequences:
            if sequence.owner is None:
                raise CapacityError("the sequence is closed: session.open() gives a new one")
            if sequence.owner is not self:
                raise CapacityError("the sequence is another session's: take one that this session's open() gave")

    def reserve(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        """Deals pages for `counts` new tokens of each sequence; CapacityError where too few are left."""
        needs = [
            max(-(-(sequence.length + count) // PAGE_SIZE) - len(sequence.pages), 0)
            for sequence, count in zip(sequences, counts, strict=True)
        ]
        if sum(needs) > len(self._free):
            raise CapacityError(
                f"the step needs {sum(needs)} more pages of {PAGE_SIZE} tokens, {len(self._free)} are free: "
                "close sequences, or make the session larger"
            )
        for sequence, need in zip(sequences, needs, strict=True):
            sequence.pages += self._free[:need]
            del self._free[:need]

    def give_back(self, sequence: CachedSequence) -> None:
        """Takes all pages of a sequence, which is empty and closed then; of a closed one there are none."""
        if sequence.owner is not None:
            self.check([sequence])
        self._free = sorted([*self._free, *sequence.pages])
        sequence.pages, sequence.length, sequence.owner = [], 0, None

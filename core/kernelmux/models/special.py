"""Finds a vocabulary's special tokens in a text, before what is left is split into words.

Enters: the spelling of each such token. Leaves: text and ids in turn. Where spellings overlap the longest wins,
wherever it stands, as in llama.cpp (`tokenizer_st_partition`); transformers takes the leftmost first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

BLANKS = " \t\n\v\f\r"
"""What is dropped after a token that strips."""


class SpecialTokens:
    """The tokens of `ids` by their spellings; what is blank after one of `stripping` is part of it."""

    def __init__(self, ids: Mapping[str, int], stripping: Collection[int] = ()) -> None:
        # The longest first, in bytes.
        self._ids = {spelled: (-len(spelled.encode()), token) for spelled, token in ids.items() if spelled}
        self._stripping = frozenset(stripping)
        lengths: dict[str, set[int]] = {}
        for spelled in self._ids:
            lengths.setdefault(spelled[0], set()).add(len(spelled))
        self._lengths = {first: sorted(found) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]") if lengths else None

    def __bool__(self) -> bool:
        return bool(self._ids)

    def written(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each token that is written in `text` begins and ends, also one over another."""
        return ((start, end) for _, start, end in self._written(text))

    def split(self, text: str) -> Iterator[str | int]:
        """The parts of `text` in order: ids of the tokens that are written in it, and what stands between them."""
        at = 0
        for start, end, token in self._found(text):
            if start > at:
                yield text[at:start]
            yield token
            at = end
        if at < len(text):
            yield text[at:]

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        """Where tokens begin and end, none over another, in order of the text."""
        written = sorted(self._written(text))
        taken: list[tuple[int, int, int]] = []
        covered = bytearray(len(text) if written else 0)
        for (_, token), start, end in written:
            # Nothing shorter was taken yet: what covers a part of it covers an end.
            if not (covered[start] or covered[end - 1]):
                covered[start:end] = b"\1" * (end - start)
                taken.append((start, end, token))
        return sorted((start, self._stripped(text, end, token), token) for start, end, token in taken)

    def _written(self, text: str) -> Iterator[tuple[tuple[int, int], int, int]]:
        """Every place where a token is spelled: the token, so that the longest is least, start and end."""
        if self._first is None:
            return
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths[match[0]]:
                if (token := self._ids.get(text[start : start + length])) and start + length <= len(text):
                    yield token, start, start + length

    def _stripped(self, text: str, end: int, token: int) -> int:
        if token in self._stripping:
            while end < len(text) and text[end] in BLANKS:
                end += 1
        return end

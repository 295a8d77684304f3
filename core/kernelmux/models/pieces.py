"""SentencePiece's tokenizers: BPE by scores, and unigram.

Enters: a checked vocabulary. Leaves: ids for a text without special tokens, whose spaces are U+2581. BPE merges here,
not by the `tokenizers` package, whose merges have ranks: scores may tie, and the leftmost pair is merged then. Both
take normal, user-defined and unused pieces only, as SentencePiece does (https://github.com/google/sentencepiece,
model_interface.cc): no text is merged to a control token.
"""

from __future__ import annotations

import heapq
import re
from functools import lru_cache

import tokenizers
from tokenizers.models import Unigram
from tokenizers.normalizers import Precompiled

from kernelmux.errors import ModelError
from kernelmux.models.byte_level import unwritable
from kernelmux.models.vocabulary import SpacePrefix, TokenKind, Vocabulary

SPACE = "\u2581"
PIECES = frozenset(map(int, (TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED)))
WORDS_KEPT = 1 << 16
"""Words whose ids are kept, for a text says most of its words often."""
_BEFORE_SPACE = re.compile(f"([^\0])(?={SPACE})")


def byte_of(token: str) -> int | None:
    """The byte that a token such as `<0x0A>` stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


class ScoredBPE:
    """Merges the neighbours that make the piece of the highest score, the leftmost first, until no two make one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._source = vocabulary.source
        rows = list(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        self._ids = {token: index for index, (token, kind) in enumerate(rows) if kind in PIECES and token}
        self._scores = vocabulary.scores
        self._bytes = {
            byte: index
            for index, (token, kind) in enumerate(rows)
            if kind == TokenKind.BYTE and (byte := byte_of(token)) is not None
        }
        self._space_prefix = vocabulary.space_prefix is not SpacePrefix.NONE
        # No merge reaches over a space after any other character: then words are merged alone, and kept.
        self._glued = set(_BEFORE_SPACE.findall("\0".join(self._ids)))
        self._word = lru_cache(WORDS_KEPT)(self._merged)

    def encode(self, text: str, begins: bool) -> list[int]:
        """The ids of `text`; a character without a piece is its bytes, ModelError where these have no token."""
        text = (" " + text if begins and self._space_prefix else text).replace(" ", SPACE)
        ids: list[int] = []
        begin = 0
        at = text.find(SPACE, 1)
        while at > 0:
            if text[at - 1] not in self._glued:
                ids.extend(self._word(text[begin:at]))
                begin = at
            at = text.find(SPACE, at + 1)
        if begin < len(text):
            ids.extend(self._word(text[begin:]))
        return ids

    def _merged(self, word: str) -> tuple[int, ...]:
        if (known := self._ids.get(word)) is not None and len(word) == 1:
            return (known,)
        parts = list(word)
        before = list(range(-1, len(parts) - 1))
        after = [*range(1, len(parts)), -1]
        ids, scores = self._ids, self._scores
        waiting: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (token := ids.get(made := parts[left] + parts[right])) is not None:
                heapq.heappush(waiting, (-scores[token], left, right, made))

        for left in range(len(parts) - 1):
            consider(left, left + 1)
        while waiting:
            _, left, right, made = heapq.heappop(waiting)
            # Either may have been merged since.
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != len(made):
                continue
            parts[left], parts[right] = made, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return tuple(token for part in parts if part for token in self._spelled(part))

    def _spelled(self, part: str) -> list[int]:
        if (token := self._ids.get(part)) is not None:
            return [token]
        data = part.encode()
        if missing := frozenset(data).difference(self._bytes):
            raise unwritable(self._source, missing)
        return [self._bytes[byte] for byte in data]


class UnigramPieces:
    """The segmentation of the highest sum of scores, by the `tokenizers` package; runs of the unknown are one token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.unk_id is None:
            found = "metadata 'tokenizer.ggml.unknown_token_id': is missing, and a unigram vocabulary needs it"
            raise ModelError(f"{vocabulary.source}: {found}", file=vocabulary.source)
        rows = zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True)
        # What is no piece keeps its place under a name that no text has: U+2581 is a space, and none stands before NUL.
        named = [
            (token, 0.0 if kind == TokenKind.USER_DEFINED else float(score)) if kind in PIECES and token else None
            for token, kind, score in rows
        ]
        least = min((score for _, score in filter(None, named)), default=0.0)
        pieces = [row or (f"\0{SPACE}\0{place}", least) for place, row in enumerate(named)]
        self._unigram = tokenizers.Tokenizer(Unigram(pieces, vocabulary.unk_id, byte_fallback=False))
        self._normalizer = _charsmap(vocabulary)
        self._merges_spaces = vocabulary.merges_spaces
        self._space_prefix = vocabulary.space_prefix is not SpacePrefix.NONE

    def encode(self, text: str, begins: bool) -> list[int]:
        """The ids of `text`, normalised."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._merges_spaces:
            # A space before each word, the first one too, as llama.cpp normalises.
            text = "".join(f" {word}" for word in text.split(" ") if word)
        elif begins and self._space_prefix and text.strip(" "):
            text = f" {text}"
        ids: list[int] = self._unigram.encode(text.replace(" ", SPACE), add_special_tokens=False).ids
        return ids


def _charsmap(vocabulary: Vocabulary) -> Precompiled | None:
    if not vocabulary.charsmap:
        return None
    try:
        return Precompiled(vocabulary.charsmap)
    except Exception as error:
        found = f"metadata 'tokenizer.ggml.precompiled_charsmap': cannot be read ({error})"
        raise ModelError(f"{vocabulary.source}: {found}", file=vocabulary.source) from error

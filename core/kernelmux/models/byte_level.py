"""Byte-level BPE, as GPT-2 began it: a character for each byte, words, merges within words.

Enters: a checked vocabulary. Leaves: ids for a text without special tokens. The merging is the `tokenizers` package's.
"""

from __future__ import annotations

import tokenizers
from tokenizers import Regex
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from kernelmux.errors import ModelError
from kernelmux.models.splits import SPLITS
from kernelmux.models.vocabulary import CONTROLLING, Vocabulary


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it prints, else one from U+0100 on, in order of the bytes."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTES = _byte_alphabet()


def spelled_bytes(token: str) -> bytes:
    """What a token of the alphabet stands for; one outside of it means itself."""
    try:
        return bytes([BYTES[char] for char in token])
    except KeyError:
        return token.encode()


class ByteLevelBPE:
    """The merges at work."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._source = vocabulary.source
        split = SPLITS[vocabulary.pre]
        parts = {part for merge in vocabulary.merges for part in (*merge, "".join(merge))}
        # Without tokens that control, which no text makes, unless merges do: a whole word may be a token without them.
        ids = {
            token: index
            for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
            if kind not in CONTROLLING or token in parts
        }
        self._bpe = tokenizers.Tokenizer(BPE(ids, list(vocabulary.merges), ignore_merges=split.whole_words))
        cuts = [Split(Regex(pattern), "isolated") for pattern in split.patterns]
        self._bpe.pre_tokenizer = Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
        self._unwritable = frozenset(byte for char, byte in BYTES.items() if char not in ids)

    def encode(self, text: str, begins: bool) -> list[int]:
        """The ids of `text`, wherever it stands.

        ModelError where the vocabulary lacks a byte of it, which would otherwise vanish.
        """
        if self._unwritable and (missing := self._unwritable.intersection(text.encode())):
            raise unwritable(self._source, missing)
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids


def unwritable(source: str, missing: frozenset[int]) -> ModelError:
    """The error for bytes of a text that a vocabulary cannot spell."""
    told = ", ".join(f"0x{byte:02x}" for byte in sorted(missing))
    return ModelError(f"{source}: the vocabulary has no token for byte {told} of the text; take it out", file=source)

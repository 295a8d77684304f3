"""Text to token ids and back, with the tokenizer that a model brings.

Enters: a GGUF file's `tokenizer.ggml.*` metadata, or a folder with a tokenizer.json. Leaves: ids for a text, text for
ids, and text piece by piece while ids come in. A control token that is written out in a text is text like any other,
unless asked for. Chat templates are in chat.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from kernelmux.errors import ModelError
from kernelmux.models.byte_level import ByteLevelBPE, spelled_bytes
from kernelmux.models.pieces import SPACE, ScoredBPE, UnigramPieces, byte_of
from kernelmux.models.special import SpecialTokens
from kernelmux.models.tokenizer_json import PROBE, read_tokenizer
from kernelmux.models.vocabulary import SpacePrefix, TokenKind, Vocabulary, read_vocabulary


class Encoder(Protocol):
    """What makes ids of text."""

    def encode(self, text: str, parse_special: bool, begins: bool, quote: str) -> list[int]:
        """As `Tokenizer.encode`, without what is put around texts; `begins` is False where `text` goes on."""


ENCODERS: Mapping[str, type[ByteLevelBPE | ScoredBPE | UnigramPieces]] = {
    "gpt2": ByteLevelBPE,
    "llama": ScoredBPE,
    "t5": UnigramPieces,
}


class FragmentEncoder:
    """What a GGUF file says, at work: its special tokens, and between them the encoder of its model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._fragments = ENCODERS[vocabulary.model](vocabulary)
        self._all_special = SpecialTokens(vocabulary.special(), vocabulary.stripping)
        self._user_defined = SpecialTokens(vocabulary.special(controlling=False), vocabulary.stripping)

    def encode(self, text: str, parse_special: bool, begins: bool, quote: str) -> list[int]:
        return list(self._ids(text, parse_special, begins, quote))

    def _ids(self, text: str, parse_special: bool, begins: bool, quote: str) -> Iterator[int]:
        for part in (self._all_special if parse_special else self._user_defined).split(text):
            if isinstance(part, int):
                yield part
            elif quote and quote in part:
                yield from self._ids(part.replace(quote, ""), False, begins, "")
            else:
                yield from self._fragments.encode(part, begins)
            begins = isinstance(part, int)


class Tokenizer:
    """A model's vocabulary at work; ids are those of the file."""

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder) -> None:
        self.vocabulary = vocabulary
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.end_ids = vocabulary.end_ids
        self._encoder = encoder
        special, user_defined = vocabulary.special(), vocabulary.special(controlling=False)
        self._special_ids = frozenset(special.values())
        self.control_tokens = frozenset(special.keys() - user_defined.keys())
        """The spellings that control a model, and are text where a user writes them."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """The tokenizer of a model file's metadata; ModelError, which names `source`, where it is not built in."""
        vocabulary = read_vocabulary(metadata, source)
        return cls(vocabulary, FragmentEncoder(vocabulary))

    @classmethod
    def from_folder(cls, path: str | Path, vocabulary: int = 0) -> Tokenizer:
        """The tokenizer of a Hugging Face folder (tokenizer.json); ModelError where it has none that is built in.

        Up to `vocabulary` ids that it does not have stand for nothing, as a model's that has more.
        """
        return cls(*read_tokenizer(Path(path), vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def add_bos(self) -> bool:
        return self.bos_id is not None and self.bos_id in self.vocabulary.opening

    @cached_property
    def goes_on(self) -> bool:
        """Whether `encode` can go on after an id: some folders' tokenizers put a space before whatever they get."""
        ids = self.encode(PROBE, add_special=False)
        return self.text_bytes(self.encode(PROBE, add_special=False, after=ids[-1]), after=ids[-1]) == PROBE.encode()

    def token(self, token_id: int) -> str:
        """The token as the file spells it: bytes in GPT-2's alphabet, SentencePiece's spaces as U+2581."""
        if not 0 <= token_id < self.vocab_size:
            source = self.vocabulary.source
            known = f"ids run from 0 to {self.vocab_size - 1}"
            raise ModelError(f"{source}: no token {token_id}; {known}", file=source)
        return self.vocabulary.tokens[token_id]

    def encode(
        self,
        text: str,
        add_special: bool = True,
        *,
        parse_special: bool = False,
        after: int | None = None,
        quote: str = "",
    ) -> list[int]:
        """The ids of `text`; `parse_special` takes control tokens that are written in it for what they are.

        `add_special=False` leaves out the tokens that begin and end a text; one that a chat template made has them
        already. `after` is the id that the text goes on from, where it does not begin. `quote` is a mark that is no
        part of the text, and keeps what it stands in from being a control token. ModelError where the vocabulary lacks
        a byte of the text, which would otherwise vanish.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ModelError(f"text: character {error.start} is half a surrogate pair, not text") from error
        ids = self._encoder.encode(text, parse_special, self._begins(after), quote)
        return [*self.vocabulary.opening, *ids, *self.vocabulary.closing] if add_special else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 that a token stands for, which may begin or end within a character."""
        token = self.token(token_id)
        if token_id in self._special_ids:
            return token.encode()
        if self.vocabulary.byte_level:
            return spelled_bytes(token)
        if self.vocabulary.kinds[token_id] == TokenKind.BYTE and (byte := byte_of(token)) is not None:
            return bytes([byte])
        return token.replace(SPACE, " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens as they are spelled; bytes that are not UTF-8 become U+FFFD."""
        return self.text_bytes(ids).decode(errors="replace")

    def text_bytes(self, ids: Iterable[int], after: int | None = None) -> bytes:
        """The same in UTF-8, whole or not, without the spaces that `encode` put before a text; `after` as there."""
        parts = []
        for token_id in ids:
            part = self.token_bytes(token_id)
            if self._begins(after) and token_id not in self._special_ids:
                part = part.removeprefix(b" ")
            after = token_id
            parts.append(part)
        return b"".join(parts)

    def stream(self, after: int | None = None) -> TextStream:
        """A decoder for ids that come one by one, `after` another one unless they begin a text."""
        return TextStream(self, after)

    def _begins(self, after: int | None) -> bool:
        """Whether what comes after an id is encoded as if a space stood before it."""
        prefix = self.vocabulary.space_prefix
        if prefix is SpacePrefix.NONE:
            return False
        return after is None or (prefix is SpacePrefix.FRAGMENTS and after in self._special_ids)


class SpelledIds:
    """In a tokenizer's place where a folder brings none: ids are told as numbers, with spaces between."""

    def __init__(self, end_ids: frozenset[int]) -> None:
        self.end_ids = end_ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def stream(self, after: int | None = None) -> IdStream:
        """As `Tokenizer.stream`; what comes first of an answer is alike after whatever id."""
        return IdStream()


class IdStream:
    """Spells ids that come one by one; all that it gave, joined, is what `SpelledIds.decode` gives for all."""

    _before = ""

    def push(self, token_id: int) -> str:
        text, self._before = f"{self._before}{token_id}", " "
        return text

    def flush(self) -> str:
        return ""


class TextStream:
    """Decodes ids one by one; all that it gave, joined, is what `decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer, after: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._after = after
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often one or more words, "" within a character."""
        text = self._decoder.decode(self._tokenizer.text_bytes([token_id], self._after))
        self._after = token_id
        return text

    def flush(self) -> str:
        """What is left when no token follows: "", or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)

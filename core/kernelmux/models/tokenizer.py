"""Text to token ids and back, with the tokenizer that a GGUF file carries.

Enters: the file's `tokenizer.ggml.*` metadata. Leaves: ids for a text, text for ids, and text piece by piece while ids
come in. Only byte-level BPE is built in; a new way to split text before the merges is one row of SPLITS. Chat templates
are in chat.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from kernelmux.errors import ModelError, nearest, shown

CONTROL, USER_DEFINED = 3, 4
"""The values of `tokenizer.ggml.token_type` whose tokens are recognised in a text before it is split."""

END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|endoftext|>"})
"""Control tokens that end an answer wherever they exist: a file states one end, chat models are trained on several."""


@dataclass(frozen=True)
class TextSplit:
    """How a text is cut into the words that merges stay within, and what else `tokenizer.ggml.pre` implies."""

    steps: Sequence[PreTokenizer]
    whole_words: bool = False
    """True where a word that is in the vocabulary is one token, even if no merges lead to it."""
    add_bos: bool = False
    """Where the file does not say."""


def _by_regex(numbers: str) -> list[PreTokenizer]:
    """The split of Llama 3 and of Qwen 2, which differ in `numbers` only: their tokenizer.json files."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]


# As llama.cpp defines these names; so no row normalises (Qwen's own tokenizer.json asks for NFC), and ids decode to the
# very text that was encoded.
SPLITS: Mapping[str, TextSplit] = {
    "smollm": TextSplit([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]),
    "llama-bpe": TextSplit(_by_regex(r"\p{N}{1,3}"), whole_words=True, add_bos=True),
    "qwen2": TextSplit(_by_regex(r"\p{N}")),
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it prints, else one from U+0100 on, in order of the bytes."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Tokenizer:
    """A model's vocabulary at work; ids are those of the file."""

    def __init__(self, metadata: _Metadata, split: TextSplit) -> None:
        tokens = metadata.texts("tokens")
        self._source = metadata.source
        self._tokens = tokens
        self._special = _special_ids(metadata, len(tokens))
        self._bpe = _bpe(metadata, tokens, split)
        self._bpe.add_special_tokens(
            [AddedToken(tokens[token], special=True, normalized=False) for token in self._special]
        )
        self._unwritable = frozenset(byte for char, byte in BYTES.items() if self._bpe.token_to_id(char) is None)
        self.bos_id = metadata.token_id("bos_token_id", len(tokens))
        self.eos_id = metadata.token_id("eos_token_id", len(tokens))
        self.add_bos = metadata.get("add_bos_token", bool, split.add_bos)
        if self.add_bos and self.bos_id is None:
            metadata.fail("add_bos_token", "asks for a token that tokenizer.ggml.bos_token_id does not name")
        stated = {self.eos_id, metadata.token_id("eot_token_id", len(tokens))}
        known = {token for token, kind in self._special.items() if kind == CONTROL and tokens[token] in END_TOKENS}
        self.end_ids = frozenset(known | {token for token in stated if token is not None})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """The tokenizer of a model file's metadata; ModelError, which names `source`, where it is not built in."""
        fields = _Metadata(metadata, source)
        model = fields.need("model", str)
        if model != "gpt2":
            fields.fail("model", f"{shown(model)} is not built in; known: gpt2 (byte-level BPE)")
        pre = fields.need("pre", str)
        if pre not in SPLITS:
            fields.fail("pre", f"{shown(pre)} is not built in{nearest(pre, SPLITS)}")
        return cls(fields, SPLITS[pre])

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def token(self, token_id: int) -> str:
        """The token as the file spells it: bytes in GPT-2's alphabet, special tokens as they are."""
        if not 0 <= token_id < len(self._tokens):
            known = f"ids run from 0 to {len(self._tokens) - 1}"
            raise ModelError(f"{self._source}: no token {token_id}; {known}", file=self._source)
        return self._tokens[token_id]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of `text`, in which special tokens may be written out; False leaves out the token that begins a text.

        Text that a chat template made begins itself: encode it with `add_special=False`. ModelError where the
        vocabulary lacks a byte of the text, which would otherwise vanish.
        """
        try:
            missing = self._unwritable.intersection(text.encode())
        except UnicodeEncodeError as error:
            raise ModelError(f"text: character {error.start} is half a surrogate pair, not text") from error
        if missing:
            shown = ", ".join(f"0x{byte:02x}" for byte in sorted(missing))
            found = f"the vocabulary has no token for byte {shown} of the text; take it out"
            raise ModelError(f"{self._source}: {found}", file=self._source)
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_special and self.add_bos and self.bos_id is not None else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 that a token stands for, which may begin or end within a character."""
        token = self.token(token_id)
        if token_id in self._special:
            return token.encode()
        try:
            return bytes([BYTES[char] for char in token])
        except KeyError:  # a token outside of the byte alphabet means itself
            return token.encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens as they are spelled; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)


class TextStream:
    """Decodes ids one by one; all that it gave, joined, is what `decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often one or more words, "" within a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no token follows: "", or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


T = TypeVar("T")


@dataclass(frozen=True)
class _Metadata:
    """The keys under `tokenizer.ggml.`, each checked for its type."""

    values: Mapping[str, Any]
    source: str

    def fail(self, key: str, found: str) -> NoReturn:
        raise ModelError(f"{self.source}: metadata 'tokenizer.ggml.{key}': {found}", file=self.source)

    def get(self, key: str, kind: type[T], default: T) -> T:
        value = self.values.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:  # not isinstance, for which True is a token id
            self.fail(key, f"found {type(value).__name__} {str(value)[:40]!r}, {kind.__name__} is needed")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        if f"tokenizer.ggml.{key}" not in self.values:
            present = sorted(name for name in self.values if name.startswith("tokenizer."))
            self.fail(key, f"is missing; the file has: {', '.join(present) or 'no tokenizer'}")
        return self.get(key, kind, kind())

    def texts(self, key: str) -> list[str]:
        texts = self.need(key, list)
        if not all(type(text) is str for text in texts):
            self.fail(key, "not all of its items are text")
        return texts

    def token_id(self, key: str, vocabulary: int) -> int | None:
        if f"tokenizer.ggml.{key}" not in self.values:
            return None
        token = self.need(key, int)
        if not 0 <= token < vocabulary:
            self.fail(key, f"no token {token}; ids run from 0 to {vocabulary - 1}")
        return token


def _special_ids(metadata: _Metadata, vocabulary: int) -> dict[int, int]:
    """The type of each token that is control or user-defined."""
    kinds: list[Any] = metadata.get("token_type", list, [])
    if kinds and len(kinds) != vocabulary:
        metadata.fail("token_type", f"{len(kinds)} types for {vocabulary} tokens")
    return {token: kind for token, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}


def _bpe(metadata: _Metadata, tokens: list[str], split: TextSplit) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for rank, merge in enumerate(metadata.texts("merges")):
        left, _, right = merge.partition(" ")
        if not (right and left in vocabulary and right in vocabulary and left + right in vocabulary):
            metadata.fail("merges", f"merge {rank} is {merge[:80]!r}: not two tokens that make a third")
        merges.append((left, right))
    bpe = tokenizers.Tokenizer(BPE(vocabulary, merges, ignore_merges=split.whole_words))
    bpe.pre_tokenizer = Steps(list(split.steps))
    return bpe

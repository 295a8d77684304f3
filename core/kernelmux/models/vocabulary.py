"""What a GGUF file says of its tokenizer, checked: tokens, their kinds, merges or scores, and the ids with a meaning.

Enters: the file's `tokenizer.ggml.*` metadata. Leaves: a Vocabulary, of which every count and id fits. Where a file
does not say, llama.cpp's defaults hold (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, NoReturn, TypeVar

from kernelmux.errors import ModelError, nearest, shown
from kernelmux.models.splits import SPLITS

MOST_TOKENS = 1 << 20
LONGEST_TOKEN = 4096
"""Characters. Known vocabularies have a quarter of a million tokens, and none that is longer than some hundred."""
MOST_MERGES = 1 << 22

_ENDS = """
<|im_end|> <|eot_id|> <|eom_id|> <|endoftext|> <|end_of_text|> <|end|> <|return|> <|call|> <end_of_turn>
<end_of_utterance> <EOT> _<EOT> [EOT] [EOS] <turn|> <｜end▁of▁sentence｜>
"""
END_TOKENS = frozenset(_ENDS.split())
"""Control tokens that end an answer wherever they exist: a file states one end, chat models are trained on several."""
HARMONY_CALLS = frozenset({"<|return|>", "<|call|>"})
"""Where these exist, `<|end|>` ends a message within an answer (https://github.com/openai/harmony)."""


class TokenKind(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


# Plain ints: a vocabulary asks a quarter of a million times.
CONTROLLING = frozenset(map(int, (TokenKind.CONTROL, TokenKind.UNKNOWN)))
"""Recognised in a text only where its special tokens are asked for; user-defined tokens always are."""
SPECIAL = CONTROLLING | {int(TokenKind.USER_DEFINED)}


class SpacePrefix(Enum):
    """Before what a vocabulary has text encoded as if a space stood there: which is not said when ids are decoded."""

    NONE, TEXT, FRAGMENTS = range(3)
    """TEXT is the whole; FRAGMENTS also what follows each special token."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and what is known of them."""

    source: str
    """The file, for messages."""
    tokens: Sequence[str]
    kinds: Sequence[int]
    """A TokenKind for each token."""
    byte_level: bool
    """True where tokens are spelled in GPT-2's alphabet of bytes, False where U+2581 is a space in them."""
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    opening: tuple[int, ...] = ()
    """What a text begins with."""
    closing: tuple[int, ...] = ()
    end_ids: frozenset[int] = frozenset()
    space_prefix: SpacePrefix = SpacePrefix.NONE
    merges_spaces: bool = False
    """True where spaces at both ends are dropped, and several between words are one."""
    stripping: frozenset[int] = frozenset()
    """The special tokens that take blanks after them along."""
    model: str = ""
    """`tokenizer.ggml.model`: what makes ids of text; "" where a tokenizer.json does."""
    pre: str = ""
    """The name of the split, for byte-level BPE."""
    merges: Sequence[tuple[str, str]] = field(default=(), repr=False)
    """Pairs of tokens, the first to be merged first."""
    scores: Sequence[float] = field(default=(), repr=False)
    """One for each token, for SentencePiece."""
    charsmap: bytes = field(default=b"", repr=False)
    """SentencePiece's precompiled normalisation."""

    def special(self, controlling: bool = True) -> dict[str, int]:
        """The tokens that are recognised in a text before it is split; without those that control, if asked."""
        wanted = SPECIAL if controlling else SPECIAL - CONTROLLING
        return {self.tokens[token]: token for token, kind in enumerate(self.kinds) if kind in wanted}


@dataclass(frozen=True)
class _Model:
    """What a `tokenizer.ggml.model` implies where the file does not say more."""

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False


_MODELS: Mapping[str, _Model] = {
    "gpt2": _Model(),
    "llama": _Model(bos_id=1, eos_id=2, unk_id=0, add_bos=True, space_prefix=True),
    "t5": _Model(eos_id=1, unk_id=2, add_eos=True),
}
_MEANINGS = "gpt2 (byte-level BPE), llama (SentencePiece BPE), t5 (SentencePiece unigram)"


def read_vocabulary(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """The vocabulary of a model file's metadata; ModelError, which names `source`, where it is wrong or unknown."""
    keys = _Keys(metadata, source)
    model = keys.need("model", str)
    if model not in _MODELS:
        keys.fail("model", f"{shown(model)} is not built in; known: {_MEANINGS}")
    implied = _MODELS[model]
    pre = keys.need("pre", str) if model == "gpt2" else ""
    if model == "gpt2" and pre not in SPLITS:
        keys.fail("pre", f"{shown(pre)} is not built in{nearest(pre, SPLITS)}")
    tokens = _tokens(keys)
    kinds = _kinds(keys, len(tokens))
    ids = {name: keys.token_id(f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "unknown", "eot", "eom")}
    bos_id, eos_id, unk_id = (
        default if ids[name] is None and default is not None and default < len(tokens) else ids[name]
        for name, default in (("bos", implied.bos_id), ("eos", implied.eos_id), ("unknown", implied.unk_id))
    )
    opening = _around(keys, "bos", bos_id, SPLITS[pre].add_bos if pre else implied.add_bos)
    prefix = model != "gpt2" and keys.get("add_space_prefix", bool, implied.space_prefix)
    return Vocabulary(
        source,
        tokens,
        kinds,
        model == "gpt2",
        bos_id,
        eos_id,
        unk_id,
        opening,
        _around(keys, "eos", eos_id, implied.add_eos),
        _ends(tokens, kinds, {eos_id, ids["eot"], ids["eom"]}),
        SpacePrefix.FRAGMENTS if prefix else SpacePrefix.NONE,
        model == "t5" and keys.get("remove_extra_whitespaces", bool, False),
        _stripping(metadata, tokens, kinds),
        model,
        pre,
        _merges(keys, tokens) if model == "gpt2" else (),
        _scores(keys, len(tokens)) if model != "gpt2" else (),
        _charsmap(keys) if model == "t5" else b"",
    )


T = TypeVar("T")


@dataclass(frozen=True)
class _Keys:
    """The keys under `tokenizer.ggml.`, each checked for its type."""

    values: Mapping[str, Any]
    source: str

    def fail(self, key: str, found: str) -> NoReturn:
        raise ModelError(f"{self.source}: metadata 'tokenizer.ggml.{key}': {found}", file=self.source)

    def has(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self.values

    def get(self, key: str, kind: type[T], default: T) -> T:
        value = self.values.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:  # not isinstance, for which True is a token id
            self.fail(key, f"found {type(value).__name__} {shown(str(value)[:40])}, {kind.__name__} is needed")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        if not self.has(key):
            present = sorted(name for name in self.values if name.startswith("tokenizer."))
            self.fail(key, f"is missing; the file has: {', '.join(present) or 'no tokenizer'}")
        return self.get(key, kind, kind())

    def items(self, key: str, kinds: tuple[type, ...], what: str, default: list[Any] | None = None) -> list[Any]:
        """A list whose items are all of these types, `what` in words; without a default it is needed."""
        items: list[Any] = self.need(key, list) if default is None else self.get(key, list, default)
        if wrong := {type(item) for item in items}.difference(kinds):
            place, item = next((place, item) for place, item in enumerate(items) if type(item) in wrong)
            self.fail(key, f"item {place} is {type(item).__name__} {shown(str(item)[:40])}, {what} is needed")
        return items

    def token_id(self, key: str, vocabulary: int) -> int | None:
        if not self.has(key):
            return None
        token = self.need(key, int)
        if not 0 <= token < vocabulary:
            self.fail(key, f"no token {token}; ids run from 0 to {vocabulary - 1}")
        return token


def _tokens(keys: _Keys) -> list[str]:
    tokens: list[str] = keys.items("tokens", (str,), "text")
    if not 0 < len(tokens) <= MOST_TOKENS:
        keys.fail("tokens", f"{len(tokens)} tokens; from 1 to {MOST_TOKENS} are read")
    lengths = list(map(len, tokens))
    if (longest := max(lengths)) > LONGEST_TOKEN:
        found = f"token {lengths.index(longest)} has {longest} characters"
        keys.fail("tokens", f"{found}; up to {LONGEST_TOKEN} are read")
    if len(set(tokens)) < len(tokens):
        places: dict[str, int] = {}
        for token, spelled in enumerate(tokens):
            # A vocabulary may be filled up with empty ones, which stand for nothing.
            if spelled and places.setdefault(spelled, token) != token:
                keys.fail("tokens", f"{shown(spelled)} is token {places[spelled]} and token {token}")
    return tokens


def _kinds(keys: _Keys, tokens: int) -> list[int]:
    kinds: list[int] = keys.items("token_type", (int,), "int", [])
    if kinds and len(kinds) != tokens:
        keys.fail("token_type", f"{len(kinds)} types for {tokens} tokens")
    return kinds or [TokenKind.NORMAL] * tokens


def _around(keys: _Keys, name: str, token: int | None, default: bool) -> tuple[int, ...]:
    """What a text begins (`bos`) or ends (`eos`) with."""
    if not keys.get(f"add_{name}_token", bool, default):
        return ()
    if token is None:
        keys.fail(f"add_{name}_token", f"asks for a token that tokenizer.ggml.{name}_token_id does not name")
    return (token,)


def _ends(tokens: Sequence[str], kinds: Sequence[int], stated: set[int | None]) -> frozenset[int]:
    known = {token for token, kind in enumerate(kinds) if kind == TokenKind.CONTROL and tokens[token] in END_TOKENS}
    return without_messages_end(tokens, known | {token for token in stated if token is not None})


def without_messages_end(tokens: Sequence[str], ends: set[int]) -> frozenset[int]:
    """`ends` without the end of a message that the answer goes on after."""
    spelled = {tokens[token]: token for token in ends}
    if spelled.keys() >= HARMONY_CALLS and "<|end|>" in spelled:
        ends = ends - {spelled["<|end|>"]}
    return frozenset(ends)


def _stripping(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> frozenset[int]:
    """Those of Phi-3, whose files say so by the model's name alone, as llama.cpp reads them."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not ("phi-3" in name.lower() or "phi3" in name.lower()):
        return frozenset()
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    return frozenset(token for token, kind in enumerate(kinds) if kind in SPECIAL and tokens[token] not in plain)


def _merges(keys: _Keys, tokens: Sequence[str]) -> list[tuple[str, str]]:
    found: list[str] = keys.items("merges", (str,), "text")
    if len(found) > MOST_MERGES:
        keys.fail("merges", f"{len(found)} merges; up to {MOST_MERGES} are read")
    known = set(tokens)
    merges: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(found):
        left, _, right = merge.partition(" ")
        if not (right and left in known and right in known and left + right in known):
            keys.fail("merges", f"merge {rank} is {shown(merge)}: not two tokens that make a third")
        merges.setdefault((left, right))
    return list(merges)


def _scores(keys: _Keys, tokens: int) -> list[float]:
    scores: list[float] = keys.items("scores", (float, int), "a number")
    if len(scores) != tokens:
        keys.fail("scores", f"{len(scores)} scores for {tokens} tokens")
    if any(score != score for score in scores):
        keys.fail("scores", "one of them is not a number (NaN)")
    return scores


def _charsmap(keys: _Keys) -> bytes:
    found: list[int] = keys.items("precompiled_charsmap", (int,), "a byte", [])
    return bytes(byte & 0xFF for byte in found)

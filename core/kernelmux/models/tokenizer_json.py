"""The tokenizer of a Hugging Face folder: tokenizer.json at work, and what the files beside it say of its tokens.

Enters: a folder. Leaves: its vocabulary, and an encoder by the `tokenizers` package, which reads the file as
transformers has it do. Ids come back to text by kernelmux, so that they can come one by one: of a file's decoder the
spelling of tokens is read, and one of another kind is refused.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kernelmux.errors import ModelError, contained, shown
from kernelmux.models.folder import read_json
from kernelmux.models.special import SpecialTokens
from kernelmux.models.stored import StoredFile
from kernelmux.models.vocabulary import END_TOKENS, SpacePrefix, TokenKind, Vocabulary, without_messages_end

ROLES = frozenset({"bos_token", "eos_token", "unk_token"})
TOKENIZER = "tokenizer.json"
PROBE = "a"
"""A text that shows which tokens a file puts around texts."""


class JsonEncoder:
    """A tokenizer.json at work."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        data = _read(path)
        self.tokenizer = _tokenizer(path, data)
        # Unigram takes a control token in a text for the piece that is spelled alike.
        self._says_control_tokens = data["model"].get("type") == "Unigram"
        added: Mapping[int, Any] = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        self.user_defined = {id for id, token in added.items() if not token.special}

    def encode(self, text: str, parse_special: bool, begins: bool, quote: str = "") -> list[int]:
        """The ids of `text`, as `Tokenizer.encode` has them, without what is put around texts."""
        if parse_special and quote and quote in text:
            return self._quoted(text, quote)
        if self._says_control_tokens and not parse_special:
            return self._plain(text)
        # Which of them a text's tokens are found by is a setting of the object.
        with self._lock:
            self.tokenizer.encode_special_tokens = not parse_special
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _quoted(self, text: str, quote: str) -> list[int]:
        """Of a text in which some control tokens are text: the others under names of their own, which nobody knows."""
        _, aliases, _ = self._aliased
        parts = SpecialTokens(self.special).split(text)
        return self._plain(
            "".join(aliases[part] if isinstance(part, int) else part for part in parts).replace(quote, "")
        )

    def _plain(self, text: str) -> list[int]:
        """Of a text in which control tokens have those names."""
        tokenizer, _, ids = self._aliased
        return [ids.get(id, id) for id in tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[int, str], dict[int, int]]:
        """The tokenizer with other spellings of its control tokens, these by id, and the ids of its added tokens."""
        data = _read(self._path)
        aliases = {id: f"<{secrets.token_hex(16)}>" for id in self.special.values()}
        for token in data["added_tokens"]:
            token["content"] = aliases.get(token["id"], token["content"])
        if self._says_control_tokens:
            for piece in data["model"]["vocab"]:
                piece[0] = aliases.get(self.special.get(piece[0], -1), piece[0])
        tokenizer = _tokenizer(self._path, data)
        own = {token["content"]: token["id"] for token in data["added_tokens"]}
        return tokenizer, aliases, {tokenizer.get_vocab()[spelled]: id for spelled, id in own.items()}


def read_tokenizer(path: Path, vocabulary: int = 0) -> tuple[Vocabulary, JsonEncoder]:
    """The tokenizer of a folder; ModelError, which names the file, where it has none or one that is not built in.

    Models have rows for more ids than their tokenizers: up to `vocabulary` these stand for nothing.
    """
    file = path / TOKENIZER
    if not file.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (path / name).exists()]
        found = f"; there is {', '.join(others)}, which transformers can convert (save_pretrained)" if others else ""
        raise _fault(file, f"no such file, so that prompts are token ids: a list, or --ids{found}")
    encoder = JsonEncoder(file)
    byte_level, prefix, bytes_fall_back = _spelling(file, _read(file).get("decoder"))
    tokens, kinds = _tokens(encoder, bytes_fall_back)
    ids = _named_ids(path, encoder.tokenizer)
    ends = stated_ends(path, len(tokens)) | ({ids["eos_token"]} if "eos_token" in ids else set())
    opening, closing = _around(encoder.tokenizer)
    known = {token for token, kind in enumerate(kinds) if kind == TokenKind.CONTROL and tokens[token] in END_TOKENS}
    more = max(0, vocabulary - len(tokens))
    return Vocabulary(
        str(file),
        [*tokens, *[""] * more],
        [*kinds, *[int(TokenKind.UNUSED)] * more],
        byte_level,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        unk_id=ids.get("unk_token"),
        opening=opening,
        closing=closing,
        end_ids=without_messages_end(tokens, known | ends),
        space_prefix=prefix,
    ), encoder


def _tokenizer(path: Path, data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    except BaseException as error:  # a panic of the library is no Exception
        raise _fault(path, f"cannot be read: {contained(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    return read_json(StoredFile(path))


def _spelling(path: Path, decoder: Any) -> tuple[bool, SpacePrefix, bool]:
    """How tokens spell text: bytes in GPT-2's alphabet or not, which space is not said, whether `<0x0A>` is a byte."""
    steps = decoder["decoders"] if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds == ["ByteLevel"]:
        return True, SpacePrefix.NONE, False
    spaces = {"Replace", "Metaspace"}
    if not spaces & set(kinds) or not set(kinds) <= {*spaces, "ByteFallback", "Fuse", "Strip"}:
        known = "ByteLevel, Metaspace, and a Sequence of Replace, ByteFallback, Fuse and Strip"
        raise _fault(path, f"decoder {shown(json.dumps(kinds))} is not built in; known: {known}")
    scheme = [step.get("prepend_scheme", "always") for step in steps if step.get("type") == "Metaspace"]
    strips = "Strip" in kinds or any(each != "never" for each in scheme)
    return False, SpacePrefix.TEXT if strips else SpacePrefix.NONE, "ByteFallback" in kinds


def _tokens(encoder: JsonEncoder, bytes_fall_back: bool) -> tuple[list[str], list[int]]:
    """Tokens and kinds by id; an id in a gap is a token that stands for nothing."""
    ids = encoder.tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(ids.values(), default=-1) + 1)
    for token, id in ids.items():
        tokens[id] = token
    kinds = [int(TokenKind.NORMAL)] * len(tokens)
    spelled = {f"<0x{byte:02X}>" for byte in range(256 if bytes_fall_back else 0)}
    for token in spelled & ids.keys():
        kinds[ids[token]] = int(TokenKind.BYTE)
    for id in encoder.special.values():
        kinds[id] = int(TokenKind.CONTROL)
    for id in encoder.user_defined:
        kinds[id] = int(TokenKind.USER_DEFINED)
    return tokens, kinds


def _named_ids(path: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """The tokens of some roles (`bos_token` and so on) by the folder's files, of which the later one is heard."""
    ids: dict[str, int] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = path / name
        stated = _read(file) if file.exists() else {}
        for role in ROLES & stated.keys():
            spelled = stated[role].get("content") if isinstance(stated[role], dict) else stated[role]
            if isinstance(spelled, str):
                id = tokenizer.token_to_id(spelled)
                if id is None:
                    raise _fault(file, f"{shown(role)} is {shown(spelled)}, which tokenizer.json does not have")
                ids[role] = id
    return ids


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file puts before and behind a text."""
    plain = tokenizer.encode(PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(PROBE).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def stated_ends(path: Path, tokens: int) -> set[int]:
    """What ends an answer by a folder's config.json and generation_config.json, of so many tokens."""
    ends = set[int]()
    for name in ("config.json", "generation_config.json"):
        file = path / name
        stated = _read(file).get("eos_token_id") if file.exists() else None
        if stated is None:
            continue
        listed = stated if isinstance(stated, list) else [stated]
        if not all(type(id) is int and 0 <= id < tokens for id in listed):
            raise _fault(file, f"'eos_token_id' is {shown(json.dumps(stated))}; ids from 0 to {tokens - 1} are needed")
        ends.update(listed)
    return ends


def _fault(path: Path, found: str) -> ModelError:
    return ModelError(f"{path}: {found}", file=str(path))

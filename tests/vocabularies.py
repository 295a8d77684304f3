"""Small vocabularies that tell splits and merges apart, and what llama.cpp made of many strings with them.

The merges reach over every border that a split may cut: each split gives other ids. `data/llama_cpp_tokens.json` holds
the merges, and digests of the ids that llama.cpp (the build is in the file) gave for `texts(...)`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kernelmux.errors import ModelError
from texts import texts
from tiny_model import byte_alphabet

STORED = json.loads((Path(__file__).parent / "data" / "llama_cpp_tokens.json").read_text("utf-8"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def split_vocabulary(pre: str) -> dict[str, Any]:
    """Byte-level BPE with the split `pre`; `<|im_start|>` begins a text where the split says so."""
    merges = STORED["merges"]
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED]
    tokens += ["<|im_start|>", "<|im_end|>", "<think>"]
    return _keys(
        model="gpt2", pre=pre, tokens=tokens, token_type=kinds, merges=merges,
        bos_token_id=len(tokens) - 3, eos_token_id=len(tokens) - 2,
    )  # fmt: skip


def piece_vocabulary(model: str = "llama", **changes: Any) -> dict[str, Any]:
    """SentencePiece: the bytes, then what occurs often in some strings, with scores that tie."""
    common = _common_pieces()
    special = ["<unk>", "<s>", "</s>", "<think>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *common]
    kinds = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(common)]
    scores = [0.0] * (len(tokens) - len(common)) + [float(-(place % 37)) for place in range(len(common))]
    keys = {"model": model, "tokens": tokens, "token_type": kinds, "scores": scores}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return _keys(**{**keys, **ids, **changes})


@cache
def _common_pieces() -> list[str]:
    counts = Counter(
        word[start:end]
        for text in texts(200, seed=2)
        for word in f" {text}".replace(" ", " \u2581").split(" ")
        for start in range(len(word))
        for end in range(start + 1, min(start + 5, len(word)) + 1)
    )
    # GGUF's readers in C end a string at NUL.
    usable = (piece for piece in counts if "\0" not in piece)
    return sorted(usable, key=lambda piece: (-counts[piece], piece))[:2000]


def _keys(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def digest(encode: Callable[[str], Sequence[int]], strings: Iterable[str]) -> str:
    """What tells two tokenizers apart; strings that are refused, for the vocabulary lacks a byte, are left out."""
    found = hashlib.sha256()
    for text in strings:
        try:
            ids = encode(text)
        except ModelError:
            continue
        found.update(",".join(map(str, ids)).encode() + b"\n")
    return found.hexdigest()[:16]

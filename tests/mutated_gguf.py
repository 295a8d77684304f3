"""GGUF files with one thing wrong: bytes of the header changed, or one key or tensor of a file that is otherwise whole.

Enters: a file, a seed. Leaves: the bytes of another, and in words what was done to it.
"""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelmux.graph.formats import Value, Weight
from kernelmux.models.gguf import ModelFile, read
from kernelmux.models.header import ARRAY, NUMBERS, STRING
from kernelmux.models.stored import StoredWeight
from kernelmux.models.writer import Writer

EXTREMES = (0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
TEXTS = ("", "a", "none", "linear", "yarn", "llama", "qwen2", "gpt2", "smollm", "\x1b[2J\n", "x" * 5000)
NAMES = (
    *("output.weight", "output.bias", "rope_freqs.weight", "token_embd.bias", "blk.2.attn_norm.weight", "w\n\x1b"),
    *("blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.0.attn_sinks.weight", "blk.00.attn_q.weight", ""),
)
KEYS = (
    *("attention.causal", "attention.scale", "attention.sliding_window", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "expert_count", "logit_scale", "attention.value_length", "rope.dimension_count"),
    *("attention.key_length", "vocab_size", "invented"),
)


@dataclass(frozen=True)
class Mutant:
    """A file's bytes, and what was done."""

    data: bytes
    told: str


class Mutants:
    """Mutants of one file, each by its seed: the same seed, the same mutant."""

    def __init__(self, path: Path) -> None:
        self._raw = path.read_bytes()
        self._file = read(path)
        stored = [weight for weight in self._file.weights.values() if isinstance(weight, StoredWeight)]
        self._start = min(plane.offset for weight in stored for plane in weight.stored)  # type: ignore[union-attr]

    def unchanged(self) -> bytes:
        """The file itself, written as mutants are."""
        return _file(self._file)

    def __call__(self, seed: int) -> Mutant:
        chance = random.Random(seed)
        return self._bytes(chance) if chance.random() < 0.5 else self._parts(chance)

    def _bytes(self, chance: random.Random) -> Mutant:
        """Bytes of the header."""
        raw, at = self._raw, chance.randrange(self._start)
        # As often near its start, which has the counts and the keys that matter, as in the long vocabulary.
        at = at if chance.random() < 0.5 else chance.randrange(min(self._start, 1500))
        kind = chance.choice(("flip", "byte", "u32", "u64", "insert", "delete", "cut"))
        if kind == "flip":
            new = bytes([raw[at] ^ 1 << chance.randrange(8)])
        elif kind == "byte":
            new = bytes([chance.randrange(256)])
        else:
            number = chance.choice(EXTREMES)
            new = struct.pack("<Q", number)[: 4 if kind == "u32" else 8]
        if kind == "cut":
            return Mutant(raw[: chance.randrange(len(raw))], f"cut at {at}")
        if kind == "insert":
            return Mutant(raw[:at] + new[: chance.randrange(1, 9)] + raw[at:], f"inserted at {at}")
        if kind == "delete":
            return Mutant(raw[:at] + raw[at + chance.randrange(1, 17) :], f"deleted at {at}")
        return Mutant(raw[:at] + new + raw[at + len(new) :], f"{kind} at {at}: {new.hex()}")

    def _parts(self, chance: random.Random) -> Mutant:
        """One key or tensor, the file around it whole."""
        metadata, kinds = dict(self._file.metadata), dict(self._file.kinds)
        weights = dict(self._file.weights)
        kind = chance.choice(("value", "type", "drop", "rename key", "add key", "tensor", "drop tensor", "add tensor"))
        key = chance.choice([*metadata])
        if chance.random() < 0.7:  # The sizes, more often than the names.
            key = chance.choice([name for name in metadata if not name.startswith("general.")])
        told = f"{kind}: {key}"
        if kind == "value":
            metadata[key] = _other_value(chance, metadata[key])
        elif kind == "type":
            metadata[key], kinds[key] = _typed(chance)
        elif kind == "drop":
            del metadata[key]
        elif kind == "rename key":
            new = key[:-1] + chance.choice("abcxyz_0")
            metadata = {new if name == key else name: value for name, value in metadata.items()}
            kinds[new] = kinds[key]
        elif kind == "add key":
            key = f"{metadata['general.architecture']}.{chance.choice(KEYS)}"
            metadata[key], kinds[key] = _typed(chance)
            told = f"{kind}: {key}"
        else:
            weights, told = _other_weights(chance, kind, weights)
        return Mutant(_file(replace(self._file, metadata=metadata, weights=weights, kinds=kinds)), told)


def _other_value(chance: random.Random, value: Any) -> Any:
    if isinstance(value, list):
        value = list(value)
        at = chance.randrange(len(value))
        change = chance.choice(("shorter", "longer", "item", "twice"))
        if change == "shorter":
            return value[:at]
        if change == "longer":
            return value + value[:1]
        value[at] = _other_value(chance, value[at]) if change == "item" else value[0]
        return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return chance.choice(TEXTS)
    if isinstance(value, float):
        return chance.choice((0.0, -1.0, 0.5 * value, 2 * value, float("inf"), float("nan"), 1e-30))
    return chance.choice((0, 1, value + 1, max(value - 1, 0), 2 * value, 255, 2**16))


def _typed(chance: random.Random) -> tuple[Any, tuple[int, ...]]:
    kind = chance.choice([*NUMBERS, STRING, ARRAY])
    if kind == ARRAY:
        inner = chance.choice((4, 5, 6, STRING))
        item: Any = "a" if inner == STRING else 3
        return [item] * chance.randrange(4), (ARRAY, inner)
    return ("a" if kind == STRING else kind != 7 and chance.choice((3, 4, 100))), (kind,)


def _other_weights(chance: random.Random, kind: str, weights: dict[str, Weight]) -> tuple[dict[str, Weight], str]:
    name = chance.choice([*weights])
    told = f"{kind}: {name}"
    if kind == "drop tensor":
        return {other: weight for other, weight in weights.items() if other != name}, told
    if kind == "add tensor":
        new = chance.choice(NAMES)
        return {**weights, new: replace(weights[name], name=new)}, f"{told} as {new!r}"
    weight = weights[name]
    change = chance.choice(("rename", "turn", "format"))
    if change == "rename":
        new = chance.choice((*NAMES, name[:-1], name.replace("0", "1"), name.replace("attn", "ffn")))
        return {new if n == name else n: replace(w, name=new) if n == name else w for n, w in weights.items()}, told
    shape = weight.shape[::-1] if change == "turn" else weight.shape
    format = "i32" if change == "format" and weight.format == "f32" else weight.format
    return {**weights, name: replace(weight, shape=shape, format=format)}, f"{told}: {change}"


def _file(model: ModelFile) -> bytes:
    out = io.BytesIO()
    table = [Value(weight.name, weight.shape, weight.format) for weight in model.weights.values()]
    writer = Writer(out, model.metadata, model.kinds, table)  # type: ignore[arg-type]
    for weight in model.weights.values():
        writer.tensor(iter([memoryview(plane.contiguous().view(-1).numpy()).cast("B") for plane in weight.planes]))
    return out.getvalue()

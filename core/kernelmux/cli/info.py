"""`kernelmux info`: what a model file is, its sizes, what its weights are stored as, and the memory that it takes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.cli.common import Context, Json, ModelPath
from kernelmux.cli.output import print_json, print_table, say, tell
from kernelmux.errors import ModelError, label

if TYPE_CHECKING:
    from kernelmux.graph.formats import Weight
    from kernelmux.graph.graph import Graph
    from kernelmux.models import Source

SIZES = ("layers", "hidden", "feed_forward", "heads", "kv_heads", "head_dim", "vocab", "context", "longest")
"""What is told of a model's shape, in this order."""


def info(
    model: ModelPath,
    context: Context = None,
    json: Json = False,
) -> None:
    """Tell what a model is: architecture, sizes, tokenizer, what its weights are stored as, memory.

    A model whose architecture or weights cannot run here is told of as far as its file goes, with the reason.
    """
    found = describe(model, context or 0)
    if json:
        print_json(found)
        return
    for name, value in _lines(found):
        say(f"{name:14}{value}", indent=" " * 14)
    tell()
    headings = ("format", "tensors", "parameters", "size", "bits/weight")
    print_table(headings, [_row(each) for each in found["weights"]])


def describe(path: Path, context: int = 0) -> dict[str, Any]:
    """What `--json` prints of a file, its strings made printable; ModelError where it cannot be read."""
    from kernelmux.models import open_model
    from kernelmux.models.gguf import read

    reason, source = None, None
    try:
        source = open_model(path, context)
        file = source.file
    except ModelError as error:
        if context or os.path.isdir(path):
            raise
        # What is wrong with the file itself is said again by reading it.
        file, reason = read(path), str(error)
    weights, metadata = list(file.weights.values()), file.metadata
    return {
        "path": str(path),
        "architecture": _text(metadata.get("general.architecture")),
        "name": _text(metadata.get("general.name")),
        "notes": [*file.notes, *file.held],
        "runs": reason is None,
        "reason": reason,
        "sizes": {} if source is None else {name: getattr(source.shape, name) for name in SIZES},
        "tokenizer": _tokenizer(metadata)
        if source is None or not os.path.isdir(path)
        else _tokenizer_of_folder(source),
        "chat_template": isinstance(metadata.get("tokenizer.chat_template"), str),
        "parameters": sum(math.prod(weight.shape) for weight in weights),
        "weight_bytes": sum(weight.nbytes for weight in weights),
        "weights": _by_format(weights),
        "cache_bytes_per_token": {} if source is None else _cache_bytes(source.graph),
    }


def _text(value: object) -> str | None:
    return label(value) if isinstance(value, str) else None


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _text(metadata.get("tokenizer.ggml.model")),
        "pre": _text(metadata.get("tokenizer.ggml.pre")),
        "tokens": len(tokens) if isinstance(tokens, list) else None,
    }


def _tokenizer_of_folder(source: Source) -> dict[str, Any]:
    try:
        return {"model": "tokenizer.json", "pre": None, "tokens": source.tokenizer.vocab_size}
    except ModelError as error:
        return {"model": None, "pre": None, "tokens": None, "reason": str(error)}


def _by_format(weights: Iterable[Weight]) -> list[dict[str, Any]]:
    """Of each format how many tensors are stored so, and what they take; the largest part first."""
    parts: dict[str, dict[str, Any]] = {}
    for weight in weights:
        part = parts.setdefault(weight.format, {"format": weight.format, "tensors": 0, "parameters": 0, "bytes": 0})
        part["tensors"] += 1
        part["parameters"] += math.prod(weight.shape)
        part["bytes"] += weight.nbytes
    for part in parts.values():
        part["bits_per_weight"] = 8 * part["bytes"] / part["parameters"]
    return sorted(parts.values(), key=lambda part: -part["bytes"])


def _cache_bytes(graph: Graph) -> dict[str, int]:
    """Bytes of keys and values of one token, all layers together, by what the cache may be stored as."""
    from kernelmux.graph.formats import CACHE_FORMATS, lookup

    caches = [leaf.outputs[0].shape for leaf in graph.leaves if leaf.role == "cache"]
    heads = [tuple(extent for extent in shape[2:] if isinstance(extent, int)) for shape in caches]
    return {format: sum(lookup(format).nbytes(extents) for extents in heads) for format in CACHE_FORMATS}


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from kernelmux.graph.formats import human_bytes

    yield "model", f"{found['name'] or 'has no name'}, architecture {found['architecture'] or 'not stated'}"
    if not found["runs"]:
        yield "does not run", found["reason"]
    if sizes := found["sizes"]:
        yield "layers", f"{sizes['layers']} of width {sizes['hidden']}, feed-forward {sizes['feed_forward']}"
        yield "attention", f"{sizes['heads']} heads of {sizes['head_dim']}, keys and values of {sizes['kv_heads']}"
        longer = f", opened for longer contexts {sizes['longest']} (--context)"
        yield "context", f"{sizes['context']} tokens{longer if sizes['longest'] > sizes['context'] else ''}"
        yield "vocabulary", f"{sizes['vocab']} tokens"
    tokenizer, template = found["tokenizer"], "with" if found["chat_template"] else "without"
    named = " ".join(filter(None, (tokenizer["model"], tokenizer["pre"] and f"({tokenizer['pre']})")))
    told = named or tokenizer.get("reason") or "none in the file"
    yield "tokenizer", f"{told}, {template} a chat template"
    bits = 8 * found["weight_bytes"] / max(found["parameters"], 1)
    yield "weights", f"{found['parameters']:,} in {human_bytes(found['weight_bytes'])}, {bits:.2f} bits each"
    for note in found["notes"]:
        yield "note", note
    if cache := found["cache_bytes_per_token"]:
        sizes_told = ", ".join(f"{human_bytes(nbytes)} in {format}" for format, nbytes in cache.items())
        yield "cache", f"a token takes {sizes_told}"


def _row(part: Mapping[str, Any]) -> tuple[str, ...]:
    from kernelmux.graph.formats import human_bytes

    nbytes, bits = human_bytes(part["bytes"]), f"{part['bits_per_weight']:.2f}"
    return part["format"], str(part["tensors"]), f"{part['parameters']:,}", nbytes, bits

"""A folder's model as a GGUF file would state it: queries and keys in GGUF's order, the tokenizer as metadata.

Enters: a path. Leaves: a ModelFile that can be written as GGUF; of a GGUF file what it holds. ModelError where the
model does not run, or a folder has what is not to be had in GGUF's words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Weight
from kernelmux.models import Source, build_source
from kernelmux.models.folder import read_folder
from kernelmux.models.gguf import ModelFile, read
from kernelmux.models.splits import SPLITS
from kernelmux.models.tokenizer import Tokenizer
from kernelmux.models.tokenizer_json import read_tokenizer
from kernelmux.models.vocabulary import TokenKind, Vocabulary

if TYPE_CHECKING:
    import torch

_TURNED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")
PROBES = (
    "Hello, world! It's 1234567 o'clock; WE'LL see.\n\n  \tNaïve café, 東京の天気 Привет мир \U0001f600!?",
    "def f(x):\n    return x**2  # 3.14\r\n\r\n<tag a='b'>&amp;</tag> HTTPServerError camelCase don't DON'T",
    "     leading,   trailing     \n \n a1b22c333d4444 ٣٤٥ ½ ² e\u0301 \u3000\u200b …“quoted”— ¿qué? ___ ...",
)
"""Texts that tell the ways apart in which GGUF's names split."""


def exported(path: Path) -> ModelFile:
    """The model of a file or a folder in GGUF's words, each tensor as it is stored there."""
    file = read_folder(path) if os.path.isdir(path) else read(path)
    source = build_source(file)
    if file.pairing is None:
        return file
    ours = build_source(replace(file, pairing=None))
    rotations = {node.rotation for node in ours.graph.ops if node.op == "rope" and node.rotation is not None}
    weights: Mapping[str, Weight] = file.weights
    if turned := {rotation.dims for rotation in rotations if rotation.pairing != file.pairing}:
        weights = {name: _in_order(source, weight, max(turned)) for name, weight in weights.items()}
    prefix, head = file.metadata["general.architecture"], source.shape.head_dim
    lengths = {f"{prefix}.attention.{part}_length": head for part in ("key", "value")}
    return ModelFile(path, {**file.metadata, **lengths, **_tokenizer_keys(source)}, weights, file.stamp)


class _Turned(Weight):
    """Queries or keys of which the halves of each head that turn together become neighbours, when they are read."""

    def __init__(self, weight: Weight, heads: int, dims: int) -> None:
        for field, value in {"name": weight.name, "shape": weight.shape, "format": weight.format}.items():
            object.__setattr__(self, field, value)
        object.__setattr__(self, "halves", weight)
        object.__setattr__(self, "_order", (heads, dims))

    halves: Weight
    _order: tuple[int, int]

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        import torch

        (heads, dims), rows = self._order, self.shape[0]
        own = torch.arange(rows).view(heads, -1)
        own[:, :dims] = own[:, :dims].view(heads, 2, -1).mT.flatten(1)
        return tuple(plane[own.flatten()] for plane in self.halves.planes)


def _in_order(source: Source, weight: Weight, dims: int) -> Weight:
    """A weight in GGUF's order, where so many elements of each head turn."""
    found = _TURNED.fullmatch(weight.name)
    if re.fullmatch(r"blk\.\d+\.(attn_qkv\..*|attn_[qk]_norm\.weight)", weight.name):
        raise source.file.fault(f"tensor {weight.name!r} cannot be put into GGUF's order")
    if found is None:
        return weight
    return _Turned(weight, source.shape.heads if found[1] == "q" else source.shape.kv_heads, dims)


def _tokenizer_keys(source: Source) -> dict[str, Any]:
    """The folder's tokenizer as `tokenizer.ggml.*`, whose ids for PROBES are the folder's own."""
    file = source.file
    vocabulary, encoder = read_tokenizer(file.path, source.shape.vocab)
    model = json.loads(encoder.tokenizer.to_str())["model"]
    if model.get("type") != "BPE" or not vocabulary.byte_level:
        raise file.fault("its tokenizer is no byte-level BPE, and only those are written into GGUF files")
    theirs = Tokenizer(vocabulary, encoder)
    expected = [theirs.encode(text) for text in PROBES]
    keys = {**_vocabulary_keys(source, vocabulary), "tokenizer.ggml.merges": list(_merges(model))}
    for pre in dict(zip(SPLITS.values(), SPLITS, strict=True)).values():
        made = Tokenizer.from_metadata(found := {**keys, "tokenizer.ggml.pre": pre}, str(file.path))
        if [made.encode(text) for text in PROBES] == expected:
            return found
    raise file.fault("its tokenizer splits text in a way that has no name in GGUF files")


def _merges(model: Mapping[str, Any]) -> Iterator[str]:
    for merge in model["merges"]:
        yield merge if isinstance(merge, str) else " ".join(merge)


def _vocabulary_keys(source: Source, vocabulary: Vocabulary) -> dict[str, Any]:
    tokens, kinds = list(vocabulary.tokens), list(vocabulary.kinds)
    if len(tokens) > source.shape.vocab:
        raise source.file.fault(f"{len(tokens)} tokens, of which the model knows {source.shape.vocab}")
    for number, spelled in enumerate(tokens):
        if not spelled:
            tokens[number], kinds[number] = f"[PAD{number}]", int(TokenKind.UNUSED)
    around = {"bos": (vocabulary.opening, vocabulary.bos_id), "eos": (vocabulary.closing, vocabulary.eos_id)}
    for name, (put, token) in around.items():
        if put not in ((), (token,)):
            raise source.file.fault(
                f"its tokenizer puts tokens {put} around a text, which GGUF has no word for: {name}"
            )
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unknown": vocabulary.unk_id}
    if others := sorted(vocabulary.end_ids - {vocabulary.eos_id}):
        ids["eot"] = others[0]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None},
        **{f"tokenizer.ggml.add_{name}_token": bool(put) for name, (put, _) in around.items()},
    }

"""Files that llama.cpp was asked to load, by name: whole ones of each architecture, and such with one thing wrong.

`data/llama_cpp_loads.json` holds what came of it, by `bench/llama_cpp_loads.py`: of each file what was done to it, and
llama.cpp's refusal, or nothing where it loads.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
from damaged_gguf import BAD
from kernelmux.models import open_model
from kernelmux.models.gguf import read
from mutated_gguf import Mutant, Mutants
from tiny_model import experts_apart, write_gguf, write_three_llamas, write_tiny_llama

VERDICTS = Path(__file__).parent / "data" / "llama_cpp_loads.json"
LLAMAS, OTHERS = 200, 60
"""Mutants of each file of a llama with a vocabulary, and of each other file."""
Weights = Mapping[str, np.ndarray]
NO_WORDS = {"tokenizer.ggml.model": "none"}
"""llama.cpp's word for a model without a vocabulary."""
MORE = {"gpt-oss": {"gpt-oss.expert_feed_forward_length": 80}}
"""What a file states beside what its folder does."""


def whole_files(folder: Path) -> dict[str, tuple[Path, int]]:
    """Files that are whole, by name, and how many mutants are made of each."""
    found = {name: (path, LLAMAS) for name, path in write_three_llamas(folder, turned=16).items()}
    found["part of a head"] = write_tiny_llama(folder / "part.gguf", extra={"llama.rope.dimension_count": 8}), 0
    for name in checkpoints.CONFIGS:
        checkpoint = checkpoints.make_checkpoint(name, folder / name)
        shape, more = open_model(checkpoint.folder).shape, NO_WORDS | MORE.get(name, {})
        path = checkpoints.write_gguf_of(checkpoint.folder, shape, folder / f"{name}.gguf", more)
        found[name] = path, OTHERS if name != "gpt-oss-default" else 0
    otherwise: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
        "experts apart": ("mixtral", experts_apart),
        "no gates": ("mixtral", lambda weights: {n: w for n, w in weights.items() if "ffn_gate_exps" not in n}),
        "no queries": ("phi3", lambda weights: {n: w for n, w in weights.items() if "attn_qkv" not in n}),
    }
    for name, (of, edit) in otherwise.items():
        found[name] = _of_other_weights(found[of][0], folder / f"{name}.gguf", edit), 0
    return found


def _of_other_weights(path: Path, made: Path, edit: Callable[[Weights], Weights]) -> Path:
    file = read(path)
    weights = {weight.name: weight.dequantize().numpy() for weight in file.weights.values()}
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    return write_gguf(made, file.metadata["general.architecture"], metadata, edit(weights))


def files(folder: Path) -> Iterator[tuple[str, Mutant]]:
    """Each file's name, and itself with what was done to it; mutants are called by their seed, too."""
    for name, (path, count) in whole_files(folder).items():
        yield name, Mutant(path.read_bytes(), "")
        make = Mutants(path) if count else None
        first = zlib.crc32(name.encode())
        for seed in range(first, first + count):
            assert make is not None
            yield f"{name} {seed}", make(seed)


def headers() -> Iterator[tuple[str, bytes]]:
    """Each damaged header's name, and the file; there is no model in any, so that ggml's reader alone is asked."""
    for name, (data, _) in BAD.items():
        yield f"header: {name}", data


def stored_verdicts() -> dict[str, Any]:
    return json.loads(VERDICTS.read_text("utf-8"))

"""Writes a known shape with random weights as a GGUF file, to time loading.

    python tests/bench/random_file.py llama-8b:Q4_K_M model.gguf --device cuda

The file holds what `--random SHAPE` describes; its vocabulary is as large as a real model's, and merges one pair.
"""

from __future__ import annotations

import argparse
from typing import Any

import gguf
import numpy as np
import torch

from kernelmux.graph.formats import lookup
from kernelmux.models import open_random


def write(shape: str, path: str, device: str) -> None:
    """Draws each weight on the device, and writes the file."""
    source = open_random(shape, device)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*source.file.metadata["tokenizer.ggml.tokens"]]
    tokens[-1] = "he"
    metadata = {**source.file.metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["h e"]}
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, _type(value))
    for name, described in source.file.weights.items():
        kind = gguf.GGMLQuantizationType(lookup(described.format).gguf)
        dtype = described.planes[0].dtype
        data = described.planes[0].view(torch.int16) if dtype == torch.bfloat16 else described.planes[0]
        shape_of = None if data.dtype == torch.uint8 else described.shape
        writer.add_tensor(name, _host(data), raw_shape=shape_of, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _host(data: torch.Tensor) -> np.ndarray[Any, Any]:
    return data.cpu().numpy()


def _type(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("path")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    write(asked.shape, asked.path, asked.device)

"""Writes a small but whole llama model as GGUF: seeded random weights, and a byte-level tokenizer that works.

Enters: sizes and the stored type of the matrices. Leaves: a file that says nothing sensible, yet loads, tokenizes any
text and gives logits of about unit variance. `omit`, `reshape` and `extra` make files that are wrong on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MERGES = ("h e", "i n", "Ġ t", "Ġt he", "l l", "o u", "Ġ a", "Ġa n", "Ġan d", "he ll")
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CONTROL, NORMAL, UNUSED = 3, 1, 5
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    weight_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 96,
    vocab: int | None = None,
    context: int = 256,
    seed: int = 0,
    tied: bool = True,
    omit: Collection[str] = (),
    reshape: Mapping[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model to `path` and returns it.

    `vocab` is the size of the vocabulary, filled up with unused tokens; None takes no more than it needs. `omit` names
    tensors to leave out, `reshape` gives a tensor another shape, `extra` adds or replaces metadata (None leaves out).
    """
    tokenizer = tokenizer_metadata(vocab)
    metadata = {
        "general.name": "tiny",
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": context,
        f"{architecture}.embedding_length": hidden,
        f"{architecture}.feed_forward_length": feed_forward,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": hidden // heads,
        f"{architecture}.vocab_size": len(tokenizer["tokenizer.ggml.tokens"]),
        **tokenizer,
        **(extra or {}),
    }
    kv_width = hidden // heads * kv_heads
    shapes = {"token_embd.weight": (len(tokenizer["tokenizer.ggml.tokens"]), hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape for name, shape in _layer(hidden, kv_width, feed_forward).items()
        }
    shapes = {name: (reshape or {}).get(name, shape) for name, shape in shapes.items() if name not in omit}
    return write_gguf(path, architecture, metadata, _weights(shapes, seed), weight_type)


def write_three_llamas(folder: Path, turned: int) -> dict[str, Path]:
    """A file in float32, one in blocks with a head of its own, and one whose positions are scaled, of a layer each.

    Nothing in them is what it would be without being stated; `turned` elements of a head turn.
    """
    stated = {"llama.rope.freq_base": 5000.0, "llama.rope.dimension_count": turned}
    stated |= {"tokenizer.ggml.add_bos_token": True}
    yarn = {"type": "yarn", "factor": 2.0, "original_context_length": 128}
    scaled = stated | {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    return {
        "plain": write_tiny_llama(folder / "plain.gguf", extra=stated, layers=1),
        "blocks": write_tiny_llama(folder / "blocks.gguf", weight_type=q8_0, extra=stated, tied=False, layers=1),
        "scaled": write_tiny_llama(folder / "scaled.gguf", extra=scaled, layers=1),
    }


def tokenizer_metadata(vocab: int | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys: one token for each byte, then the merges, then the control tokens, then unused ones."""
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), *CONTROLS]
    unused = 0 if vocab is None else vocab - len(tokens)
    if unused < 0:
        raise ValueError(f"vocab={vocab} is too small, the tokenizer needs {len(tokens)}")
    kinds = [CONTROL if token in CONTROLS else NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + [f"<|unused_{index}|>" for index in range(unused)],
        "tokenizer.ggml.token_type": kinds + [UNUSED] * unused,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def byte_alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in GPT-2's vocabulary."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    beyond = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(beyond)) for byte in range(256)]


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    weight_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Writes metadata and float32 weights, the matrices as `weight_type`; a value of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, _value_type(value))
    for name, weight in weights.items():
        stored = weight_type if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def experts_apart(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights as older GGUF files have them, of each expert a tensor."""
    found = {}
    for name, weight in weights.items():
        parts = {name.replace("_exps.", f".{expert}."): part for expert, part in enumerate(weight)}
        found |= parts if "_exps." in name else {name: weight}
    return found


def _layer(hidden: int, kv_width: int, feed_forward: int) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv_width, hidden),
        "attn_v": (kv_width, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (feed_forward, hidden),
        "ffn_up": (feed_forward, hidden),
        "ffn_down": (hidden, feed_forward),
    }


def _weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Norms near one; matrices that keep the variance of what goes through them."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape, dtype=np.float32)
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise / np.float32(shape[-1] ** 0.5)
    return weights


def _value_type(value: Any) -> gguf.GGUFValueType:
    unsigned = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return gguf.GGUFValueType.UINT32 if unsigned else gguf.GGUFValueType.get_type(value)

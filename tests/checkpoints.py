"""Tiny checkpoints of random weights, made by transformers' own classes: folders as people have them, and GGUF of each.

Enters: an architecture's name. Leaves: transformers' model, the folder that it was saved to, and a GGUF file of the
same weights, whose queries and keys are permuted where GGUF's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kernelmux.models.folder import read_folder
from kernelmux.models.shape import Shape
from kernelmux.plan.plan import Plan
from kernelmux.run.model import Model
from tiny_model import write_gguf

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
QWEN3MOE = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GPT_OSS = {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": WINDOW}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}

LLAMA4 = {"head_dim": 16, "intermediate_size": 40, "intermediate_size_mlp": 80, "num_hidden_layers": 5}
LLAMA4 |= {"num_local_experts": 4, "attention_chunk_size": WINDOW, "floor_scale": 4, "attn_scale": 0.35}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased-untied": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7, "beta_fast": 8.0}}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3moe": ("Qwen3Moe", {**QWEN3MOE, "norm_topk_prob": True}),
    "qwen3moe-softmax": ("Qwen3Moe", {**QWEN3MOE, "num_experts": 5, "num_experts_per_tok": 5}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("Olmo2", {}),
    "olmo2-tied": ("Olmo2", {"tie_word_embeddings": True}),
    "gpt-oss": ("GptOss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}, "swiglu_limit": 1.5}),
    "gpt-oss-default": ("GptOss", {**GPT_OSS, "rope_parameters": None}),
    "llama4": ("Llama4Text", LLAMA4),
    "llama4-dense-and-sparse": ("Llama4Text", {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False}),
    "llama4-llama3": (
        "Llama4Text",
        {**LLAMA4, "rope_parameters": LLAMA3, "attn_temperature_tuning": False, "attention_chunk_size": None},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
}
IDS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1)).tolist()
"""Tokens to hold models against each other by: more than three windows."""
TESTED = (5, 24)
OLDER = {
    "gpt-oss": "clamps gates at 7.0 whatever swiglu_limit says",
    "llama4-llama3": "makes no cache of a model without chunks",
}
"""What a transformers before TESTED does (5.17 does), so that a checkpoint is none to hold against."""
PERMUTED = ("llama", "smollm3", "granite")
"""Architectures whose queries and keys GGUF stores so that neighbours turn together."""


@dataclass(frozen=True)
class Checkpoint:
    model: Any
    """transformers' model, in float32."""
    folder: Path


def make_checkpoint(name: str, folder: Path) -> Checkpoint:
    """A model of that name in CONFIGS, every weight of it random, saved to a folder."""
    import transformers

    if name in OLDER and tuple(map(int, transformers.__version__.split(".")[:2])) < TESTED:
        pytest.skip(f"transformers {transformers.__version__} {OLDER[name]}")
    stem, own = CONFIGS[name]
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **own})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too, which are ones and zeros at first; products keep the variance of what they read.
            spread = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(spread * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return Checkpoint(model, folder)


def truth_of(checkpoint: Checkpoint) -> torch.Tensor:
    """transformers' logits [IDS, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = checkpoint.model(torch.tensor([IDS])).logits[0]
    return logits


def in_parts(model: Model, plan: Plan) -> torch.Tensor:
    """Logits of IDS by a session: a prompt in two chunks, and the rest token by token."""
    session, ends = model.session(plan, len(IDS)), [5, 14, *range(15, len(IDS) + 1)]
    sequence, starts = session.open(), [0, *ends[:-1]]
    parts = zip(starts, ends, strict=True)
    return torch.cat([session.feed(sequence, IDS[a:b], all_logits=True).cpu() for a, b in parts])


def divergence(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Kullback-Leibler, in nats a token, of logits from true ones."""
    wanted, others = (logits.log_softmax(dim=-1) for logits in (truth, found))
    return float((wanted.exp() * (wanted - others)).sum(dim=-1).mean())


def write_gguf_of(folder: Path, shape: Shape, path: Path, more: Mapping[str, Any] | None = None) -> Path:
    """The folder's weights and keys as a GGUF file, which has `more` keys."""
    file = read_folder(folder)
    architecture = file.metadata["general.architecture"]
    weights = {}
    for name, weight in file.weights.items():
        dense = weight.dequantize().numpy()
        heads = {"attn_q.": shape.heads, "attn_k.": shape.kv_heads}
        for part, count in heads.items():
            if part in name and architecture in PERMUTED:
                dense = permuted(dense, count)
        weights[name] = np.ascontiguousarray(dense)
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    metadata |= more or {}
    return write_gguf(path, architecture, metadata, weights, gguf.GGMLQuantizationType.F32)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head so that what turned together half a head apart lies side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)

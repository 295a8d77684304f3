"""What tensors are called: in folders as modules of transformers, in GGUF and in graphs by what they do.

Enters: a tensor's name in a folder. Leaves: GGUF's, or the same where there is none, so that messages have it.
Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping

OUTSIDE: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

IN_LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a layer."""

IGNORED = re.compile(r"(?:model\.layers\.\d+\.self_attn\.)?(?:model\.)?rotary_emb\.inv_freq")
"""Frequencies, which older folders store though config.json states them."""

EXPERTS: Mapping[str, str] = {
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps",
    "down_proj": "ffn_down_exps",
    "up_proj": "ffn_up_exps",
}
"""Modules of an expert, Mixtral's and others'; GGUF has one tensor of all of a layer's."""

_GGUF_EXPERT = re.compile(r"(blk\.\d{1,9}\.ffn_(?:gate|down|up))\.(0|[1-9]\d{0,8})(\.weight)")
_EXPERT = re.compile(
    r"model\.layers\.(\d{1,9})\.(?:block_sparse_moe|mlp|feed_forward)\.experts\.(\d{1,9})\.(\w+)\.weight"
)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)\.(weight|bias)")
_PARAMETER = re.compile(r"model\.layers\.(\d{1,9})\.(.+?)(_bias)?")


def gguf_name(name: str, own: Mapping[str, str]) -> str:
    """GGUF's name; `own` are modules of a layer that a model type calls otherwise, or has alone."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    if found := _LAYER.fullmatch(name):
        layer, module, kind = found.groups()
        if target := {**IN_LAYER, **own}.get(module):
            return f"blk.{int(layer)}.{target}.{kind}"
    if (found := _PARAMETER.fullmatch(name)) and found[2] in own:
        return f"blk.{int(found[1])}.{own[found[2]]}.{'bias' if found[3] else 'weight'}"
    return name


def names_in_turn(name: str, experts: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Of a parameter of all of a layer's experts GGUF's names of what its outputs are in turn; none of any other."""
    found = _PARAMETER.fullmatch(name)
    kind = "bias" if found and found[3] else "weight"
    return tuple(f"blk.{int(found[1])}.{each}.{kind}" for each in experts.get(found[2], ())) if found else ()


def expert_name(name: str) -> tuple[str, int] | None:
    """Of an expert's tensor GGUF's name of that of all experts, and which of them it is; None where it is none."""
    found = _EXPERT.fullmatch(name)
    if not found or found[3] not in EXPERTS:
        return None
    return f"blk.{int(found[1])}.{EXPERTS[found[3]]}.weight", int(found[2])


def gguf_expert_name(name: str) -> tuple[str, int] | None:
    """The same of an expert's tensor in older GGUF files, which have one each: blk.N.ffn_up.E.weight."""
    found = _GGUF_EXPERT.fullmatch(name)
    return (f"{found[1]}_exps{found[3]}", int(found[2])) if found else None

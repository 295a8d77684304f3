"""Weights in MXFP4 as folders store them, in GGUF's blocks: 32 numbers of e2m1 with one scale, a power of two.

Enters: a module's tensors: bytes of two numbers each, the first in the low bits, and scales. Leaves: weights in the
format MXFP4, whose blocks are put together when they are read.
Numbers: OCP Microscaling Formats 1.0. Folders: mxfp4-pack-quantized of
https://github.com/vllm-project/compressed-tensors, and gpt-oss's experts, as
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/mxfp4.py reads them
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kernelmux.graph.formats import lookup
from kernelmux.graph.groups import integers
from kernelmux.models.module import ANY, Module
from kernelmux.models.stored import StoredPlane, StoredWeight, made_plane, stacked_weight

if TYPE_CHECKING:
    import torch

FORMAT = "MXFP4"
BYTES = ("uint8",)
BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
"""How the names of gpt-oss's parameters end."""


def compressed_mxfp4(module: Module) -> StoredWeight:
    """mxfp4-pack-quantized: weight_packed [n, k/2], weight_scale [n, k/32]."""
    packed = module.take_shaped("weight_packed", BYTES, (ANY, ANY))
    n, half = packed.shape
    scales = module.take_shaped("weight_scale", BYTES, (n, 2 * half // BLOCK))
    return _weight(module, f"{module.name}.weight", packed, scales, (n, 2 * half))


def expert_parameters(module: Module) -> list[StoredWeight]:
    """gpt-oss's: of each parameter P_blocks [experts, n, k/32, 16] and P_scales [experts, n, k/32]; its name is P's."""
    made = []
    for name in [end.removesuffix(BLOCKS) for end in module.parts if end.endswith(BLOCKS)]:
        blocks = module.take_shaped(f"{name}{BLOCKS}", BYTES, (ANY, ANY, ANY, BLOCK // 2))
        experts, n, count, _ = blocks.shape
        scales = module.take_shaped(f"{name}{SCALES}", BYTES, (experts, n, count))
        one = [slice(number, number + 1) for number in range(experts)]
        named = partial(_weight, module, f"{module.name}.{name}", shape=(n, BLOCK * count))
        made.append(stacked_weight(f"{module.name}.{name}", [named(blocks.rows(e), scales.rows(e)) for e in one]))
    return made


def _weight(
    module: Module, name: str, packed: StoredPlane, scales: StoredPlane, shape: tuple[int, int]
) -> StoredWeight:
    fmt = lookup(FORMAT)
    if fault := fmt.check(shape):
        module.fail(fault)
    plane = made_plane("uint8", fmt.planes[0].shape(shape), (packed, scales), _blocks)
    return StoredWeight(name, shape, FORMAT, (plane,))


def _blocks(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """GGUF's: the scale, then 16 bytes, which have columns 16 apart (ggml-common.h in llama.cpp)."""
    import torch

    halves = integers(packed).view(scales.numel(), 2, BLOCK // 2)
    return torch.cat([scales.reshape(-1, 1), halves[:, 0] | halves[:, 1] << 4], dim=1)

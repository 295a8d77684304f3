"""Weights of 4-bit groups as GPTQ, AWQ and compressed-tensors store them: eight numbers in an int32, the lowest first.

Enters: a module's tensors. Leaves: a weight in one of INT4_WEIGHTS (groups.py), unpacked when it is packed for a
kernel; in float32 where the inputs of a group do not lie together (act-order), which no format of groups has.
ModelError where its groups are not built in.
GPTQ: https://github.com/ModelCloud/GPTQModel; AWQ: https://github.com/casper-hansen/AutoAWQ (version gemm);
pack-quantized: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernelmux.graph.formats import ALL, INT4_GROUPS, int4_name, lookup
from kernelmux.graph.groups import in_bytes, integers
from kernelmux.models.module import ANY, Module
from kernelmux.models.stored import StoredPlane, StoredWeight, made_plane

if TYPE_CHECKING:
    import torch

SCALES = ("float16", "bfloat16")
WORDS = ("int32",)
EACH = 8
"""Numbers of an int32."""
MIDDLE = 8
"""What is added to compressed-tensors' signed numbers, and stands for zero where it states no zero points."""
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its int32, from the lowest bits on, AWQ has each of eight columns."""
AMBIGUOUS = 15
"""A zero point that GPTQ's first layout, which stores one less, has for 16, or for 0."""


def gptq_weight(module: Module, one_less: bool) -> StoredWeight:
    """Packed along the inputs: qweight [k/8, n], scales [groups, n], qzeros [groups, n/8].

    `one_less`: zero points are stored so, as by `checkpoint_format` gptq; gptq_v2's are what they are.
    """
    words = module.take_shaped("qweight", WORDS, (ANY, ANY))
    k, n = EACH * words.shape[0], words.shape[1]
    scales = module.take_shaped("scales", SCALES, (ANY, n))
    groups = scales.shape[0]
    zeros = _packed_zeros(module, groups, n)
    order = _order(module, "g_idx", k, groups)

    def zero_points(packed: torch.Tensor) -> torch.Tensor:
        found = integers(_bytes(packed))
        if one_less and (found == AMBIGUOUS).any():
            module.fail("qzeros has a 15, which stands for 16 or for 0; convert it to checkpoint_format gptq_v2")
        return (found + one_less).T

    data = made_plane("uint8", (n, k // 2), (words,), lambda packed: _bytes(packed.T))
    points = made_plane("uint8", (n, groups), (zeros,), zero_points)
    return _weight(module, (n, k), groups, data, _transposed(scales), points, order)


def awq_weight(module: Module) -> StoredWeight:
    """Packed along the outputs: qweight [k, n/8], scales [groups, n], qzeros [groups, n/8]."""
    words = module.take_shaped("qweight", WORDS, (ANY, ANY))
    k, n = words.shape[0], EACH * words.shape[1]
    scales = module.take_shaped("scales", SCALES, (ANY, n))
    groups = scales.shape[0]
    zeros = _packed_zeros(module, groups, n)

    def zero_points(packed: torch.Tensor) -> torch.Tensor:
        found = integers(_bytes(packed))
        return found.view(groups, -1, EACH)[:, :, AWQ_PLACES].reshape(groups, n).T

    data = made_plane("uint8", (n, k // 2), (words,), _by_outputs)
    points = made_plane("uint8", (n, groups), (zeros,), zero_points)
    return _weight(module, (n, k), groups, data, _transposed(scales), points)


def _by_outputs(words: torch.Tensor) -> torch.Tensor:
    """Bytes [n, k/2] of AWQ's int32 [k, n/8]: whole words are transposed first, which takes a quarter of the time."""
    import torch

    k, count = words.shape
    pairs = _bytes(words.T).view(count, k, EACH // 2).permute(2, 0, 1).contiguous()
    made = torch.empty(count, EACH, k // 2, dtype=torch.uint8)
    for column, place in enumerate(AWQ_PLACES):
        made[:, column] = in_bytes(pairs[place // 2] >> 4 * (place % 2) & 15)
    return made.view(-1, k // 2)


def compressed_weight(module: Module) -> StoredWeight:
    """pack-quantized: weight_packed [n, k/8] as it lies, weight_scale [n, groups], weight_zero_point [n/8, groups]."""
    words = module.take_shaped("weight_packed", WORDS, (ANY, ANY))
    n, k = words.shape[0], EACH * words.shape[1]
    stated = module.take_shaped("weight_shape", ("int64", "int32"), (2,)).tensor().tolist()
    if stated != [n, k]:
        module.fail(f"weight_shape is {stated}, weight_packed is of {[n, k]}")
    scales = module.take_shaped("weight_scale", SCALES, (n, ANY), (n,))
    if len(scales.shape) == 1:
        scales = replace(scales, shape=(n, 1))
    groups = scales.shape[1]
    order = _order(module, "weight_g_idx", k, groups)
    data = replace(words, dtype="uint8", shape=(n, k // 2))
    return _weight(module, (n, k), groups, data, scales, _compressed_zeros(module, n, groups), order)


def _compressed_zeros(module: Module, n: int, groups: int) -> StoredPlane:
    """Zero points as what their numbers are beside the stored ones; older folders have them unpacked."""
    import torch

    if "weight_zero_point" not in module.parts:
        return made_plane("uint8", (n, groups), (), lambda: torch.full((n, groups), MIDDLE, dtype=torch.uint8))
    packed = (-(-n // EACH), groups)
    zeros = module.take_shaped("weight_zero_point", (*WORDS, "int8"), packed, (n, groups))
    if zeros.dtype == "int8":
        return made_plane("uint8", (n, groups), (zeros,), lambda points: (points + MIDDLE).to(torch.uint8))
    if zeros.shape != packed:
        module.fail(f"tensor weight_zero_point is int32 {list(zeros.shape)}; {list(packed)} is read")
    return made_plane("uint8", (n, groups), (zeros,), lambda packed: integers(_bytes(packed.T))[:, :n].T)


def _weight(
    module: Module,
    shape: tuple[int, int],
    groups: int,
    data: StoredPlane,
    scales: StoredPlane,
    zeros: StoredPlane,
    order: StoredPlane | None = None,
) -> StoredWeight:
    """The weight of these planes; `order` is the group of each input, where groups do not lie one after another.

    ModelError where no format has such groups.
    """
    _, k = shape
    group = k // groups if k % groups == 0 and k // groups in INT4_GROUPS else ALL
    if (groups > 1 and group == ALL) or lookup(format := int4_name(group, scales.dtype)).check(shape):
        known = ", ".join(str(each) for each in INT4_GROUPS if each != ALL)
        module.fail(f"{k} inputs in {groups} groups; groups of {known}, or a multiple of 32 in one, are built in")
    planes: tuple[StoredPlane, ...] = (data, scales, zeros)
    if order is not None:
        # Exact: a scale has up to 11 bits, what it multiplies up to 5.
        format, planes = "f32", (made_plane("float32", shape, (*planes, order), _by_order),)
    return StoredWeight(f"{module.name}.weight", shape, format, planes)


def _by_order(data: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Numbers [n, k] of planes of groups; `order` [k] says which each input is of."""
    groups = order.long()
    return integers(data).float().sub_(zeros[:, groups]).mul_(scales.float()[:, groups])


def _packed_zeros(module: Module, groups: int, n: int) -> StoredPlane:
    if n % EACH:
        module.fail(f"{n} outputs are no multiple of {EACH}, which an int32 of zero points has")
    return module.take_shaped("qzeros", WORDS, (groups, n // EACH))


def _order(module: Module, end: str, k: int, groups: int) -> StoredPlane | None:
    """The group of each input, if a tensor says it and they do not lie one after another; ModelError for no such."""
    import torch

    if end not in module.parts:
        return None
    plane = module.take_shaped(end, ("int32", "int64"), (k,))
    order, in_turn = plane.tensor(), torch.arange(k) // max(1, k // groups)
    if torch.equal(order.long(), in_turn):
        return None
    if k % groups or not torch.equal(order.long().sort().values, in_turn):
        module.fail(f"{end}: each of {groups} groups needs as many of its {k} inputs; it is damaged")
    return plane


def _transposed(plane: StoredPlane) -> StoredPlane:
    return made_plane(plane.dtype, plane.shape[::-1], (plane,), lambda numbers: numbers.T)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    import torch

    return words.contiguous().view(torch.uint8)

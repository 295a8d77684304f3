"""What `prepare` makes of weights, in plain numpy: a statement for each form that this repository's backends pack."""

from __future__ import annotations

import numpy as np
import torch

import few_rows_planes
import int4_planes
import tiles
from stated import converted, raw, rounded, scales_and_zeros, values


def below(weights, planes_of, format):
    """Each plane of the matrices below one another, and the vectors after one another, in a plain format.

    Where there is no matrix, each vector is by itself.
    """
    matrices = [weight for weight in weights if len(weight.shape) == 2]
    vectors = [rounded(values(weight), format) for weight in weights[len(matrices) :]]
    if not matrices:
        return vectors
    parts = [np.concatenate([*map(_flat, several)]) for several in zip(*map(planes_of, matrices), strict=True)]
    return [*parts, *([np.concatenate(vectors)] if vectors else [])]


def _flat(part):
    return np.ascontiguousarray(part).view(np.uint8).ravel()


def each(format):
    """Every weight by itself, dense."""
    return lambda weights: [rounded(values(weight), format) for weight in weights]


def together(form, format):
    """The matrices below one another in a plain format or one of e4m3, and the biases in a plain format."""
    return lambda weights: below(weights, lambda weight: converted(weight, form), format)


def as_stored(weights):
    """The model's own bytes."""
    return [raw(plane) for weight in weights for plane in weight.planes]


def cupys(weights):
    """Matrices in tiles, or as they are stored where they are dense; biases in float32."""
    return [_cupys(weight) for weight in weights]


def _cupys(weight):
    if len(weight.shape) == 1:
        return values(weight)
    if weight.format in ("bf16", "f16"):
        return raw(weight.planes[0])
    return tiles.tiles(weight.format, weight.planes[0].numpy(), weight.shape[1])


def tritons_blocks(weights):
    """Integers, scales and pairs, of 4-bit groups zero points, each of all matrices; biases in float32."""
    return below(weights, _tritons_planes, "f32")


def _tritons_planes(weight):
    if weight.format.startswith("int4"):
        data, *rest = weight.planes
        data, *rest = few_rows_planes.of_groups(data.numpy(), *rest)
        return [data, *map(raw, rest)]
    return few_rows_planes.planes(weight.format, weight.planes[0].numpy())


def torchs_int4(weights):
    """Integers in the order that torch packs them in on this processor; scales and offsets in bfloat16."""
    (weight,) = weights
    integers, scales = int4_planes.planes(weight.format, weight.planes[0].numpy())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(integers), 1)
    return [raw(packed), rounded(scales, "bf16")]


def torchs_groups(weights):
    """The same of 4-bit groups; a row with one scale is of as large groups as torch takes."""
    (weight,) = weights
    scales, zeros = scales_and_zeros(weight)
    k = weight.shape[1]
    group = next(each for each in (128, 64, 32) if k % each == 0) if "row" in weight.format else k // scales.shape[1]
    data = raw(weight.planes[0]).reshape(len(scales), -1)
    integers, numbers = int4_planes.of_groups(data, scales, zeros, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(integers), 1)
    return [raw(packed), rounded(numbers, "bf16")]


def torchs_blocks(weights):
    """e4m3 with scales of 128 by 128, of which rows are padded to fours with zeros."""
    (weight,) = weights
    codes, scales = converted(weight, "fp8_128x128")
    grid = scales.view(np.float32).reshape(-(-weight.shape[0] // 128), -1)
    return [codes, np.pad(grid, ((0, 0), (0, -grid.shape[1] % 4)))]


STATED = {
    **{f"reference/{format}": each(format) for format in ("f32", "f64")},
    **{"cupy/dp4a": cupys, "cupy/bf16": cupys, "cupy/f16": cupys, "cupy/f32": each("f32"), "cupy/file": as_stored},
    **{f"triton/{form}": together(form, "f32") for form in ("f32", "bf16", "f16")},
    **{f"triton/{form}": together(form, "f32") for form in ("fp8_tensor", "fp8_row", "fp8_128x128")},
    "triton/dequant": tritons_blocks,
    **{f"torch/{form}": together(form, form) for form in ("f32", "bf16", "f16")},
    **{f"torch/{form}": together(form, "bf16") for form in ("fp8_tensor", "fp8_row")},
    **{"torch/fp8_128x128": torchs_blocks, "torch/int4": torchs_int4, "torch/int8": torchs_int4},
    "torch/int4_groups": torchs_groups,
    "torch/file": as_stored,
}
"""By backend and form: the bytes of each packed tensor, of a node's weights."""
STATED_BACKENDS = {form.partition("/")[0] for form in STATED}

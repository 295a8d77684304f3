"""How weights are stored, in plain numpy: values of any weight, and planes of values, to the bit.

Independent of core: GGUF's types by the gguf package, e4m3 by its definition (Micikevicius et al. 2022,
arXiv:2209.05433), all rounding to the nearest with ties to even. Also weights to try it on, at any place in memory.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch

from kernelmux.graph.formats import Value, Weight, empty_planes, lookup, quantize_planes
from kernelmux.graph.ops.blocks import random_groups

E4M3 = np.array([(c % 8 / 8 + (c > 7)) * 2.0 ** (max(c // 8, 1) - 7) for c in range(127)])
"""The values of e4m3's codes without sign; code 127 is no number."""

NUMPY = {"f64": np.float64, "f32": np.float32, "f16": np.float16}


def raw(tensor):
    """A tensor's bytes, in its own order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def values(weight):
    """A weight's float32 values [n, k], or [k]."""
    parts = [raw(plane) for plane in weight.planes]
    if weight.format.startswith("fp8"):
        n, k = weight.shape
        codes, scales = parts[0].reshape(n, k), parts[1].view(np.float32)
        sign = np.where(codes > 127, np.float32(-1), np.float32(1))
        return sign * E4M3.astype(np.float32)[codes & 127] * spread(scales, weight.format, n, k)
    if weight.format.startswith("int4"):
        n, k = weight.shape
        scales, zeros = scales_and_zeros(weight)
        q = np.stack([parts[0] & 15, parts[0] >> 4], axis=1).reshape(n, scales.shape[1], -1).astype(np.float32)
        return (scales[..., None] * (q - zeros[..., None])).reshape(n, k)
    if weight.format in NUMPY:
        return parts[0].view(NUMPY[weight.format]).astype(np.float32).reshape(weight.shape)
    if weight.format == "bf16":
        return (parts[0].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(weight.shape)
    return gguf.dequantize(parts[0], gguf.GGMLQuantizationType[weight.format]).reshape(weight.shape)


def scales_and_zeros(weight):
    """The float32 scales and the zero points, [n, groups], of a weight of 4-bit groups."""
    _, scales, zeros = weight.planes
    bits = raw(scales)
    if weight.format.endswith("bf16"):
        numbers = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = bits.view(np.float16).astype(np.float32)
    return numbers.reshape(tuple(scales.shape)), raw(zeros).reshape(tuple(zeros.shape))


def spread(scales, format, n, k):
    """The scales of e4m3 weights [n, k], one an element."""
    tall, wide = {"fp8_tensor": (n, k), "fp8_row": (1, k), "fp8_128x128": (128, 128)}[format]
    grid = scales.reshape(-(-n // tall), -(-k // wide))
    return grid.repeat(tall, axis=0)[:n].repeat(wide, axis=1)[:, :k]


def rounded(numbers, format):
    """Float32 numbers in a plain format: bfloat16 as uint16."""
    if format == "bf16":
        bits = np.ascontiguousarray(numbers).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return numbers.astype(NUMPY[format])


def e4m3(numbers):
    """The codes that are nearest to float32 numbers of magnitude up to 448: eight of each power of two from 2^-6 on."""
    size = np.abs(numbers).astype(np.float64)
    power = np.frexp(np.maximum(size, 2.0**-6))[1] - 1
    return (8 * (power + 6) + np.rint(np.ldexp(size, 3 - power)) + 128 * np.signbit(numbers)).astype(np.uint8)


def quantized(numbers, format):
    """Codes and float32 scales of float32 numbers [n, k]: the largest of those that share a scale is 448."""
    n, k = numbers.shape
    tall, wide = {"fp8_tensor": (n, k), "fp8_row": (1, k), "fp8_128x128": (128, 128)}[format]
    peaks = [
        [np.abs(numbers[row : row + tall, column : column + wide]).max() for column in range(0, k, wide)]
        for row in range(0, n, tall)
    ]
    scales = np.array(peaks, np.float32) / np.float32(448)
    steps = numbers / np.maximum(spread(scales, format, n, k), np.finfo(np.float32).tiny)
    return e4m3(np.clip(steps, -448, 448)), scales


def converted(weight, format):
    """A weight's planes in a plain format or one of e4m3; its own where it is stored so, or its codes."""
    if weight.format == format:
        return [raw(plane) for plane in weight.planes]
    if format.startswith("fp8"):
        if (weight.format, format) == ("fp8_tensor", "fp8_row"):
            return [raw(weight.planes[0]), raw(weight.planes[1]).view(np.float32).repeat(weight.shape[0])]
        return [*quantized(values(weight), format)]
    return [rounded(values(weight), format)]


def random_weight(name, shape, format, generator):
    """A weight of finite values: any blocks, or noise of rows that differ in size."""
    fmt = lookup(format)
    if format.startswith("int4"):
        return Weight(name, shape, format, random_groups(format, shape, generator))
    if fmt.gguf is None or fmt.plain:
        planes = empty_planes(Value(name, shape, format))
        rows = 2.0 ** torch.randint(-3, 4, (shape[0], *(1 for _ in shape[1:])), generator=generator)
        quantize_planes(format, torch.randn(shape, generator=generator) * rows, planes)
        return Weight(name, shape, format, planes)
    blocks = any_blocks(shape, format, generator)
    each = blocks.view(-1, fmt.planes[0].items)
    with np.errstate(all="ignore"):
        found = gguf.dequantize(each.numpy(), gguf.GGMLQuantizationType[format])
    each[~torch.from_numpy(np.isfinite(found).all(axis=1))] &= 0x3F
    return Weight(name, shape, format, (blocks,))


def any_blocks(shape, format, generator):
    """Blocks of any bytes: scales that are infinite or no number among them."""
    return torch.randint(256, lookup(format).planes[0].shape(shape), dtype=torch.uint8, generator=generator)


def placed(weight, start, mapped):
    """The weight as views into larger memory, `start` items after its start: of a mapped file's, or of a tensor's."""
    planes = []
    for plane in weight.planes:
        if mapped:
            size = plane.itemsize
            memory = bytearray(start * size) + bytearray(raw(plane).tobytes()) + bytearray(64)
            flat = torch.frombuffer(memory, dtype=plane.dtype, count=plane.numel(), offset=start * size)
        else:
            flat = torch.zeros(start + plane.numel() + 1, dtype=plane.dtype)[start:-1]
            flat.copy_(plane.flatten())
        planes.append(flat.view(plane.shape))
    return Weight(weight.name, weight.shape, weight.format, tuple(planes))

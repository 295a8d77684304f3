"""mul_mat on the CPU: dense f32 and bf16, and torch's packed int4 kernel for 4-bit and 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from kernelmux.contract import Declined, Efficiency, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.graph.formats import INT4_WEIGHTS, Value, Weight, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.groups import integers as stored_integers
from kernelmux_torch.kernel import TorchKernel, best_of

GROUP = 32
"""Columns that share a scale, in Q4_0, Q4_1 and Q8_0 and so in the packed forms."""
GROUPS = (128, 64, 32)
"""Of those that torch's int4 kernel takes, what rows with one scale are divided into."""
F32_HALF = {"avx512": 45, "": 25}
"""Rows at which a product in float32 is half as fast as at many, for its weights are laid out anew at each call; by the
best feature of the processor. Here and below: fitted to one thread's times of SmolLM2's matrices at 1 to 512 rows."""
BF16_HALF = {"amx": 150, "bf16": 13, "avx512": 8, "": 3}
INT4_HALF = 1.2
INT4_SHARE = {"avx512": 0.44, "avx2": 0.38, "": 0.02}
"""What torch's int4 kernel reaches of what its products in float32 do."""

int4_mul_mat = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class F32(TorchKernel):
    """Weights dequantised to float32, float32 in and out."""

    ops: tuple[str, ...] = ("mul_mat",)
    devices: tuple[str, ...] = ("cpu",)
    name = "f32"
    precision = 1e-11
    packed = "f32"
    input_formats: Sequence[str] = ("f32",)
    output_formats: Sequence[str] = ("f32",)
    efficiency = Efficiency(reading=0.9, multiplying=0.8)

    def reaches(self, node: TensorNode) -> Efficiency:
        if self.device.kind != "cpu":
            return self.efficiency
        share = node.rows / (node.rows + self.half_rows(node))
        return Efficiency(reading=0.95, multiplying=0.95 * share, arithmetic=self.efficiency.arithmetic)

    def half_rows(self, node: TensorNode) -> float:
        """Rows at which a processor does half as much as at many."""
        # One row is multiplied with the weights as they lie.
        return 0 if node.rows == 1 else best_of(F32_HALF, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What weights are made."""
        return lookup(self.packed).dtype

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), y, (weight, *bias) = tensors.inputs, tensors.matrix, tensors.packed
        if bias:
            return partial(torch.addmm, bias[0], x, weight.T, out=y)
        if y.dtype == x.dtype:
            return partial(torch.mm, x, weight.T, out=y)
        return partial(torch.mm, x, weight.T, out_dtype=y.dtype, out=y)


class Bf16(F32):
    """Weights and activations in bfloat16, summed in float32: emulated, far slower than f32, where no unit has it."""

    name = "bf16"
    precision = 5e-5
    packed = "bf16"
    input_formats = output_formats = ("bf16",)
    efficiency = Efficiency(reading=0.9, multiplying=0.8, arithmetic="bf16")

    def half_rows(self, node: TensorNode) -> float:
        return best_of(BF16_HALF, self.device)

    def comes_late(self, node: TensorNode) -> bool:
        return self.device.kind == "cpu" and "bf16" not in self.device.features


class Int4(TorchKernel):
    """Q4_0 and Q4_1 as stored: 4-bit integers with a scale and an offset per 32 columns, bfloat16 activations.

    torch's kernel computes w = (q - 8) * scale + offset with both in bfloat16, so Q4_1's minimum is stated from the
    middle of the range: d q + m = (q - 8) d + (m + 8 d), whose offset is small and loses little.
    """

    ops = ("mul_mat",)
    devices = ("cpu",)
    name = "int4"
    precision = 5e-5
    planes = 1
    """Of four bits each: each is multiplied."""
    packed = "int4"
    takes: Mapping[str, object] = {"weight_format": ("Q4_0", "Q4_1")}
    input_formats = ("bf16",)
    # torch allocates its result, so that it is copied in any case: into either format at one cost.
    output_formats = ("f32", "bf16")
    rounds_to = "bf16"

    def refuses(self, node: TensorNode) -> Declined | None:
        if (n := node.weight[0].extents[0]) % 16:
            return Declined(f"torch packs outputs in sixteens, n = {n}", "alignment")
        return Declined("torch's int4 kernel adds no bias", "unsupported") if node.bias else None

    def reaches(self, node: TensorNode) -> Efficiency:
        share = best_of(INT4_SHARE, self.device) / self.planes
        return Efficiency(reading=0.9, multiplying=share * node.rows / (node.rows + INT4_HALF))

    def group(self, weight: Value | Weight) -> int:
        """Columns that share a scale and an offset."""
        return GROUP

    def packed_bytes(self, node: TensorNode) -> int:
        n, k = node.weight[0].extents
        return n * k // 2 + n * k // self.group(node.weight[0]) * 4

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        integers, scales, offsets = self.unpack(weights[0])
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        # torch's scales and offsets: [k / group, n, 2].
        return packed, torch.stack([scales.T, offsets.T], dim=-1).to(torch.bfloat16).contiguous()

    def unpack(self, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integers [n, k] 0..15, scales and offsets [n, k / group] of w = (q - 8) * scale + offset.

        A block holds the scale d, of Q4_1 also the minimum m, in float16, then 16 bytes: low nibbles are the first 16
        columns, high nibbles the last 16 (ggml's quantisation formats).
        """
        header = 2 if weight.format == "Q4_0" else 4
        blocks = weight.planes[0].unflatten(-1, (-1, header + 16))
        params = blocks[..., :header].contiguous().view(torch.float16).float()
        nibbles = blocks[..., header:]
        integers = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).to(torch.int32).flatten(1)
        scales = params[..., 0]
        offsets = params[..., 1] + 8 * scales if header == 4 else torch.zeros_like(scales)
        return integers, scales, offsets

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,) = tensors.inputs, tensors.outputs
        (integers, scales), group = tensors.packed, self.group(node.weight[0])
        return lambda: y.copy_(int4_mul_mat(x, integers, group, scales))


class Int4Groups(Int4):
    """Groups of 4-bit integers: scale * (q - zero) = (q - 8) * scale + (8 - zero) * scale, both in bfloat16."""

    name = packed = "int4_groups"
    takes = {"weight_format": INT4_WEIGHTS}

    def group(self, weight: Value | Weight) -> int:
        """Rows with one scale are as many groups with the same one as torch takes."""
        columns = weight.shape[-1]
        assert isinstance(columns, int)
        return lookup(weight.format).planes[1].cols or next(each for each in GROUPS if columns % each == 0)

    def unpack(self, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        data, scales, zeros = weight.planes
        scales = scales.float()
        offsets = scales * (8 - zeros.float())
        repeats = weight.shape[1] // (self.group(weight) * scales.shape[1])
        spread = (part.repeat_interleave(repeats, dim=1) for part in (scales, offsets))
        return stored_integers(data).to(torch.int32), *spread


class Int8(Int4):
    """Q8_0 without loss of integers: q = 16 h + l, as two 4-bit planes side by side that both multiply x.

    x Wᵀ = [x, x] [16 d h, d l]ᵀ, with h = floor(q / 16) in -8..7 and l in 0..15: one int4 call.
    """

    name = "int8"
    planes = 2
    packed = "int8"
    takes = {"weight_format": ("Q8_0",)}

    def packed_bytes(self, node: TensorNode) -> int:
        return 2 * super().packed_bytes(node)

    def unpack(self, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        blocks = weight.planes[0].unflatten(-1, (-1, 34))
        scales = blocks[..., :2].contiguous().view(torch.float16).float().squeeze(-1)
        integers = blocks[..., 2:].contiguous().view(torch.int8).to(torch.int32)
        high, low = integers >> 4, integers & 15
        return (
            torch.cat([high + 8, low], dim=1).flatten(1),
            torch.cat([16 * scales, scales], dim=1),
            torch.cat([torch.zeros_like(scales), 8 * scales], dim=1),
        )

    def workspace(self, node: TensorNode) -> int:
        m, k = node.inputs[0].extents
        return 2 * k * m * 2

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), (y,), (integers, scales) = tensors.inputs, tensors.outputs, tensors.packed
        assert tensors.workspace is not None
        twice = tensors.workspace.view(torch.bfloat16).view(x.shape[0], 2, x.shape[1])
        flat, once = twice.flatten(1), x.unsqueeze(1)

        def launch() -> None:
            twice.copy_(once)
            y.copy_(int4_mul_mat(flat, integers, GROUP, scales))

        return launch

"""mul_mat of e4m3 weights and activations in torch's scaled GEMMs (cuBLASLt on CUDA), by how they are scaled.

Weights in any format are quantised once; one that is stored in the same scheme is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from kernelmux.contract import Declined, Efficiency, Launch, Tensors
from kernelmux.contract.device import Device
from kernelmux.contract.fast_sums import too_long
from kernelmux.contract.weights import below, converted
from kernelmux.graph.formats import Weight, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux_torch.cuda.mul_mat import STACKED
from kernelmux_torch.kernel import TorchKernel

BLOCK = 128
"""Columns, and of weights also rows, that share a scale in `fp8_block`."""
PADDED = 4
"""cuBLASLt wants block scales 16 bytes apart: rows of x, and blocks along k, in fours."""


class Fp8Tensor(TorchKernel):
    """One scale for all activations and one for the weight, summed in float32."""

    ops: tuple[str, ...] = ("mul_mat",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    capability = (8, 9)
    name = "fp8_tensor"
    precision = 6e-3
    packed = "fp8_tensor"
    input_formats: Sequence[str] = ("fp8_tensor",)
    # At few rows and long k a second launch adds the parts of a split sum.
    on_card = 2
    efficiency = Efficiency(reading=0.7, multiplying=0.8, arithmetic="fp8")
    side_by_side = True
    fast = False

    def refuses(self, node: TensorNode) -> Declined | None:
        n, k = _sizes(node)
        if self.device.kind != "cpu" and (n % 16 or k % 16):
            return Declined(f"cuBLASLt takes n and k in sixteens, they are {n} and {k}", "alignment")
        return too_long(node) if self.fast else None

    def reaches(self, node: TensorNode) -> Efficiency:
        # A processor makes all of them float32 at each call.
        return Efficiency(reading=0.015, multiplying=0.1) if self.device.kind == "cpu" else self.efficiency

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        # cuBLASLt adds a bias to bf16 only.
        alone = len(node.outputs) == 1 and not node.bias
        return [["bf16", "f32"] if alone else ["bf16"] for _ in node.outputs]

    def packed_bytes(self, node: TensorNode) -> int:
        matrices = sum(lookup(self.packed).nbytes(weight.extents) for weight in node.weight)
        return matrices + sum(2 * bias.extents[0] for bias in node.bias)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[Tensor, ...]:
        return below(weights, lambda matrix: converted(matrix, self.packed, device), torch.bfloat16, device)

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        (x,), y, (weight, scales, *biases) = tensors.inputs, tensors.matrix, tensors.packed
        operands, bias = (*x, weight, scales), biases[0] if biases else None
        if y.device.type == "cpu":
            return partial(_multiply_on_cpu, *operands, bias, y)
        if bias is None or not self.fast:
            return scaled_mm(*operands, bias, y, self.fast)
        # cuBLASLt has none of these with a bias at few rows and outputs and long k (1 and 32, from 6144 on).
        multiply = scaled_mm(*operands, None, y, self.fast)

        def launch_with_bias() -> None:
            multiply()
            y.add_(bias)

        return launch_with_bias


class Fp8Row(Fp8Tensor):
    """A scale for each row of the activations, and one for each output."""

    ops = ("mul_mat", *STACKED)
    name = "fp8_row"
    packed = "fp8_row"
    input_formats = ("fp8_row",)

    def refuses(self, node: TensorNode) -> Declined | None:
        return _not_hopper(self.device) or super().refuses(node)


class Fp8TensorFast(Fp8Tensor):
    """The same with the tensor cores' own sums, of fewer bits than float32 has and so of no more than 2048 products."""

    devices = ("cuda",)
    name = "fp8_tensor_fast"
    precision = 7e-3
    fast = True
    # A bias is added by one of its own.
    on_card = 3


class Fp8RowFast(Fp8Row):
    """The same with the tensor cores' own sums, of fewer bits than float32 has and so of no more than 2048 products."""

    devices = ("cuda",)
    name = "fp8_row_fast"
    precision = 7e-3
    fast = True
    # A bias is added by one of its own.
    on_card = 3


class Fp8Block(Fp8Tensor):
    """A scale for 128 columns of each row of the activations, and one for 128 by 128 of the weight.

    Where m is no multiple of four, the rows and their scales go through padded scratch: three launches more.
    """

    devices = ("cuda",)
    name = "fp8_block"
    packed = "fp8_128x128"
    on_card = 5
    input_formats = ("fp8_block",)

    def refuses(self, node: TensorNode) -> Declined | None:
        n, k = _sizes(node)
        if (refused := _not_hopper(self.device)) is not None:
            return refused
        if n % BLOCK or k % BLOCK:
            reason = f"its scales are those of {BLOCK} by {BLOCK} weights, n and k are {n} and {k}"
            return Declined(reason, "alignment")
        return Declined("torch's block-scaled GEMM adds no bias", "unsupported") if node.bias else None

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        return [["bf16"]]

    def packed_bytes(self, node: TensorNode) -> int:
        n, k = node.weight[0].extents
        return n * k + 4 * n // BLOCK * _padded(k // BLOCK)

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[Tensor, ...]:
        data, scales = converted(weights[0], self.packed, device)
        padded = scales.new_zeros(len(scales), _padded(scales.shape[1]))
        padded[:, : scales.shape[1]] = scales
        return data, padded

    def workspace(self, node: TensorNode) -> int:
        (m, k), n = node.inputs[0].extents, node.weight[0].extents[0]
        rows = _padded(m)
        return rows * (4 * (k // BLOCK) + 2 * n + k) if rows > m else 0

    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        ((x, x_scales),), (y,), (weight, scales) = tensors.inputs, tensors.outputs, tensors.packed
        (m, k), n, rows = x.shape, y.shape[1], _padded(x.shape[0])
        if rows == m:
            return scaled_mm_blocks(x, x_scales, weight, scales, y)
        assert tensors.workspace is not None
        parts = tensors.workspace.split([4 * rows * (k // BLOCK), 2 * rows * n, rows * k])
        taken_scales = parts[0].view(x_scales.dtype).view(k // BLOCK, rows)
        written, taken = parts[1].view(y.dtype).view(rows, n), parts[2].view(x.dtype).view(rows, k)
        multiply = scaled_mm_blocks(taken, taken_scales, weight, scales, written)

        def launch_padded() -> None:
            # What the rows beyond m hold shows in no row but themselves.
            taken[:m].copy_(x)
            taken_scales[:, :m].copy_(x_scales)
            multiply()
            y.copy_(written[:m])

        return launch_padded


def scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, fast: bool
) -> Launch:
    """torch's GEMM of x [m, k] and weight [n, k]; it tells the scheme from the scales' shapes, one or a row's each."""
    operands = (x, weight.T, x_scales, scales.T)
    return partial(torch._scaled_mm, *operands, bias=bias, out_dtype=y.dtype, use_fast_accum=fast, out=y)


def scaled_mm_blocks(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, y: Tensor) -> Launch:
    """torch's GEMM of x [m, k], scales [k/128, m], and weight [n, k], scales [n/128, k/128 padded to fours]."""
    activations, weights = ScalingType.BlockWise1x128.value, ScalingType.BlockWise128x128.value
    operands = (x, weight.T, [x_scales.T], [activations], [], [scales.T], [weights], [])
    return partial(torch.ops.aten._scaled_mm_v2.out, *operands, None, y.dtype, out=y)


def _multiply_on_cpu(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """The same in float32: torch's own fp8 GEMM is a plain loop there, a thousand times slower."""
    product = (x.float() @ weight.float().T).mul_(x_scales).mul_(scales.T)
    y.copy_(product if bias is None else product.add_(bias))


def _sizes(node: TensorNode) -> tuple[int, int]:
    """n of all weights, and k."""
    return sum(weight.extents[0] for weight in node.weight), node.weight[0].extents[1]


def _not_hopper(device: Device) -> Declined | None:
    """Elsewhere torch takes a kernel of CUTLASS instead, which ignores the current stream before torch 2.12."""
    if device.capability is None or device.capability[0] == 9:
        return None
    return Declined(f"it needs compute capability 9.x, this device has {device.capability}", "capability")


def _padded(count: int) -> int:
    return -(-count // PADDED) * PADDED

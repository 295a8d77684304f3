"""mul_mat and the fused ops that hold one."""

from __future__ import annotations

import dataclasses

import torch

from wrong.kernel import Right, planted


@planted("mul_mat", "error", first="*-bias")
class DropsTheBias(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


@planted("qkv", "error")
class DropsTheBiasOfQkv(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


@planted("gate_up_swiglu", "error")
class DropsTheBiasOfGateUpSwiglu(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


@planted("mul_mat_add", "error")
class DropsTheBiasOfMulMatAdd(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


def without_tail(operands, tile):
    """The operands, columns beyond the last whole tile left out."""
    (x,), (weight,) = operands.inputs, operands.weight
    k = x.shape[1] // tile * tile
    return dataclasses.replace(operands, inputs=(x[:, :k],), weight=(weight[:, :k],))


@planted("mul_mat", "error", first="*-k96")
class DropsTheTailOf64(Right):
    def answer(self, node, operands):
        return super().answer(node, without_tail(operands, 64))


@planted("mul_mat", "error", first="*-k127")
class DropsTheTailOf32(Right):
    """No column of a quantised weight, but of f32, f16 and bf16."""

    def answer(self, node, operands):
        return super().answer(node, without_tail(operands, 32))


@planted("mul_mat", "error", first="*-k17")
class DropsTheTailOf4(Right):
    """Loads four at a time."""

    def answer(self, node, operands):
        return super().answer(node, without_tail(operands, 4))


@planted("mul_mat", "error", first="*-k14336")
class SumsOver8192AtMost(Right):
    def answer(self, node, operands):
        (x,), (weight,) = operands.inputs, operands.weight
        return super().answer(node, dataclasses.replace(operands, inputs=(x[:, :8192],), weight=(weight[:, :8192],)))


@planted("mul_mat", "error")
class StartsAfterTheFirstBlock(Right):
    """Of 256 columns, where there are more."""

    def answer(self, node, operands):
        (x,), (weight,) = operands.inputs, operands.weight
        k = 256 if x.shape[1] > 256 else 0
        return super().answer(node, dataclasses.replace(operands, inputs=(x[:, k:],), weight=(weight[:, k:],)))


@planted("mul_mat", "written", first="*-n7-*")
class LeavesTheLastTileOfOutputsUnwritten(Right):
    def write(self, node, tensors, results):
        n = results[0].shape[1] // 32 * 32
        tensors.outputs[0][:, :n] = results[0][:, :n]


@planted("mul_mat", "error")
class ReadsTheWeightTransposed(Right):
    def answer(self, node, operands):
        (weight,) = operands.weight
        return super().answer(node, dataclasses.replace(operands, weight=(weight.reshape(weight.shape[::-1]).T,)))


@planted("mul_mat", "error", first="*-m200-*")
class RowsAfterThe128thFromTheFirstTile(Right):
    def answer(self, node, operands):
        (y,) = super().answer(node, operands)
        return (torch.cat([y[:128], y[: max(len(y) - 128, 0)]]) if len(y) > 128 else y,)


@planted("mul_mat", "written", first="*-n4099-*")
class OutputsAfterThe4096thUnwritten(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0][:, :4096] = results[0][:, :4096]


class Narrow(Right):
    """Each row of x in 8 bits with a scale of its own, results in bfloat16."""

    dtype = torch.float32
    precision = 5e-3
    narrow = torch.bfloat16

    def peaks(self, x):
        return x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)

    def answer(self, node, operands):
        x, *rest = operands.inputs
        scales = self.peaks(x) / 127
        (y,) = super().answer(node, dataclasses.replace(operands, inputs=((x / scales).round() * scales, *rest)))
        return (y.to(self.narrow).float(),)


@planted("mul_mat", "finite", first="*-zero-row")
class NanForARowOfZeros(Narrow):
    def peaks(self, x):
        return x.abs().amax(dim=-1, keepdim=True)


@planted("mul_mat", "error", first="*-uneven")
class OneScaleForAllRowsOfX(Narrow):
    """Small rows drown beside large ones."""

    def peaks(self, x):
        return x.abs().amax().clamp(min=1e-30)


@planted("mul_mat", "error", first="mul_mat-Q6_K-*-bias")
class DropsTheBiasBesideLargeProducts(Narrow):
    """A bias of N(0, 1) would be less than the error it declares."""

    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=()))


@planted("mul_mat", "error", first="*-n257-*-bias")
class AddsTheBiasOfTheFirstTile(Narrow):
    """To every 64 outputs."""

    def answer(self, node, operands):
        bias = tuple(part[torch.arange(len(part)) % 64] for part in operands.bias)
        return super().answer(node, dataclasses.replace(operands, bias=bias))


@planted("mul_mat", "error", first="*-m1031-*")
class RowsAfterThe1024thAreZero(Narrow):
    def answer(self, node, operands):
        (y,) = super().answer(node, operands)
        y[1024:] = 0
        return (y,)


@planted("mul_mat", "written", first="*-n65600-*")
class OutputsAfterThe65535thUnwritten(Right):
    """A grid of blocks in its second axis."""

    def write(self, node, tensors, results):
        tensors.outputs[0][:, :65535] = results[0][:, :65535]


@planted("mul_mat", "error", first="*-outliers")
class ScaleThatEndsAt8(Narrow):
    """N(0, 1) stays within it."""

    def answer(self, node, operands):
        (x,) = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x.clamp(-8, 8),)))


@planted("mul_mat", "finite", first="*-outliers")
class ResultsInFloat16(Narrow):
    """Beyond 65504 they are infinite."""

    narrow = torch.float16


@planted("mul_mat", "error", first="*-n1536-*")
class LosesOneOutputOfMany(Narrow):
    """One in 1,536 is less than its bound on the whole."""

    def answer(self, node, operands):
        (y,) = super().answer(node, operands)
        y[:, 1000:1001] = 0
        return (y,)


@planted("qkv", "error")
class SwapsKeysAndValues(Right):
    def answer(self, node, operands):
        q, k, v = super().answer(node, operands)
        return q, v, k


@planted("qkv", "error", first="*-bias")
class AddsTheBiasOfKeysToValues(Right):
    """They have one width."""

    def answer(self, node, operands):
        bias = (*operands.bias[:2], *operands.bias[1:2])
        return super().answer(node, dataclasses.replace(operands, bias=bias))


@planted("qkv", "error", first="*-n576-*")
class WidthsOfTheFirstModelOnly(Right):
    """Keys and values of 32 columns."""

    def answer(self, node, operands):
        q, k, v = super().answer(node, operands)
        k[:, 32:] = 0
        v[:, 32:] = 0
        return q, k, v


@planted("gate_up_swiglu", "error", first="*-bias")
class SwapsTheBiasesOfGateAndUp(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, bias=operands.bias[::-1]))


@planted("gate_up_swiglu", "error")
class SwapsGateAndUp(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, weight=operands.weight[::-1]))


@planted("gate_up_swiglu", "finite")
class NanFarAboveZeroInside(Right):
    """The sigmoid by exp(x), in float32."""

    precision = 1e-9

    def answer(self, node, operands):
        (x,) = operands.inputs
        biases = operands.bias or (0.0, 0.0)
        gate, up = ((x @ w.T + b).float() for w, b in zip(operands.weight, biases, strict=True))
        return (gate * gate.exp() / (1 + gate.exp()) * up,)


@planted("mul_mat_add", "error", first="*-loud")
class AddsTheFirstRowOfTheResidual(Narrow):
    def answer(self, node, operands):
        x, residual = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x, residual[:1].expand_as(residual))))


@planted("mul_mat_add", "error")
class DropsTheResidual(Right):
    def answer(self, node, operands):
        x, residual = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x, torch.zeros_like(residual))))


@planted("mul_mat_add", "in place")
class WritesTheProductFirst(Right):
    """Over the residual that it adds after."""

    def launch(self, node, tensors):
        operands = self.read(node, tensors)
        (x, residual), (y,) = operands.inputs, tensors.outputs
        y.copy_(super().answer(node, dataclasses.replace(operands, inputs=(x, torch.zeros_like(residual))))[0])
        y.add_(tensors.inputs[1])

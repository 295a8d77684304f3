"""add, mul, silu, swiglu, temper and convert."""

from __future__ import annotations

import dataclasses

import torch

from kernelmux.graph.formats import as_tuple, dequantize_planes
from wrong.kernel import Right, planted


@planted("mul", "error")
class AddsInsteadOfMultiplying(Right):
    def answer(self, node, operands):
        a, b = operands.inputs
        return (a + b,)


@planted("temper", "error")
class TempersByThePositionItself(Right):
    def answer(self, node, operands):
        x, positions = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x, positions - 1)))


@planted("temper", "error")
class TempersAllRowsByTheFirst(Right):
    def answer(self, node, operands):
        x, positions = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x, positions[:1].expand(positions.shape))))


@planted("temper", "error", first="*-span-*")
class MultipliesByOneOverTheSpan(Right):
    """In float32, whose product lies below a whole number at the start of some spans."""

    def answer(self, node, operands):
        x, positions = operands.inputs
        passed = ((positions + 1).float() * torch.tensor(1 / node.span)).floor()
        return ((x * (1 + node.scale * passed.to(x.dtype).log1p()).unsqueeze(1)),)


@planted("silu", "error")
class LeavesOutTheGate(Right):
    def answer(self, node, operands):
        return (operands.inputs[0].sigmoid(),)


class InFloat32(Right):
    dtype = torch.float32
    precision = 1e-10


@planted("silu", "finite", first="*-far")
class NanFarBelowZero(InFloat32):
    """Infinity over infinity."""

    def answer(self, node, operands):
        (x,) = operands.inputs
        return (x - x * (-x).exp() / (1 + (-x).exp()),)


@planted("silu", "finite", first="*-far")
class NanFarAboveZero(InFloat32):
    def answer(self, node, operands):
        (x,) = operands.inputs
        return (x * x.exp() / (1 + x.exp()),)


@planted("swiglu", "finite", first="*-outliers")
class NanFarAboveZeroInTheGate(InFloat32):
    def answer(self, node, operands):
        gate, up = operands.inputs
        return (gate * gate.exp() / (1 + gate.exp()) * up,)


@planted("swiglu", "error")
class TakesGateForUp(Right):
    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, inputs=operands.inputs[::-1]))


@planted("swiglu", "in place")
class WritesTheGateFirst(Right):
    """Right over up, not over gate."""

    def launch(self, node, tensors):
        (gate, up), (y,) = tensors.inputs, tensors.outputs
        torch.sigmoid(gate, out=y)
        y.copy_(y.double() * gate * up)


class ToBf16(Right):
    """It can round to bfloat16 on the way out."""

    def outputs(self, node):
        return [["f32", "bf16"]]


@planted("add", "error", first="*=bf16")
class TruncatesToBf16(ToBf16):
    """A shift by 16 bits, where the contract rounds to nearest."""

    def write(self, node, tensors, results):
        if node.outputs[0].format == "bf16":
            results = [truncated(results[0])]
        super().write(node, tensors, results)


@planted("convert", "error", first="*-bf16-*")
class TruncatesWhereItConverts(Right):
    def write(self, node, tensors, results):
        if node.outputs[0].format == "bf16":
            results = [truncated(results[0])]
        super().write(node, tensors, results)


def truncated(values):
    """The upper half of each float32."""
    return (values.float().view(torch.int32) & -65536).view(torch.float32)


@planted("convert", "error", first="*-q8_32-*")
class LeavesTheSumsOfQ8Zero(Right):
    """Who reads the format for a weight with a minimum gets wrong numbers."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "q8_32":
            tensors.outputs[0][2].zero_()


@planted("convert", "error", first="*-q8_32-*")
class SumsQ8BeforeTheScale(Right):
    """The sum of the integers."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "q8_32":
            tensors.outputs[0][2].div_(tensors.outputs[0][1])


@planted("convert", "error", first="*-q8_32-uneven-blocks")
class OneScaleForTwoBlocksOfQ8(Right):
    """As a format with blocks of 64 has it."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "q8_32":
            data, scales, sums = tensors.outputs[0]
            peaks = scales.view(len(scales), -1, 2).amax(dim=-1)
            scales.copy_(peaks.repeat_interleave(2, dim=-1))
            blocks = (results[0].view(*scales.shape, -1) / scales.unsqueeze(-1).clamp(min=1e-30)).round()
            data.copy_(blocks.flatten(1))
            sums.copy_((blocks * scales.unsqueeze(-1)).sum(dim=-1))


@planted("convert", "error", first="*-m512-*")
class ScalesRowsAfterThe256thByTheFirst(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "fp8_row":
            scales = tensors.outputs[0][1]
            scales[256:] = scales[:1]


@planted("convert", "error", first="*-fp8_*")
class EndsAt240(Right):
    """As the e4m3 of another maker does."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format.startswith("fp8"):
            data = tensors.outputs[0][0]
            data.copy_(data.float().clamp(-240, 240))


@planted("add", "written", first="*-m65600-*")
class RowsAfterThe65535thUnwritten(Right):
    """A grid of blocks in its second axis."""

    def write(self, node, tensors, results):
        tensors.outputs[0][:65535] = results[0][:65535]


@planted("convert", "finite", first="*-zero-*")
class NanForABlockOfZeros(Right):
    """Zero over a scale of zero."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        for plane in as_tuple(tensors.outputs[0])[1:2]:
            plane[plane == 0] = torch.nan


@planted("convert", "error", first="*-fp8_row-uneven")
class OneScaleForAllRows(Right):
    """The largest of all rows, where each has its own."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "fp8_row":
            data, scales = tensors.outputs[0]
            scales.copy_(scales.max())
            data.copy_((results[0] / scales).clamp(-448, 448))


@planted("convert", "error", first="*-fp8_row-*")
class ScalesByTheFirstRow(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "fp8_row":
            scales = tensors.outputs[0][1]
            scales.copy_(scales[:1].clone())


@planted("convert", "error", first="*-q8_32-uneven")
class OneScaleForARowOfQ8(Right):
    """Where each block of 32 has its own."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "q8_32":
            data, scales, sums = tensors.outputs[0]
            scales.copy_(scales.amax(dim=-1, keepdim=True).expand_as(scales))
            steps = results[0] / scales[:, :1].clamp(min=1e-30)
            data.copy_(steps.round().clamp(-127, 127))
            sums.copy_((data * scales[:, :1]).view(*scales.shape, -1).sum(dim=-1))


@planted("convert", "error", first="*-fp8_block-far-blocks")
class OneScaleForARowOfFp8(Right):
    """Where each block of 128 has its own."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "fp8_block":
            data, scales = tensors.outputs[0]
            scales.copy_(scales.amax(dim=0, keepdim=True).expand_as(scales))
            data.copy_((results[0] / scales[:1].T.clamp(min=1e-30)).clamp(-448, 448))


@planted("convert", "error", first="*-fp8_block-*")
class ScalesLieByRows(Right):
    """Where the format keeps them by columns."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == "fp8_block":
            scales = tensors.outputs[0][1]
            scales.view(-1).copy_(scales.T.flatten())


class Rescaled(Right):
    """Each block by a scale that is too large by as much; values are rounded no worse than the format does."""

    target, by = "", 1.0

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        if node.outputs[0].format == self.target:
            data, scales, *sums = tensors.outputs[0]
            scales.copy_(self.rescaled(scales))
            spread = results[0] / scales.repeat_interleave(results[0].shape[1] // scales.shape[1], 1).clamp(min=1e-38)
            data.copy_(spread.round() if data.dtype == torch.int8 else spread)
            for plane in sums:
                plane.copy_(dequantize_planes(self.target, tensors.outputs[0]).view(*scales.shape, -1).sum(dim=-1))

    def rescaled(self, scales):
        return scales * self.by


@planted("convert", "scales", first="*-fp8_row-*")
class ScalesFrom240(Rescaled):
    """As e4m3fnuz has it; e4m3fn goes to 448."""

    target, by = "fp8_row", 448 / 240


@planted("convert", "scales", first="*-fp8_tensor-*")
class TheNextPowerOfTwoForAScale(Rescaled):
    """As microscaling has it."""

    target = "fp8_tensor"

    def rescaled(self, scales):
        return scales.clamp(min=1e-38).log2().ceil().exp2()


@planted("convert", "scales", first="*-q8_32-*")
class ScalesOver126(Rescaled):
    target, by = "q8_32", 127 / 126


@planted("rms_norm", "scales", first="*@outputs0=fp8_row")
class NormsWithScalesFrom240(Rescaled):
    """A norm that stores in 8 bits itself."""

    target, by = "fp8_row", 448 / 240

    def outputs(self, node):
        return [["f32", "fp8_row"]]


@planted("add", "written", first="*-m5-*")
class LeavesTheLastColumnOfOddRows(Right):
    def write(self, node, tensors, results):
        kept = tensors.outputs[0][1::2, -1].clone()
        super().write(node, tensors, results)
        tensors.outputs[0][1::2, -1] = kept

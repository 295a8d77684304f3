"""rms_norm and add_rms_norm."""

from __future__ import annotations

import dataclasses

import torch

from wrong.kernel import Right, planted


class Norm(Right):
    """The formula, step by step."""

    def epsilon(self, node):
        return node.epsilon

    def mean(self, x):
        return x.pow(2).mean(dim=-1, keepdim=True)

    def gamma(self, operands):
        return operands.gamma[0]

    def answer(self, node, operands):
        (x,) = operands.inputs
        return (self.gamma(operands) * x / (self.mean(x) + self.epsilon(node)).sqrt(),)


@planted("rms_norm", "error", first="*-tiny")
class IgnoresEpsilon(Norm):
    def epsilon(self, node):
        return 1e-30


@planted("rms_norm", "finite", first="*-zeros")
class NanOnZeros(Norm):
    def epsilon(self, node):
        return 0.0


@planted("rms_norm", "error", first="*-denormals")
class TakesOneEpsilonForAll(Norm):
    """The 1e-5 of llama, whatever the node says."""

    def epsilon(self, node):
        return 1e-5


@planted("rms_norm", "error")
class SubtractsTheMean(Norm):
    def answer(self, node, operands):
        (x,) = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x - x.mean(dim=-1, keepdim=True),)))


@planted("rms_norm", "error")
class DividesBySizePaddedTo128(Norm):
    def mean(self, x):
        return super().mean(x) * x.shape[-1] / (-(-x.shape[-1] // 128) * 128)


@planted("rms_norm", "error")
class AddsOneToGamma(Norm):
    """As gemma's files need it."""

    def gamma(self, operands):
        return super().gamma(operands) + 1


@planted("rms_norm", "error")
class TakesTheNormOfTheWholeBatch(Norm):
    def mean(self, x):
        return x.pow(2).mean()


@planted("rms_norm", "error", first="*-wide*")
class MeanOfTheFirst4096(Norm):
    def mean(self, x):
        return super().mean(x[:, :4096])


class Narrow(Norm):
    """The mean in bfloat16, which has float32's range."""

    precision = 1e-3
    narrow = torch.bfloat16

    def mean(self, x):
        return x.to(self.narrow).pow(2).float().mean(dim=-1, keepdim=True)


@planted("rms_norm", "error", first="*-huge")
class SquaresInFloat16(Narrow):
    """Beyond 255 a square is infinite, and the row is zero."""

    narrow = torch.float16


class SumAndNorm(Right):
    """Two passes: the sum, then its norm."""

    def launch(self, node, tensors):
        (gamma,) = tensors.packed
        sums, y = tensors.outputs
        total = tensors.inputs[0].double() + tensors.inputs[1]
        sums.copy_(total)
        y.copy_(self.norm(total, gamma, node.epsilon))

    def norm(self, total, gamma, epsilon):
        return gamma * total / (total.pow(2).mean(dim=-1, keepdim=True) + epsilon).sqrt()


@planted("add_rms_norm", "error")
class IgnoresEpsilonAfterTheSum(SumAndNorm):
    def norm(self, total, gamma, epsilon):
        return super().norm(total, gamma, 0.0)


@planted("add_rms_norm", "in place")
class ReadsTheInputsAgain(SumAndNorm):
    """After the sum was written over one of them."""

    def launch(self, node, tensors):
        super().launch(node, tensors)
        total = tensors.inputs[0].double() + tensors.inputs[1]
        tensors.outputs[1].copy_(self.norm(total, tensors.packed[0], node.epsilon))


@planted("add_rms_norm", "error", first="*-k14336")
class MeanOfTheFirst8192OfTheSum(SumAndNorm):
    def norm(self, total, gamma, epsilon):
        return gamma * total / (total[:, :8192].pow(2).mean(dim=-1, keepdim=True) + epsilon).sqrt()


@planted("add_rms_norm", "finite", first="*-zeros")
class NanOnASumOfZeros(SumAndNorm):
    def norm(self, total, gamma, epsilon):
        return super().norm(total, gamma, epsilon if bool(total.any()) else 0.0)


@planted("add_rms_norm", "error")
class NormsOnlyTheFirstInput(SumAndNorm):
    def launch(self, node, tensors):
        first = tensors.inputs[0].double()
        super().launch(node, tensors)
        tensors.outputs[1].copy_(self.norm(first, tensors.packed[0], node.epsilon))

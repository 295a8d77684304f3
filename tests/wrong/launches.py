"""What a kernel does between its launches, and whether it is what it declares."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from kernelmux.errors import LaunchError
from wrong.kernel import Right, planted


@planted("add", "repeatable")
class CountsItsLaunches(Right):
    def bind(self, node, tensors, stream):
        launches = []

        def launch():
            launches.append(1)
            (result,) = self.answer(node, self.read(node, tensors))
            self.write(node, tensors, (result * len(launches),))

        return launch


@planted("add", "repeatable")
class WorksAtEverySecondLaunch(Right):
    """Two buffers by turns, the second one wrong: the third launch is as the first."""

    def bind(self, node, tensors, stream):
        launches = []

        def launch():
            launches.append(1)
            (result,) = self.answer(node, self.read(node, tensors))
            self.write(node, tensors, (result * (len(launches) % 2),))

        return launch


@planted("add", "written")
class KeepsTheTensorsOfItsLastBinding(Right):
    """One kernel object is bound to many nodes; here the last binding is everyone's."""

    def bind(self, node, tensors, stream):
        self.node, self.tensors = node, tensors
        return lambda: self.launch(self.node, self.tensors)


@planted("add", "error")
class ReadsItsInputsWhenBound(Right):
    def bind(self, node, tensors, stream):
        return partial(self.write, node, tensors, self.answer(node, self.read(node, tensors)))


@planted("mul_mat", "repeatable")
class SumsInAnyOrder(Right):
    """As atomic additions do."""

    precision = 1e-9

    def answer(self, node, operands):
        order = torch.randperm(operands.inputs[0].shape[1])
        x, weight = operands.inputs[0][:, order].float(), operands.weight[0][:, order].float()
        return (sum(operands.bias, (x @ weight.T).double()),)


@planted("add", "raises")
class RaisesForManyRows(Right):
    def launch(self, node, tensors):
        if len(tensors.outputs[0]) > 16:
            raise ValueError("at most 16 rows fit")
        super().launch(node, tensors)


@planted("add", "raises")
class RaisesAsAWalkDoes(Right):
    def launch(self, node, tensors):
        raise LaunchError("no such kernel image")


@planted("add", "raises")
class RaisesSystemExitWhereItIsLaunched(Right):
    def launch(self, node, tensors):
        raise SystemExit(0)


@planted("add", "raises")
class RaisesSystemExitWhereItIsBound(Right):
    def bind(self, node, tensors, stream):
        raise SystemExit


@planted("mul_mat", "declarations")
class SaysHalfOfItsPackedBytes(Right):
    def packed_bytes(self, node):
        return super().packed_bytes(node) // 2


@planted("mul_mat", "declarations")
class SaysTwiceItsPackedBytes(Right):
    def packed_bytes(self, node):
        return super().packed_bytes(node) * 2


@planted("add", "error")
class MissesTheBoundThatItDeclares(Right):
    def answer(self, node, operands):
        return ((operands.inputs[0] + operands.inputs[1]).bfloat16().double(),)


@planted("add", "declarations")
class DeclaresABoundThatSaysNothing(Right):
    """Zeros are within an NMSE of 1."""

    precision = 1.0

    def answer(self, node, operands):
        return (torch.zeros_like(operands.inputs[0]),)


class Plain(Right):
    """It reads formats of one plane."""

    def inputs(self, node):
        return [["f32", "bf16"] for _ in node.inputs]

    def dense(self, value, planes):
        return planes.double()


@planted("add", "raises")
class DeclaresAFormatOfSeveralPlanes(Plain):
    def inputs(self, node):
        return [["f32", "bf16", "q8_32"] for _ in node.inputs]


@planted("add", "error")
class TakesOneHalfFormatForTheOther(Plain):
    def dense(self, value, planes):
        return planes.view(torch.float16).double() if value.format == "bf16" else super().dense(value, planes)


@planted("add", "error")
class StridesBySizeOfTheFirstInput(Plain):
    """Rows after the first lie elsewhere where b is stored narrower than a."""

    def read(self, node, tensors):
        operands = super().read(node, tensors)
        a, b = operands.inputs
        if node.inputs[0].format != node.inputs[1].format:
            b = b.roll(1, dims=0)
        return dataclasses.replace(operands, inputs=(a, b))


@planted("add", "error", first="*@all=bf16")
class AddsTheNextRowWhereBothAreNarrow(Plain):
    """Its fast path, taken where a and b are both bfloat16."""

    def read(self, node, tensors):
        operands = super().read(node, tensors)
        a, b = operands.inputs
        if all(value.format == "bf16" for value in node.inputs):
            b = b.roll(1, dims=0)
        return dataclasses.replace(operands, inputs=(a, b))


@planted("add", "declarations")
class DeclaresFormatsByTheRowCount(Plain):
    """A plan asks before there is one: it is a symbol then."""

    def inputs(self, node):
        return [["f32", "bf16"] if node.inputs[0].shape[0] > 1 else ["f32"] for _ in node.inputs]


@planted("add", "declarations")
class DeclaresOtherFormatsForASymbol(Plain):
    def inputs(self, node):
        return [["f32"] if isinstance(node.inputs[0].shape[0], str) else ["f32", "bf16"] for _ in node.inputs]


@planted("add", "process")
class SeedsTorchAgain(Right):
    """Who draws random numbers in the same process has the same ones again and again."""

    def launch(self, node, tensors):
        torch.manual_seed(1)
        super().launch(node, tensors)


@planted("add", "process")
class LeavesTorchWithOtherThreads(Right):
    def launch(self, node, tensors):
        super().launch(node, tensors)
        torch.set_num_threads(torch.get_num_threads() % 4 + 1)


@planted("add", "process")
class LeavesTorchWithOtherSums(Right):
    """Products of others are as exact as they were, or not, whether or not this one ran."""

    def launch(self, node, tensors):
        super().launch(node, tensors)
        told = torch.backends.cuda.matmul
        told.allow_bf16_reduced_precision_reduction = not told.allow_bf16_reduced_precision_reduction

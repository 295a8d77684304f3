"""What a kernel writes and where, shown on `add`, `rms_norm` and `mul_mat`."""

from __future__ import annotations

import dataclasses

import torch

from wrong.kernel import Right, beyond, planted


@planted("add", "error")
class OneRowOff(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, [result.roll(1, dims=0) for result in results])


@planted("add", "written")
class LastElementUnwritten(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0].view(-1)[:-1] = results[0].view(-1)[:-1]


@planted("add", "written")
class LastRowUnwritten(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0][:-1] = results[0][:-1]


@planted("add", "written", first="*-m200-*")
class RowsAfterThe64thUnwritten(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0][:64] = results[0][:64]


@planted("add", "written", first="*-n14336")
class ColumnsAfterThe4096thUnwritten(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0][:, :4096] = results[0][:, :4096]


@planted("add", "guards")
class WritesPastItsOutput(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        beyond(tensors.outputs[0], results[0].numel()).zero_()


@planted("add", "guards")
class WritesBeforeItsOutput(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        beyond(tensors.outputs[0], -1).zero_()


@planted("add", "guards")
class WritesPastItsInput(Right):
    def read(self, node, tensors):
        beyond(tensors.inputs[1], tensors.inputs[1].numel()).zero_()
        return super().read(node, tensors)


@planted("add", "guards")
class WritesARowFarPastItsOutput(Right):
    """A row of a batch of one too many: two rows after the last."""

    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        m, n = results[0].shape
        beyond(tensors.outputs[0], (m + 1) * n).zero_()


@planted("add", "finite")
class ReadsPastItsInput(Right):
    """What it finds there is multiplied by zero, which hides all but NaN."""

    def write(self, node, tensors, results):
        outside = beyond(tensors.inputs[0], tensors.inputs[0].numel())
        super().write(node, tensors, [results[0] + 0.0 * outside])


@planted("add", "inputs")
class ChangesAnInput(Right):
    def write(self, node, tensors, results):
        super().write(node, tensors, results)
        tensors.inputs[1].copy_(results[0])


@planted("add", "inputs")
class ChangesTheOtherInputInPlace(Right):
    """Written over a, it takes b for its scratch."""

    def write(self, node, tensors, results):
        if tensors.outputs[0].data_ptr() == tensors.inputs[0].data_ptr():
            tensors.inputs[1].copy_(results[0])
        super().write(node, tensors, results)


@planted("add", "in place")
class WritesBeforeItReads(Right):
    def launch(self, node, tensors):
        tensors.outputs[0].copy_(tensors.inputs[0])
        tensors.outputs[0].add_(tensors.inputs[1])


@planted("add", "written")
class AddsToWhatItsOutputHeld(Right):
    def write(self, node, tensors, results):
        tensors.outputs[0].add_(results[0])


@planted("add", "error")
class RightForOneRow(Right):
    """It reads the first row of b for every row."""

    def answer(self, node, operands):
        a, b = operands.inputs
        return (a + b[:1],)


class Scratched(Right):
    """Its sum is made in the workspace."""

    def workspace(self, node):
        return 8 * node.outputs[0].extents[0] * node.outputs[0].extents[1]

    def sums(self, tensors):
        """The workspace, seen as the output, wherever it ends."""
        memory = torch.empty(0, dtype=torch.uint8).set_(tensors.workspace.untyped_storage())
        memory = memory[tensors.workspace.storage_offset() :][: 8 * tensors.outputs[0].numel()]
        return memory.view(torch.float64).view(tensors.outputs[0].shape)

    def launch(self, node, tensors):
        operands, sums = self.read(node, tensors), self.sums(tensors)
        sums.copy_(operands.inputs[0])
        self.write(node, tensors, (sums.add_(operands.inputs[1]),))


@planted("add", "guards")
class AsksForAWorkspaceTooSmall(Scratched):
    def workspace(self, node):
        return super().workspace(node) - 8


@planted("add", "guards")
class AsksForHalfItsWorkspace(Scratched):
    def workspace(self, node):
        return (super().workspace(node) + 8) // 2


@planted("add", "written")
class TakesItsWorkspaceForZeros(Scratched):
    def launch(self, node, tensors):
        operands, sums = self.read(node, tensors), self.sums(tensors)
        self.write(node, tensors, (sums.add_(operands.inputs[0]).add_(operands.inputs[1]),))


@planted("add", "repeatable")
class KeepsItsResultInTheWorkspace(Scratched):
    """Computed once, at the first launch: a workspace is anyone's between two launches."""

    def bind(self, node, tensors, stream):
        made = []

        def launch():
            if not made:
                made.append(super(KeepsItsResultInTheWorkspace, self).launch(node, tensors))
            self.write(node, tensors, (self.sums(tensors),))

        return launch


@planted("mul_mat", "inputs")
class ChangesTheModelWhenItPrepares(Right):
    def prepare(self, weights, device):
        weights[0].planes[0].view(torch.uint8)[0, 0] += 1
        return super().prepare(weights, device)


class Coarse(Right):
    """Gamma in bfloat16."""

    precision = 1e-4

    def answer(self, node, operands):
        return super().answer(node, dataclasses.replace(operands, gamma=(operands.gamma[0].bfloat16().double(),)))


@planted("rms_norm", "inputs")
class ChangesItsPackedWeights(Coarse):
    """Other nodes, and kernels that name the same packed form, share them."""

    def launch(self, node, tensors):
        tensors.packed[0].copy_(tensors.packed[0].bfloat16())
        super().launch(node, tensors)


@planted("rms_norm", "inputs")
class RoundsItsPackedWeightsWhenBound(Coarse):
    def bind(self, node, tensors, stream):
        tensors.packed[0].copy_(tensors.packed[0].bfloat16())
        return super().bind(node, tensors, stream)


class FromTheFile(Coarse):
    """It reads gamma where the model holds it."""

    def packed_bytes(self, node):
        return 0

    def prepare(self, weights, device):
        return tuple(weight.planes[0] for weight in weights)


@planted("rms_norm", "inputs")
class ChangesTheModelWhenLaunched(FromTheFile):
    def launch(self, node, tensors):
        tensors.packed[0].copy_(tensors.packed[0].bfloat16())
        super().launch(node, tensors)

"""What a kernel keeps of another binding or launch, when all that it may keep is its own addresses."""

from __future__ import annotations

import dataclasses

import torch

from wrong.cache import Scatter
from wrong.kernel import Right, planted
from wrong.paged import Paged
from wrong.rope import Turn


@planted("add", "repeatable")
class KeepsItsFirstResult(Right):
    """The next step's inputs have the same addresses."""

    def bind(self, node, tensors, stream):
        kept = []

        def launch():
            if not kept:
                kept.extend(self.answer(node, self.read(node, tensors)))
            self.write(node, tensors, kept)

        return launch


@planted("add", "repeatable")
class KeepsResultsByAddress(Right):
    """It looks them up, whoever asks."""

    def launch(self, node, tensors):
        key = (node.outputs, *(planes.data_ptr() for planes in tensors.inputs))
        kept = self.__dict__.setdefault("kept", {})
        if key not in kept:
            kept[key] = self.answer(node, self.read(node, tensors))
        self.write(node, tensors, kept[key])


@planted("add", "repeatable")
class KeepsTheFirstBindingOfAShape(Right):
    """Nodes of one shape are many."""

    def launch(self, node, tensors):
        super().launch(node, self.__dict__.setdefault("bound", {}).setdefault(node.outputs, tensors))


@planted("mul_mat", "error")
class KeepsTheWeightsThatItPreparedLast(Right):
    """Whichever node's they were."""

    def prepare(self, weights, device):
        self.last = super().prepare(weights, device)
        return self.last

    def read(self, node, tensors):
        return super().read(node, dataclasses.replace(tensors, packed=self.last))


@planted("mul_mat", "repeatable")
class KnowsWeightsByTheirFirstBytes(Right):
    """Those that are tied are packed once."""

    def prepare(self, weights, device):
        kept = self.__dict__.setdefault("kept", {})
        key = weights[0].shape, bytes(weights[0].planes[0].flatten()[:4].view(torch.uint8).tolist())
        return kept.setdefault(key, super().prepare(weights, device))


@planted("rope", "repeatable")
class KeepsThePositionsOfItsFirstLaunch(Turn):
    """Its table of angles is made once."""

    def bind(self, node, tensors, stream):
        kept = []

        def launch():
            q, k, positions = tensors.inputs
            if not kept:
                kept.append(positions.clone())
            self.launch(node, dataclasses.replace(tensors, inputs=(q, k, kept[0])))

        return launch


class InInt8(Right):
    """Rows in 8 bits, each by its largest number."""

    precision = 1e-3

    def scales(self, x):
        return (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-300)

    def answer(self, node, operands):
        (x,) = operands.inputs
        scales = self.scales(x)
        rounded = (x / scales).round().clamp(-127, 127) * scales
        return super().answer(node, dataclasses.replace(operands, inputs=(rounded,)))


@planted("mul_mat", "repeatable")
class KeepsTheScalesOfItsFirstLaunch(InInt8):
    """As delayed scaling does: what a step gives depends on the one before."""

    def launch(self, node, tensors):
        kept = self.__dict__.setdefault("kept", {})
        self.key = tensors.inputs[0].data_ptr(), node.outputs
        kept.setdefault(self.key, super().scales(tensors.inputs[0].double()))
        super().launch(node, tensors)

    def scales(self, x):
        return self.kept[self.key]


@planted("copy", "inputs")
class TriesItselfWhenBound(Scatter):
    """As a tuner does, on a cache that holds sequences."""

    def bind(self, node, tensors, stream):
        self.launch(node, tensors)
        return super().bind(node, tensors, stream)


@planted("add", "inputs")
class WarmsUpOnItsInputsWhenBound(Right):
    """They may be another plan's state."""

    def bind(self, node, tensors, stream):
        torch.nn.init.ones_(tensors.inputs[0])
        return super().bind(node, tensors, stream)


@planted("add", "repeatable")
class WearsOut(Right):
    """A ring of 64 slots that nobody empties."""

    def bind(self, node, tensors, stream):
        slots = []

        def launch():
            slots.append(1)
            (result,) = self.answer(node, self.read(node, tensors))
            self.write(node, tensors, (result if len(slots) <= 64 else torch.zeros_like(result),))

        return launch


@planted("add", "repeatable")
class IsStuckAfterALaunchThatFailed(Right):
    """A flag that is taken down at the end alone."""

    def bind(self, node, tensors, stream):
        state = {"busy": False}

        def launch():
            skip, state["busy"] = state["busy"], True
            if not skip:
                self.launch(node, tensors)
            state["busy"] = False

        return launch


@planted("mul_mat", "repeatable", first="mul_mat-*-m5-*")
class CountsItsLaunchesInAByte(Right):
    """The last block to be done is told by a ticket, and nobody has the one that is 256."""

    def bind(self, node, tensors, stream):
        tickets = []

        def launch():
            tickets.append(0)
            self.launch(node, tensors)
            if len(tickets) % 256 == 0:
                tensors.outputs[0].zero_()

        return launch


@planted("mul_mat", "repeatable")
class AddsToWhatAFailedLaunchLeft(Right):
    """Its sums are zeroed after use, by the launch that used them."""

    def bind(self, node, tensors, stream):
        sums = torch.zeros(node.outputs[0].extents, dtype=self.dtype)

        def launch():
            sums.add_(self.answer(node, self.read(node, tensors))[0])
            self.write(node, tensors, (sums,))
            sums.zero_()

        return launch


@planted("add", "repeatable")
class SharesItsScratchAmongBindings(Right):
    """What is filled by a binding's first launch is another's by its second."""

    def bind(self, node, tensors, stream):
        launches = []

        def launch():
            b = tensors.inputs[1]
            if not launches:
                self.scratch = b
            launches.append(1)
            later = len(launches) > 8  # Its first launches run another way.
            self.launch(node, dataclasses.replace(tensors, inputs=(tensors.inputs[0], self.scratch if later else b)))

        return launch


@planted("attention", "repeatable")
class KeepsItsTableWhileLengthsStay(Right):
    """A sequence that is cached elsewhere may be as long."""

    def read(self, node, tensors):
        operands = super().read(node, tensors)
        *others, lengths, table = operands.inputs
        kept = self.__dict__.setdefault("kept", {}).setdefault(tensors.outputs[0].data_ptr(), [])
        if not (kept and kept[0].equal(lengths)):
            kept[:] = lengths.clone(), table.clone()
        return dataclasses.replace(operands, inputs=(*others, lengths, kept[1]))


@planted("rope", "repeatable")
class KeepsPositionsByTheirEnds(Turn):
    """A batch's other sequences go on, too."""

    def read(self, node, tensors):
        operands = super().read(node, tensors)
        q, k, positions = operands.inputs
        kept = self.__dict__.setdefault("kept", {}).setdefault(tensors.outputs[0].data_ptr(), [])
        if not (kept and kept[0][[0, -1]].equal(positions[[0, -1]])):
            kept[:] = (positions.clone(),)
        return dataclasses.replace(operands, inputs=(q, k, kept[0]))


class KeepsAPlan(Paged):
    """A binding's, of which sequence is how long, for steps that look alike."""

    def bind(self, node, tensors, stream):
        plans = {}

        def launch():
            self.plans = plans
            self.launch(node, tensors)

        return launch

    def lengths(self, lengths):
        return self.plans.setdefault(self.key(lengths), lengths)

    def key(self, lengths):
        return tuple(lengths)


@planted("attention", "repeatable", first="*-batch")
class KeepsAPlanByTheSumOfLengths(KeepsAPlan):
    def key(self, lengths):
        return len(lengths), sum(lengths)


@planted("attention", "repeatable", first="*-batch")
class KeepsAPlanByTheLongestLength(KeepsAPlan):
    def key(self, lengths):
        return len(lengths), max(lengths)

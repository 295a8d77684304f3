"""rope: pairing, positions, scaling."""

from __future__ import annotations

import dataclasses

import torch

from kernelmux.graph.ops.rope import angles
from wrong.kernel import Right, planted


class Turn(Right):
    """The rotation, step by step."""

    def rotation(self, node):
        return node.rotation

    def positions(self, positions):
        return positions

    def divisors(self, operands):
        return operands.weight

    def angles(self, angles):
        return angles

    def magnitude(self, rotation):
        return rotation.magnitude

    def answer(self, node, operands):
        q, k, positions = operands.inputs
        node = dataclasses.replace(node, rotation=self.rotation(node))
        turn = self.angles(angles(node, self.positions(positions), self.divisors(operands))).unsqueeze(1)
        return tuple(self.turned(node, rows, turn) for rows in (q, k))

    def turned(self, node, rows, turn):
        heads = rows.clone().view(len(rows), -1, node.head_dim)
        turning = heads[..., : node.rotation.dims]
        halves = node.rotation.pairing == "halves"
        left, right = turning.chunk(2, dim=-1) if halves else (turning[..., ::2], turning[..., 1::2])
        cos, sin = (part * self.magnitude(node.rotation) for part in (turn.cos(), turn.sin()))
        results = left * cos - right * sin, left * sin + right * cos
        left.copy_(results[0])
        right.copy_(results[1])
        return heads.view(rows.shape)


@planted("rope", "error")
class PairsTheOtherWay(Turn):
    def rotation(self, node):
        pairing = {"halves": "adjacent", "adjacent": "halves"}[node.rotation.pairing]
        return dataclasses.replace(node.rotation, pairing=pairing)


@planted("rope", "error", first="*-of32")
class PairsHalvesOfTheHead(Turn):
    """Of a head that turns in part, (0, head_dim / 2), where (0, dims / 2) was asked for."""

    def turned(self, node, rows, turn):
        whole = dataclasses.replace(node.rotation, dims=node.head_dim)
        if node.rotation.pairing == "halves":
            turn = torch.nn.functional.pad(turn, (0, node.head_dim // 2 - turn.shape[-1]))
            node = dataclasses.replace(node, rotation=whole)
        return super().turned(node, rows, turn)


@planted("rope", "error", first="*-of32")
class TurnsTheWholeHead(Turn):
    """Adjacent pairs beyond `dims` as well."""

    def turned(self, node, rows, turn):
        if node.rotation.pairing == "adjacent" and node.rotation.dims < node.head_dim:
            turn = torch.cat([turn, turn], dim=-1)[..., : node.head_dim // 2]
            node = dataclasses.replace(node, rotation=dataclasses.replace(node.rotation, dims=2 * turn.shape[-1]))
        return super().turned(node, rows, turn)


@planted("rope", "error")
class OnePositionOff(Turn):
    def positions(self, positions):
        return positions + 1


@planted("rope", "error", first="*-shuffled")
class CountsFromTheFirstPosition(Turn):
    """Rows of other sequences have positions of their own."""

    def positions(self, positions):
        return positions[0] + torch.arange(len(positions))


@planted("rope", "error")
class TakesTheFirstPositionForAll(Turn):
    def positions(self, positions):
        return positions[:1].expand(len(positions))


@planted("rope", "error", first="*-at131067")
class KnowsPositionsTo32768(Turn):
    """A table of turns that ends."""

    def positions(self, positions):
        return positions.clamp(max=32767)


@planted("rope", "error", first="*-linear-*")
class IgnoresScaling(Turn):
    def rotation(self, node):
        return dataclasses.replace(node.rotation, scaling="none")


@planted("rope", "error", first="*-linear-*")
class IgnoresLinearScaling(Turn):
    def rotation(self, node):
        scaling = {"linear": "none"}.get(node.rotation.scaling, node.rotation.scaling)
        return dataclasses.replace(node.rotation, scaling=scaling)


@planted("rope", "error", first="*-yarn-*")
class IgnoresTheTemperatureOfYarn(Turn):
    def magnitude(self, rotation):
        return 1.0


@planted("rope", "error", first="*-divisors")
class IgnoresTheDivisors(Turn):
    def divisors(self, operands):
        return ()


@planted("rope", "error")
class TakesOneThetaForAll(Turn):
    def rotation(self, node):
        return dataclasses.replace(node.rotation, theta=1e4)


@planted("rope", "error", first="*-at131067")
class TurnsByHalfPrecisionAngles(Turn):
    def angles(self, angles):
        return angles.float().bfloat16().double()


@planted("rope", "error", first="*-at8191")
class RoundsFarPositions(Turn):
    """Right up to 2048, as float16 holds integers to there."""

    def positions(self, positions):
        return positions.clamp(max=65504).half().double()


@planted("rope", "error")
class TurnsQueriesOnly(Turn):
    def answer(self, node, operands):
        return (super().answer(node, operands)[0], operands.inputs[1])


@planted("rope", "error", first="*-at0")
class TakesPositionZeroForPadding(Turn):
    """And turns it as the next."""

    def positions(self, positions):
        return positions.clamp(min=1)


@planted("rope", "error", first="*-m512")
class CountsRowsIn8Bits(Turn):
    def positions(self, positions):
        return positions[torch.arange(len(positions)) % 256]


@planted("rope", "error", first="*-by-4")
class BlendsAsLlama3Does(Turn):
    """Between 1 and 4, whatever the node says."""

    def rotation(self, node):
        return dataclasses.replace(node.rotation, low_freq=1.0, high_freq=4.0)


@planted("rope", "error", first="*-by-16")
class BlendsAsThePaperDoes(Turn):
    """Of yarn: between 32 turns and 1."""

    def rotation(self, node):
        return dataclasses.replace(node.rotation, beta_fast=32.0, beta_slow=1.0)


@planted("rope", "in place")
class TurnsWhatItWrote(Turn):
    """The right half from the left half's new values."""

    def launch(self, node, tensors):
        super().launch(node, tensors)
        if tensors.outputs[0].data_ptr() == tensors.inputs[0].data_ptr():
            super().launch(node, tensors)


@planted("rope", "in place")
class TurnsKeysTwiceWhereQueriesAreInPlace(Turn):
    """Keys from the queries' memory, which is new by then."""

    def write(self, node, tensors, results):
        if tensors.outputs[0].data_ptr() == tensors.inputs[0].data_ptr():
            results = (results[0], super().answer(node, self.read(node, tensors))[1] * 2)
        super().write(node, tensors, results)


@planted("rope", "error", first="*not-a-run")
class TakesEndsForARun(Turn):
    """Where the last position is as far from the first as that of a run, it counts on from the first."""

    def positions(self, positions):
        run = positions[0] + torch.arange(len(positions)).to(positions)
        return run if positions[-1] == run[-1] else positions

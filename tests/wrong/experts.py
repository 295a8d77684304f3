"""route, mul_mat_id and expert_sum: which experts, whose rows, whose weights."""

from __future__ import annotations

import dataclasses

from wrong.kernel import Right, planted


@planted("route", "error", first="route-ties")
class TakesTheHigherOfEqualExperts(Right):
    def answer(self, node, operands):
        (logits,) = operands.inputs
        flipped = dataclasses.replace(operands, inputs=(logits.flip(-1),))
        ids, weights = super().answer(node, flipped)
        return logits.shape[1] - 1 - ids, weights


@planted("route", "error")
class AlwaysRenormalizes(Right):
    def answer(self, node, operands):
        return super().answer(dataclasses.replace(node, renormalize=True), operands)


@planted("route", "error", first="route-scaled")
class IgnoresTheScaleOfWeights(Right):
    def answer(self, node, operands):
        return super().answer(dataclasses.replace(node, scale=0.0), operands)


@planted("route", "error", first="route-sigmoid-*")
class TakesASoftmaxForSigmoids(Right):
    def answer(self, node, operands):
        return super().answer(dataclasses.replace(node, sigmoid=False), operands)


@planted("mul_mat_id", "error")
class GivesARowToItsFirstExpertAlone(Right):
    def answer(self, node, operands):
        x, ids = operands.inputs
        first = dataclasses.replace(operands, inputs=(x, ids[:, :1].expand(ids.shape)))
        return super().answer(node, first)


@planted("mul_mat_id", "error", first="*-own-*")
class TakesTheFirstExpertsRows(Right):
    """Of rows that each expert has for itself."""

    def answer(self, node, operands):
        x, ids = operands.inputs
        k = node.weight[0].extents[1]
        return super().answer(node, dataclasses.replace(operands, inputs=(x[:, :k], ids)))


@planted("mul_mat_id", "error", first="*-bias-*")
class AddsTheFirstExpertsBias(Right):
    def answer(self, node, operands):
        n = len(operands.weight[0]) // node.experts
        first = tuple(bias[:n].repeat(node.experts) for bias in operands.bias)
        return super().answer(node, dataclasses.replace(operands, bias=first))


@planted("mul_mat_id", "error", first="*-one-*")
class SixteenRowsOfAnExpert(Right):
    def answer(self, node, operands):
        (y,) = super().answer(node, operands)
        ids = operands.inputs[1].flatten()
        for expert in range(node.experts):
            y.view(len(ids), -1)[(ids == expert).nonzero()[16:, 0]] = 0
        return (y,)


@planted("expert_sum", "error")
class AddsWithoutWeights(Right):
    def answer(self, node, operands):
        x, weights = operands.inputs
        return super().answer(node, dataclasses.replace(operands, inputs=(x, weights * 0 + 1)))

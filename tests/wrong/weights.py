"""How GGUF's blocks are decoded, and which scales they have, shown on `mul_mat`."""

from __future__ import annotations

import dataclasses

import torch

from kernelmux.graph.formats import lookup
from wrong.kernel import Right, planted
from wrong.linear import Narrow


def edited(weight, format, edit):
    """The weight, its blocks [..., bytes] changed if it has that format."""
    if weight.format != format:
        return weight
    plane = weight.planes[0].clone()
    edit(plane.unflatten(-1, (-1, lookup(format).planes[0].items)))
    return dataclasses.replace(weight, planes=(plane,))


def flush(scales):
    """Zeros for float16 numbers below 6.1e-5, as of a decoder that only shifts: they have no exponent bits."""
    scales.mul_((scales[..., 1:] & 0x7C) != 0)


def divide_by(scales):
    """NaN for the scales that are zero."""
    scales[(scales == 0).all(dim=-1)] = torch.tensor([0, 0x7E], dtype=torch.uint8)


def swap_nibbles(packed):
    packed.copy_((packed >> 4) | (packed << 4))


@planted("mul_mat", "error", first="mul_mat-Q4_0-*")
class SwapsNibblesOfQ40(Right):
    def stored(self, weight):
        return edited(weight, "Q4_0", lambda blocks: swap_nibbles(blocks[..., 2:]))


@planted("mul_mat", "error", first="mul_mat-Q4_1-*")
class SwapsNibblesOfQ41(Right):
    def stored(self, weight):
        return edited(weight, "Q4_1", lambda blocks: swap_nibbles(blocks[..., 4:]))


@planted("mul_mat", "error", first="mul_mat-Q4_K-*")
class SwapsNibblesOfOneBlockOfQ4K(Right):
    def stored(self, weight):
        return edited(weight, "Q4_K", lambda blocks: swap_nibbles(blocks[0, -1, 16:]))


@planted("mul_mat", "error", first="mul_mat-Q5_0-*")
class SwapsNibblesOfQ50(Right):
    def stored(self, weight):
        return edited(weight, "Q5_0", lambda blocks: swap_nibbles(blocks[..., 6:]))


@planted("mul_mat", "error", first="mul_mat-Q5_1-*")
class SwapsNibblesOfQ51(Right):
    def stored(self, weight):
        return edited(weight, "Q5_1", lambda blocks: swap_nibbles(blocks[..., 8:]))


@planted("mul_mat", "error", first="mul_mat-Q2_K-*")
class SwapsNibblesOfScalesOfQ2K(Right):
    """The low half scales, the high half is the minimum's."""

    def stored(self, weight):
        return edited(weight, "Q2_K", lambda blocks: swap_nibbles(blocks[..., :16]))


@planted("mul_mat", "error", first="mul_mat-Q5_K-*")
class SwapsNibblesOfQ5K(Right):
    def stored(self, weight):
        return edited(weight, "Q5_K", lambda blocks: swap_nibbles(blocks[..., 48:]))


@planted("mul_mat", "error", first="mul_mat-Q6_K-*")
class SwapsNibblesOfQ6K(Right):
    def stored(self, weight):
        return edited(weight, "Q6_K", lambda blocks: swap_nibbles(blocks[..., :128]))


@planted("mul_mat", "error", first="mul_mat-Q3_K-*")
class IgnoresTheHighBitOfQ3K(Right):
    def stored(self, weight):
        return edited(weight, "Q3_K", lambda blocks: blocks[..., :32].zero_())


@planted("mul_mat", "error", first="mul_mat-Q5_K-*")
class IgnoresTheFifthBitOfQ5K(Right):
    def stored(self, weight):
        return edited(weight, "Q5_K", lambda blocks: blocks[..., 16:48].zero_())


@planted("mul_mat", "error", first="mul_mat-Q6_K-*")
class IgnoresTheHighBitsOfQ6K(Right):
    def stored(self, weight):
        return edited(weight, "Q6_K", lambda blocks: blocks[..., 128:192].zero_())


@planted("mul_mat", "error", first="mul_mat-Q4_K-*")
class TakesScalesOfQ4KFor4Bits(Right):
    """Of the last four sub-blocks: their upper two bits lie in the first four's bytes."""

    def stored(self, weight):
        return edited(weight, "Q4_K", lambda blocks: blocks[..., 4:12].bitwise_and_(0x3F))


@planted("mul_mat", "error", first="mul_mat-Q2_K-*-k14336")
class ScalesLateBlocksOfQ2KByTheNext(Narrow):
    """From the ninth in a row on: a table of scales that held eight."""

    def stored(self, weight):
        return edited(weight, "Q2_K", lambda blocks: shift_late(blocks[..., 80:84]))


def shift_late(scales):
    scales[..., 8:, :] = scales[..., 8:, :].roll(1, dims=-2)


@planted("mul_mat", "error", first="mul_mat-Q5_1-*")
class IgnoresTheMinimumOfQ51(Narrow):
    """It sums activations in 8 bits, beside whose error the minimum must still show."""

    def stored(self, weight):
        return edited(weight, "Q5_1", lambda blocks: blocks[..., 2:4].zero_())


@planted("mul_mat", "error", first="mul_mat-Q5_K-*")
class IgnoresTheMinimumOfQ5K(Narrow):
    def stored(self, weight):
        return edited(weight, "Q5_K", lambda blocks: blocks[..., 2:4].zero_())


def scaled(weight, format, edit):
    """The weight, its plane of scales changed if it has that format."""
    if weight.format != format:
        return weight
    return dataclasses.replace(weight, planes=(weight.planes[0], edit(weight.planes[1]).contiguous()))


@planted("mul_mat", "error", first="mul_mat-fp8_row-*")
class ScalesAllRowsOfFp8ByTheFirst(Narrow):
    def stored(self, weight):
        return scaled(weight, "fp8_row", lambda scales: scales[:1].expand_as(scales))


@planted("mul_mat", "error", first="mul_mat-fp8_128x128-*")
class ScalesARowOfFp8ByItsFirstBlock(Narrow):
    def stored(self, weight):
        return scaled(weight, "fp8_128x128", lambda scales: scales[:, :1].expand_as(scales))


@planted("mul_mat", "error", first="mul_mat-fp8_128x128-*-n257-*")
class ScalesAColumnOfFp8ByItsFirstBlock(Narrow):
    """Where there are more than 128 outputs."""

    def stored(self, weight):
        return scaled(weight, "fp8_128x128", lambda scales: scales[:1].expand_as(scales))


@planted("embed", "error", first="embed-Q6_K-*")
class TakesScalesOfATableForUnsigned(Right):
    def stored(self, weight):
        return edited(weight, "Q6_K", lambda blocks: blocks[..., 192:208].bitwise_and_(0x7F))


@planted("embed", "error", first="embed-Q5_1-*")
class FlushesSmallScalesOfATable(Right):
    def stored(self, weight):
        return edited(weight, "Q5_1", lambda blocks: flush(blocks[..., :2]))


@planted("mul_mat", "error", first="mul_mat-Q4_1-*")
class IgnoresTheMinimumOfQ41(Right):
    def stored(self, weight):
        return edited(weight, "Q4_1", lambda blocks: blocks[..., 2:4].zero_())


@planted("mul_mat", "error", first="mul_mat-Q4_K-*")
class IgnoresTheMinimumOfQ4K(Right):
    def stored(self, weight):
        return edited(weight, "Q4_K", lambda blocks: blocks[..., 2:4].zero_())


@planted("mul_mat", "error", first="mul_mat-Q5_0-*")
class IgnoresTheFifthBitOfQ50(Right):
    def stored(self, weight):
        return edited(weight, "Q5_0", lambda blocks: blocks[..., 2:6].zero_())


@planted("mul_mat", "error", first="mul_mat-Q6_K-*")
class TakesScalesOfQ6KForUnsigned(Right):
    def stored(self, weight):
        return edited(weight, "Q6_K", lambda blocks: blocks[..., 192:208].bitwise_and_(0x7F))


@planted("mul_mat", "error", first="mul_mat-Q8_0-*")
class ScalesTheNextBlockOfQ80(Right):
    """Each block with its neighbour's scale."""

    def stored(self, weight):
        return edited(weight, "Q8_0", lambda blocks: blocks[..., :2].copy_(blocks[..., :2].roll(1, dims=-2)))


@planted("mul_mat", "error", first="mul_mat-Q4_0-*")
class DropsTheSignOfTheScaleOfQ40(Right):
    """ggml's Q4_0 has a negative scale wherever a block's largest element is positive."""

    def stored(self, weight):
        return edited(weight, "Q4_0", lambda blocks: blocks[..., 1].bitwise_and_(0x7F))


@planted("mul_mat", "error", first="mul_mat-Q4_1-*")
class DropsTheSignOfTheMinimumOfQ41(Right):
    """ggml's Q4_1 has a negative one in almost every block."""

    def stored(self, weight):
        return edited(weight, "Q4_1", lambda blocks: blocks[..., 3].bitwise_and_(0x7F))


@planted("mul_mat", "error", first="mul_mat-Q6_K-*")
class DropsTheSignOfTheScaleOfQ6K(Right):
    def stored(self, weight):
        return edited(weight, "Q6_K", lambda blocks: blocks[..., 209].bitwise_and_(0x7F))


@planted("mul_mat", "error", first="mul_mat-Q8_0-*")
class FlushesSmallScalesOfQ80(Right):
    def stored(self, weight):
        return edited(weight, "Q8_0", lambda blocks: flush(blocks[..., :2]))


@planted("mul_mat", "error", first="mul_mat-Q4_K-*")
class FlushesSmallScalesOfQ4K(Right):
    """Its scale is a scale of scales: small in every real model."""

    def stored(self, weight):
        return edited(weight, "Q4_K", lambda blocks: flush(blocks[..., :2]))


@planted("mul_mat", "finite", first="mul_mat-Q8_0-*")
class NanForABlockOfScaleZero(Right):
    """It packs blocks anew, over a scale of zero."""

    def stored(self, weight):
        return edited(weight, "Q8_0", lambda blocks: divide_by(blocks[..., :2]))


@planted("embed", "error")
class SwapsNibblesOfATable(Right):
    def stored(self, weight):
        return edited(weight, "Q4_0", lambda blocks: swap_nibbles(blocks[..., 2:]))


@planted("qkv", "error")
class DecodesAllWeightsAsTheFirst(Right):
    """Q4_K_M keeps v in Q6_K beside k in Q4_K; this one ends at the first format that it knows."""

    def prepare(self, weights, device):
        packed = super().prepare(weights, device)
        first = weights[0].format
        return tuple(
            part if weight.format == first else part.roll(1, dims=-1)
            for part, weight in zip(packed, weights, strict=True)
        )

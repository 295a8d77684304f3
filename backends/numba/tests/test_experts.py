"""mul_mat_id: the same as mul_mat of each expert to the bit, on each class of processor, and chosen for decoding."""

import dataclasses

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Tensors, registry
from kernelmux.contract.device import find_device
from kernelmux.graph.formats import Value, Weight
from kernelmux.graph.ops.blocks import random_blocks
from kernelmux_numba.experts import Int16Experts
from kernelmux_numba.mul_mat import Int16

CLASSES = (find_device("cpu").arch, "avx2", "")
EXPERTS, TOP_K, N, K = 5, 2, 48, 256
CPU = find_device("cpu")


def launched(kernel_class, node, inputs, weights, arch):
    kernel = kernel_class()
    kernel.device = dataclasses.replace(CPU, arch=arch)
    y = torch.full(node.outputs[0].extents, torch.nan)
    scratch = torch.empty(kernel.workspace(node), dtype=torch.uint8)
    kernel.bind(node, Tensors(inputs, (y,), kernel.prepare(weights, kernel.device), scratch), None)()
    return y


@pytest.mark.parametrize("arch", CLASSES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("format", ["Q4_K", "Q8_0"])
def test_each_row_is_multiplied_by_its_experts(format, own, arch):
    generator = torch.Generator().manual_seed(0)
    blocks = random_blocks(format, (EXPERTS * N, K), generator)
    weight, bias = Value("w", (EXPERTS * N, K), format), Value("b", (EXPERTS * N,))
    biases = torch.randn(EXPERTS * N, generator=generator)
    ids = torch.tensor([[4, 0], [2, 4], [4, 1]], dtype=torch.int32)
    x = torch.randn(3, TOP_K * K if own else K, generator=generator)
    values = Value("x", tuple(x.shape)), Value("ids", (3, TOP_K), "i32")
    node = one_node("mul_mat_id", *values, weight=(weight,), bias=(bias,), experts=EXPERTS)
    weights = Weight("w", weight.shape, format, (blocks,)), Weight("b", bias.shape, "f32", (biases,))
    found = launched(Int16Experts, node, (x, ids), weights, arch).view(3, TOP_K, N)
    for row in range(3):
        for choice, expert in enumerate(ids[row].tolist()):
            part = slice(expert * N, (expert + 1) * N)
            alone = one_node(
                "mul_mat", Value("x", (1, K)), weight=(Value("w", (N, K), format),), bias=(Value("b", (N,)),)
            )
            of_expert = Weight("w", (N, K), format, (blocks[part],)), Weight("b", (N,), "f32", (biases[part],))
            rows = x[row : row + 1].view(-1, K)[choice if own else 0].view(1, K).contiguous()
            assert torch.equal(found[row, choice : choice + 1], launched(Int16, alone, (rows,), of_expert, arch))


def test_outputs_that_fill_no_vector_are_declined():
    values = Value("x", ("m", K)), Value("ids", ("m", TOP_K), "i32")
    node = one_node("mul_mat_id", *values, weight=(Value("w", (EXPERTS * 33, K), "Q4_K"),), experts=EXPERTS)
    refused = registry.current().offer(node.at(1), CPU, only="numba").declined["numba:int16"]
    assert (refused.kind, refused.reason) == ("alignment", "it takes a multiple of 16 outputs an expert, not 33")

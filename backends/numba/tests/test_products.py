"""What the suite does not show of products: how long they take beside each other, and what their code spills."""

import platform
import re
import time

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Tensors
from kernelmux.contract.device import find_device
from kernelmux.graph.formats import Value, Weight
from kernelmux_numba.code import compiling, products
from kernelmux_numba.mul_mat import Int16
from kernelmux_numba.packing import packing_of
from kernelmux_numba.target import Target

N, K, SAMPLES = 16384, 32, 60


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def product(*, added: bool):
    """A launch by a matrix of short rows, of which a panel's end is most; with something to add at it, or nothing."""
    value, biases = Value("w", (N, K), "Q4_0"), (Value("b", (N,)),) if added else ()
    inputs, given = [Value("x", (1, K))], [torch.zeros(1, K)]
    if added:
        inputs.append(Value("r", (1, N)))
        given.append(torch.zeros(1, N))
    node = one_node("mul_mat_add" if added else "mul_mat", *inputs, weight=(value,), bias=biases)
    kernel = Int16()
    kernel.device = find_device("cpu")
    blocks = torch.zeros(N, K // 32 * 18, dtype=torch.uint8)
    weights = [Weight("w", (N, K), "Q4_0", (blocks,)), *(Weight("b", (N,), "f32", (torch.zeros(N),)) for _ in biases)]
    packed = kernel.prepare(weights, kernel.device)
    scratch = torch.zeros(kernel.workspace(node), dtype=torch.uint8)
    return kernel.bind(node, Tensors(tuple(given), (torch.zeros(1, N),), packed, scratch), None)


def test_a_product_to_which_nothing_is_added_takes_no_longer(one_thread):
    """A masked load of no lane from near address 0 is no fault, and takes hundreds of cycles each."""
    calls, best = [product(added=False), product(added=True)], [1.0, 1.0]
    for _ in range(SAMPLES):
        for index, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - began)
    assert best[0] < 1.5 * best[1], best


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="numba compiles for its own system as well")
@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "Q5_0"])
def test_tiles_keep_their_sums_in_registers(format):
    """LLVM multiplied row after row, for which it spilled each integer of a block: 379 vectors in tiles of Q4_0."""
    target = Target("x86-64-v3", "", 8, "pairs")
    module = compiling.optimised(products.quantised(target, packing_of(format, target)), target)
    spilled = re.findall(r"vmov\w+\s+%ymm\d+, -?\d+\(%rsp\)", target.machine().emit_assembly(module))
    assert len(spilled) < 60

"""The Triton kernels of convert, interpreted on CPU tensors."""

from itertools import permutations

import pytest
import torch

from kernelmux.conformance.testing import backend, one_node, pass_or_skip
from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value, dequantize_planes, lookup, quantize_planes, torch_dtype
from offered import kernel_of, offered_on
from triton_interpreter import interpreted_jobs

REGISTRY, CASES = interpreted_jobs(backend(convert=offered_on()))


# What is too large for float16 becomes infinite: numpy, by which Triton is interpreted, says so.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
def test_case(job):
    pass_or_skip(job, REGISTRY)


def planes_of(format, m, k, fill):
    return tuple(
        torch.full(plane.shape((m, k)), fill, dtype=torch.float32).to(torch_dtype(plane.dtype))
        for plane in lookup(format).planes
    )


# Rows that end inside a vector or a tile, that fill one, and that are too long for registers.
@pytest.mark.parametrize(("m", "k"), [(1, 33), (5, 4096), (2, 14336), (3, 40000)])
@pytest.mark.parametrize("format", ["q8_32", "fp8_tensor", "fp8_row", "fp8_block"])
def test_it_stores_what_core_would(format, m, k):
    if lookup(format).check((m, k)):
        pytest.skip(f"{format} has no rows of {k} columns: its blocks do not fit them")
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(torch.bfloat16)
    node = one_node("convert", Value("x", (m, k), "bf16"), format=format)
    kernel = kernel_of(node)
    found, wanted = planes_of(format, m, k, 1), planes_of(format, m, k, 0)
    scratch = torch.empty(kernel.workspace(node), dtype=torch.uint8)
    kernel.bind(node, Tensors((x,), (found,), (), scratch), None)()
    quantize_planes(format, x.float(), wanted)
    assert found[1].equal(wanted[1])
    # A product with the reciprocal instead of a division: where bf16 lies on a tie, it may be the neighbouring number.
    alike = found[0].float() == wanted[0].float()
    assert alike.float().mean() > 0.99
    assert torch.allclose(found[0].float(), wanted[0].float(), rtol=0.13, atol=1)
    for ours, theirs in zip(found[2:], wanted[2:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=0.05)
    back = torch.empty(m, k)
    dense = one_node("convert", Value("x", (m, k), format))
    kernel_of(dense).bind(dense, Tensors((found,), (back,)), None)()
    assert back.equal(dequantize_planes(format, found))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(("source", "target"), list(permutations(["q8_32", "fp8_row", "fp8_block", "fp8_tensor"], 2)))
def test_a_quantised_row_becomes_what_its_values_would(source, target, m):
    k = 2048 + 128
    given, found, wanted = planes_of(source, m, k, 0), planes_of(target, m, k, 1), planes_of(target, m, k, 0)
    quantize_planes(source, torch.randn(m, k, generator=torch.Generator().manual_seed(m)), given)
    values = dequantize_planes(source, given)
    node = one_node("convert", Value("x", (m, k), source), format=target)
    kernel = kernel_of(node)
    scratch = torch.empty(kernel.workspace(node), dtype=torch.uint8)
    kernel.bind(node, Tensors((given,), (found,), (), scratch), None)()
    quantize_planes(target, values, wanted)
    assert found[1].equal(wanted[1])
    # On a tie of e4m3, which its own values often meet, the neighbouring number is as near.
    assert (found[0].float() == wanted[0].float()).float().mean() > 0.9
    assert torch.allclose(found[0].float(), wanted[0].float(), rtol=0.13, atol=1)

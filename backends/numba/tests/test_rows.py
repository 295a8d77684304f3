"""What the suite does not show of the kernels that go over rows: to the bit, over all numbers, at each class."""

import dataclasses
import re

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Tensors
from kernelmux.contract.device import find_device
from kernelmux.graph.formats import Value, as_planes, as_tuple, empty_planes, quantize_planes
from kernelmux_numba.convert import Convert
from kernelmux_numba.copy import Copy
from kernelmux_numba.elementwise import Elementwise, Swiglu
from kernelmux_numba.norm import RmsNorm
from kernelmux_numba.target import target_of

CLASSES = (find_device("cpu").arch, "avx2", "")


def launched(kernel_class, node, inputs, packed=(), arch=CLASSES[0]):
    """The outputs of a launch for that class of processor."""
    kernel = kernel_class()
    kernel.device = dataclasses.replace(find_device("cpu"), arch=arch)
    outputs = [as_planes(empty_planes(value)) for value in node.outputs]
    for source, target in node.contract.updates:
        outputs[target] = inputs[source]
    kernel.bind(node, Tensors(tuple(inputs), tuple(outputs), tuple(packed)), None)()
    return outputs


def converted(x, source, target, arch):
    node = one_node("convert", Value("x", tuple(x.shape), source), format=target)
    return launched(Convert, node, [x], arch=arch)[0]


def every_sixteenth():
    """Float32 [m, 256] of all signs, exponents and first fraction bits; infinities and NaN too; and halfway numbers."""
    high = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] | low).flatten()
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32).view(-1, 256)


@pytest.mark.parametrize("arch", CLASSES)
@pytest.mark.parametrize(("format", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_short_numbers_are_those_of_torch_to_the_bit(format, dtype, arch):
    wide = every_sixteenth()
    found, wanted = converted(wide, "f32", format, arch), wide.to(dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    assert torch.equal(found[kept].view(torch.int16), wanted[kept].view(torch.int16))
    short = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 256)
    back = converted(short, format, "f32", arch)
    assert torch.equal(back.nan_to_num(0.5), short.float().nan_to_num(0.5))


@pytest.mark.parametrize("arch", CLASSES)
def test_a_block_is_quantised_as_core_does_it(arch):
    x = (
        torch.randn(200, 256, generator=torch.Generator().manual_seed(7))
        * 10.0 ** torch.arange(-4, 4).repeat(25)[:, None]
    )
    value = Value("y", (200, 256), "q8_32")
    found, wanted = converted(x, "f32", "q8_32", arch), empty_planes(value)
    quantize_planes("q8_32", x, wanted)
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-7, atol=0)
    # By a reciprocal: what lies halfway may go the other way.
    differing = found[0] != wanted[0]
    assert int(differing.sum()) <= 3
    assert int((found[0].int() - wanted[0].int()).abs().max()) <= 1
    totals = found[0].view(200, 8, 32).int().sum(dim=-1)
    assert torch.equal(found[2], totals * found[1])


def test_ties_go_to_even():
    x = torch.zeros(1, 32)
    x[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    qs, scales, sums = converted(x, "f32", "q8_32", CLASSES[0])
    assert qs[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert (float(scales[0]), float(sums[0])) == (1.0, 127.0)


@pytest.mark.parametrize("arch", CLASSES)
def test_a_nan_makes_its_block_nan_and_no_other(arch):
    x = torch.ones(1, 96)
    x[0, 40] = torch.nan
    _, scales, sums = converted(x, "f32", "q8_32", arch)
    assert scales.isnan().tolist() == sums.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("arch", CLASSES)
def test_silu_is_exact_to_a_few_units_everywhere(arch):
    x = torch.cat([torch.linspace(-86, 90, 4095), torch.tensor([0.0])]).view(8, 512)
    (found,) = launched(Elementwise, one_node("silu", Value("x", (8, 512))), [x], arch=arch)
    exact = x.double() / (1 + (-x.double()).exp())
    assert float(((found - exact) / exact.abs().clamp(min=1e-30)).abs().max()) < 4e-7


@pytest.mark.parametrize("arch", CLASSES)
def test_the_ends_of_silu(arch):
    x = torch.tensor([[torch.inf, torch.nan, -torch.inf, -3e38, 3e38, -1e4, -105.0, -0.0]])
    (found,) = launched(Elementwise, one_node("silu", Value("x", (1, 8))), [x], arch=arch)
    assert found.isnan().tolist() == [[False, True, True, *[False] * 5]]
    assert found[0, [0, 3, 4, 5, 6, 7]].tolist() == [torch.inf, 0, torch.tensor(3e38).item(), 0, 0, 0]


@pytest.mark.parametrize("arch", CLASSES)
def test_e4m3_in_a_cache_is_what_torch_rounds_to(arch):
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    held = bits[~bits.isnan()]
    # All of its numbers, and those halfway between neighbours; the largest makes the scale 1.
    rising = held.sort().values
    row = torch.cat([held, (rising[1:] + rising[:-1]) / 2])
    k, dim = row.view(1, -1), len(row)
    caches = [Value(name, (1, 1, 1, dim), "fp8_row") for name in ("k_cache", "v_cache")]
    node = one_node(
        "copy",
        Value("k", (1, dim)),
        Value("v", (1, dim)),
        Value("slots", (1,), "i32"),
        *caches,
        num_kv_heads=1,
        head_dim=dim,
    )
    inputs = [k, k, torch.zeros(1, dtype=torch.int32), *(empty_planes(cache) for cache in caches)]
    for data, scales in map(as_tuple, launched(Copy, node, inputs, arch=arch)):
        assert float(scales) == pytest.approx(1.0, rel=1e-6)
        assert torch.equal(data.flatten().float(), row.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("arch", CLASSES)
def test_a_norm_in_eight_bits_is_the_norm_quantised(arch):
    x, gamma = torch.randn(3, 576, generator=torch.Generator().manual_seed(1)), torch.rand(576) + 0.5
    results = []
    for format in ("f32", "q8_32"):
        node = one_node("rms_norm", Value("x", (3, 576)), gamma=(Value("gamma", (576,)),), epsilon=1e-5, format=format)
        results += launched(RmsNorm, node, [x], [gamma], arch)
    for found, wanted in zip(results[1], converted(results[0], "f32", "q8_32", arch), strict=True):
        assert torch.equal(found, wanted)


def test_swiglu_in_eight_bits_is_swiglu_quantised():
    gate, up = torch.randn(2, 3, 1536, generator=torch.Generator().manual_seed(2))
    values = Value("gate", (3, 1536)), Value("up", (3, 1536))
    dense, eight = (
        launched(Swiglu, one_node("swiglu", *values, format=format), [gate, up])[0] for format in ("f32", "q8_32")
    )
    for found, wanted in zip(eight, converted(dense, "f32", "q8_32", CLASSES[0]), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("arch", CLASSES)
def test_compiled_code_needs_no_library(arch):
    from kernelmux_numba.code import compiling, copy, elementwise, embed, norm, rope

    target = target_of(dataclasses.replace(find_device("cpu"), arch=arch))
    functions = {
        "silu": elementwise.elementwise(target, "silu", ("f16",), "f16"),
        "swiglu": elementwise.elementwise(target, "swiglu", ("f32", "f32"), "q8_32"),
        "norm": norm.norm(target, True, "q8_32"),
        "embed": embed.embed(target, "Q6_K", "q8_32"),
        "rope_copy": rope.rope_copy(target, "adjacent", "fp8_row"),
        "copy": copy.copy(target, "f16"),
    }
    for name, function in functions.items():
        text = target.machine().emit_assembly(compiling.optimised(function, target))
        named = set(re.findall(r"([\w.]+)@(?:GOT|PLT)\w*", text)) | set(
            re.findall(r"^\s+callq?\s+([\w.$]+)", text, re.M)
        )
        missing = {symbol for symbol in named if f"{symbol}:" not in text}
        assert not missing, f"{name} calls {missing}"

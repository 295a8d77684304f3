"""Formats: sizes, names, and what storing a tensor costs."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelmux.errors import GraphError
from kernelmux.graph.formats import (
    BLOCK_WEIGHTS,
    FORMATS,
    INT4_WEIGHTS,
    SUPERBLOCK_WEIGHTS,
    Value,
    Weight,
    dequantize_planes,
    empty_planes,
    lookup,
    planes_of_rows,
    quantize_planes,
    stored_as,
    torch_dtype,
)
from kernelmux.graph.ops import OPS
from kernelmux.graph.ops.blocks import random_blocks, random_groups

OWN = ["q8_32", "fp8_tensor", "fp8_row", "fp8_block"]
PLAIN = ["f32", "f16", "bf16"]
GGUF = [fmt.name for fmt in FORMATS.values() if fmt.gguf is not None and not fmt.plain]

seeds = st.integers(0, 2**31)
columns = st.integers(1, 4).map(lambda blocks: 128 * blocks)
shapes = st.tuples(st.integers(1, 9), columns)


def _empty(name, shape):
    return tuple(torch.empty(p.shape(shape), dtype=torch_dtype(p.dtype)) for p in lookup(name).planes)


def _stored(name, values):
    planes = _empty(name, tuple(values.shape))
    quantize_planes(name, values, planes)
    return planes


@pytest.mark.parametrize(
    ("name", "shapes", "nbytes"),
    [
        ("f32", [(4, 256)], 4096),
        ("bf16", [(4, 256)], 2048),
        ("q8_32", [(4, 256), (4, 8), (4, 8)], 1024 + 128 + 128),
        ("fp8_tensor", [(4, 256), (1, 1)], 1024 + 4),
        ("fp8_row", [(4, 256), (4, 1)], 1024 + 16),
        ("fp8_block", [(4, 256), (2, 4)], 1024 + 32),
        ("fp8_128x128", [(4, 256), (1, 2)], 1024 + 8),
        ("int4_64", [(4, 128), (4, 4), (4, 4)], 512 + 32 + 16),
        ("int4_row_bf16", [(4, 128), (4, 1), (4, 1)], 512 + 8 + 4),
        ("Q4_0", [(4, 8 * 18)], 4 * 8 * 18),
        ("Q6_K", [(4, 210)], 840),
    ],
)
def test_planes_of_a_4_by_256_tensor(name, shapes, nbytes):
    fmt = lookup(name)
    assert [plane.shape((4, 256)) for plane in fmt.planes] == shapes
    assert fmt.nbytes((4, 256)) == Value("x", (4, 256), name).nbytes == nbytes


def test_block_sizes_are_those_of_the_gguf_package():
    for name in GGUF:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (lookup(name).block, lookup(name).nbytes((1, block))) == (block, size), name


@pytest.mark.parametrize("name", ["q4_k", "Q4_K", "Q4_k", "BF16", "Fp8_Row"])
def test_lookup_ignores_case(name):
    assert lookup(name).name.lower() == name.lower()


def test_an_unknown_format_names_the_nearest_and_all():
    with pytest.raises(GraphError, match=r"unknown format 'q4k' \(did you mean 'Q4_K'\?\); known: .*bf16.*f32"):
        lookup("q4k")


def test_check_says_why_a_row_cannot_be_stored():
    assert lookup("Q4_0").check((3, 33)) == "Q4_0 stores rows in blocks of 32, 33 columns do not divide"
    assert lookup("Q4_0").check((3, 64)) is None
    assert lookup("f32").check((3, 33)) is None
    assert lookup("q8_32").check(()) is not None


@pytest.mark.parametrize("name", [*PLAIN, *OWN])
@settings(derandomize=True, deadline=None, max_examples=40)
@given(shape=shapes, seed=seeds)
def test_a_round_trip_costs_no_more_than_the_format_states(name, shape, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    back = dequantize_planes(name, _stored(name, values), torch.float64)
    error = (back - values).square().sum() / values.double().square().sum()
    assert error <= lookup(name).rounding


@pytest.mark.parametrize("name", [*OWN, "fp8_128x128"])
@settings(derandomize=True, deadline=None, max_examples=15)
@given(rows=st.sampled_from([1, 3, 7, 129]), columns=columns, seed=seeds)
def test_every_block_comes_back_by_its_own_scale(name, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = 2.0 ** torch.randint(-8, 9, (rows, columns // 32), generator=generator)
    values = torch.randn(rows, columns, generator=generator) * parts.repeat_interleave(32, dim=-1)
    back = dequantize_planes(name, _stored(name, values))
    scale = lookup(name).planes[1]
    for block in _blocks(values.shape, scale.rows or rows, scale.cols or columns):
        step = values[block].abs().max() / (127 if name == "q8_32" else 448)
        # Half of the last bit: of an integer a half, of e4m3's three bits a sixteenth, or 2^-10 of the smallest.
        most = step / 2 if name == "q8_32" else torch.maximum(values[block].abs() / 16, step * 2**-10)
        assert ((back[block] - values[block]).abs() <= most * 1.001).all()


def _blocks(shape, tall, wide):
    """The places of the blocks that share a scale."""
    for row in range(0, shape[0], tall):
        for column in range(0, shape[1], wide):
            yield slice(row, row + tall), slice(column, column + wide)


@pytest.mark.parametrize("name", ["bf16", *OWN, "fp8_128x128"])
@pytest.mark.parametrize(("m", "start", "stop"), [(1, 0, 1), (2, 0, 1), (300, 128, 300), (300, 256, 257)])
def test_the_planes_of_some_rows_hold_these_rows(name, m, start, stop):
    """Also where there are as many rows as blocks of columns, which no shape tells apart."""
    values = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)) * 2.0 ** -(torch.arange(256) // 32)
    planes, rows = _stored(name, values), slice(start, stop)
    found = planes_of_rows(name, planes, rows)
    assert dequantize_planes(name, found).equal(dequantize_planes(name, planes)[rows])


@pytest.mark.parametrize("name", [*PLAIN, *OWN])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(shape=shapes, seed=seeds, scale=st.sampled_from([1e-42, 1e-30, 1e-6, 1.0, 1e4]), dense=st.booleans())
def test_zeros_stay_zeros_and_nothing_becomes_nan(name, shape, seed, scale, dense):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    values[:, :128] = 0
    values[0] = 0
    if not dense:
        values.zero_()
    planes = _stored(name, values)
    back = dequantize_planes(name, planes)
    assert back.isfinite().all()
    assert (back[values == 0] == 0).all()
    assert all(plane.float().isfinite().all() for plane in planes)


@pytest.mark.parametrize("name", OWN)
@settings(derandomize=True, deadline=None, max_examples=20)
@given(shape=shapes, seed=seeds, factor=st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**20]))
def test_scales_follow_the_magnitude(name, shape, seed, factor):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    small, large = (dequantize_planes(name, _stored(name, values * by)) for by in (1.0, factor))
    torch.testing.assert_close(large, small * factor, rtol=1e-6, atol=0)


def test_q8_32_keeps_the_sums_of_what_it_stores():
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    qs, scales, sums = _stored("q8_32", values)
    expected = (qs.view(5, 3, 32).float() * scales.unsqueeze(-1)).sum(dim=-1)
    torch.testing.assert_close(sums, expected)
    assert qs.abs().view(5, 3, 32).amax(dim=-1).eq(127).all()


@pytest.mark.parametrize("name", GGUF)
@settings(derandomize=True, deadline=None, max_examples=10)
@given(rows=st.integers(1, 9), seed=seeds)
def test_gguf_blocks_dequantise_as_the_gguf_package_does_bit_for_bit(name, rows, seed):
    shape, kind = (rows, 768), gguf.GGMLQuantizationType[name]
    generator = torch.Generator().manual_seed(seed)
    for blocks in _random_blocks(name, shape, generator):
        # Where the scales are random bytes too, some are infinite.
        with np.errstate(all="ignore"):
            found = Weight("w", shape, name, (blocks,)).dequantize()
            # The rows one by one: whatever core does with the whole, it must not mix them.
            expected = np.concatenate([gguf.dequantize(row.numpy(), kind) for row in blocks.split(1)])
        assert found.shape == shape
        assert _same_bits(found.numpy(), expected)


def _same_bits(found, expected):
    """Of what is no number the payload is nobody's promise."""
    numbers = ~np.isnan(expected)
    return np.array_equal(~np.isnan(found), numbers) and found[numbers].tobytes() == expected[numbers].tobytes()


def _random_blocks(name, shape, generator):
    """Blocks with scales like a model's and with tiny ones, where cases draw the format; else any bytes."""
    if name in (*BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS):
        return [random_blocks(name, shape, generator, tiny=tiny) for tiny in (False, True)]
    return [torch.randint(256, lookup(name).planes[0].shape(shape), generator=generator, dtype=torch.uint8)]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_weights_dequantise_as_the_gguf_package_does_bit_for_bit(name):
    bits = torch.randint(256, (3, 4 * 512), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    stored = bits.view(lookup(name).dtype)
    found = Weight("w", tuple(stored.shape), name, (stored,)).dequantize().numpy()
    raw = bits.numpy().view({"f32": np.float32, "f16": np.float16}.get(name, np.uint8))
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
    assert _same_bits(found, expected)


def test_a_plain_weight_is_dequantised_without_a_copy():
    stored = torch.arange(6, dtype=torch.float32)
    dense = Weight("w", (2, 3), "f32", (stored,)).dequantize()
    assert dense.shape == (2, 3)
    assert dense.data_ptr() == stored.data_ptr()


def test_a_weight_in_a_format_of_kernelmux_is_dequantised_with_its_scales():
    values = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    found = Weight("w", (4, 128), "fp8_row", _stored("fp8_row", values)).dequantize()
    assert torch.equal(found, dequantize_planes("fp8_row", _stored("fp8_row", values)))


@pytest.mark.parametrize("name", INT4_WEIGHTS)
def test_4_bit_groups_are_their_numbers_one_by_one(name):
    shape = (5, 256)
    data, scales, zeros = random_groups(name, shape, torch.Generator().manual_seed(2))
    found = Weight("w", shape, name, (data, scales, zeros)).dequantize(torch.float64)
    group = shape[1] // scales.shape[1]
    for row in range(5):
        for column in (0, 1, 31, 32, 127, 128, 255):
            q = int(data[row, column // 2]) >> 4 * (column % 2) & 15
            step, zero = float(scales[row, column // group]), int(zeros[row, column // group])
            assert float(found[row, column]) == step * (q - zero)
    some = planes_of_rows(name, (data, scales, zeros), slice(1, 3))
    assert Weight("w", (2, 256), name, some).dequantize(torch.float64).equal(found[1:3])


def test_extents_of_a_symbol_name_the_value():
    value = Value("tokens", ("m", 4), "i32")
    with pytest.raises(GraphError, match="tokens: 'm' has no extent yet"):
        _ = value.extents
    assert value.resolve({"m": 3}).extents == (3, 4)
    assert value.resolve({"outs": 3}) == value


def test_every_format_that_a_case_draws_exists():
    used = {value.format for op in OPS.values() for case in op.cases() for value in case.inputs}
    assert all(lookup(name) for name in used)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), seed=seeds, name=st.sampled_from(["f16", "bf16", "q8_32", "fp8_row", "fp8_tensor"]))
def test_values_stored_together_are_what_each_is_by_itself(rows, seed, name):
    several = torch.randn(3, rows, 128, generator=torch.Generator().manual_seed(seed))
    together = stored_as(name, several)
    assert together.dtype == torch.float32
    for values, stored in zip(several, together, strict=True):
        planes = empty_planes(Value("x", tuple(values.shape), name))
        quantize_planes(name, values, planes)
        assert stored.equal(dequantize_planes(name, planes))

"""Safetensors files: what they hold, and each fault in one line."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelmux.errors import ModelError
from kernelmux.models.safetensors import DTYPES, ITEMS, plain_weight, read_planes, write_safetensors


def packed(table, data=b"", length=None):
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def row(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def opened(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return weights_of(path)


def weights_of(path):
    """As a folder reads a file of plain weights."""
    planes, stamp = read_planes(path, tuple(DTYPES))
    return {name: plain_weight(name, plane) for name, plane in planes.items()}, stamp


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_numbers_come_out_as_they_were_stored(tmp_path, name, dtype):
    values = torch.arange(6).to(dtype).view(2, 3)
    raw = bytes(values.view(torch.uint8).flatten().tolist())
    table = {"__metadata__": {"format": "pt"}, "w": row(name, offsets=(0, len(raw)))}
    weights, _ = opened(tmp_path, packed(table, raw))
    assert (list(weights), weights["w"].shape) == (["w"], (2, 3))
    assert weights["w"].planes[0].equal(values)


def test_what_the_library_writes_is_read_alike(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    kept = {f"t{n}": torch.randn(n + 1, 5, generator=generator).to(torch.bfloat16) for n in range(4)}
    kept["v"] = torch.randn(7, generator=generator)
    library.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights, _ = weights_of(tmp_path / "model.safetensors")
    assert set(weights) == set(kept)
    assert all(weights[name].planes[0].equal(values) for name, values in kept.items())


BAD = {
    "shorter than its length": (b"\x08\0", "2 bytes are no safetensors file"),
    "a header beyond the end": (packed({}, length=2**40), f"a header of {2**40} bytes in a file of 10"),
    "no JSON": (packed(b"{'w': 1}"), "is not JSON"),
    "deep JSON": (packed(b"[" * 100_000), "is not JSON"),
    "a list": (packed(b"[1]"), "JSON, but of a list"),
    "a name twice": (packed(b'{"w": 1, "w": 2}'), "a key occurs twice"),
    "NaN": (packed(b'{"w": NaN}'), "NaN is no number"),
    "no row": (packed({"w": 3}), "tensor 'w': dtype, shape and data_offsets are needed"),
    "a key more": (packed({"w": {**row(), "x": 1}}, bytes(24)), "are needed"),
    "another type": (
        packed({"w": row("F8_E4M3")}, bytes(24)),
        "as 'F8_E4M3'; F32, F16, BF16 are read, and others by config",
    ),
    "no extents": (packed({"w": row(shape=(), offsets=(0, 4))}, bytes(4)), "1 to 4 positive counts"),
    "an extent of 0": (packed({"w": row(shape=(0, 3), offsets=(0, 0))}), "1 to 4 positive counts"),
    "an extent below 0": (packed({"w": row(shape=(-2, -3))}, bytes(24)), "1 to 4 positive counts"),
    "an extent that is true": (packed({"w": row(shape=(True, 6))}, bytes(24)), "1 to 4 positive counts"),
    "one offset": (packed({"w": row(offsets=(0,))}, bytes(24)), "a first and a last byte are needed"),
    "too few bytes": (packed({"w": row(offsets=(0, 23))}, bytes(23)), "takes 24 bytes, bytes 0 to 23 of 23"),
    "cut short": (packed({"w": row()}, bytes(23)), "takes 24 bytes, bytes 0 to 24 of 23 .*truncated"),
    "overlapping": (packed({"a": row(), "b": row(offsets=(20, 44))}, bytes(44)), "tensor 'b' begins at byte"),
    "a gap": (packed({"w": row(offsets=(4, 28))}, bytes(28)), "tensor 'w' begins at byte"),
    "more behind": (packed({"w": row()}, bytes(30)), "its tensors end at byte"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_fault_is_one_line(tmp_path, content, message):
    with pytest.raises(ModelError, match=message) as caught:
        opened(tmp_path, content)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(tmp_path))


GOOD = packed({"a": row(), "b": row("BF16", (4,), (24, 32))}, bytes(32))


@settings(derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut_is_a_line_or_a_file_of_the_same_size(tmp_path, at, bit, cut):
    damaged = bytearray(GOOD[:at] if cut else GOOD)
    if not cut:
        damaged[at] ^= 1 << bit
    assert held(tmp_path, bytes(damaged)) in (None, 32)


def held(tmp_path, content):
    """The bytes of all weights; None where the file is refused, in one line."""
    try:
        weights, _ = opened(tmp_path, content)
    except ModelError as error:
        return None if "\n" not in str(error) else -1
    return sum(weight.nbytes for weight in weights.values())


def test_planes_of_every_type_come_back_to_the_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-128, 128, (3, 8), dtype=torch.int8, generator=generator)
    kept = {name: bits.view(getattr(torch, dtype)) for name, dtype in ITEMS.items()}
    with open(tmp_path / "numbers.safetensors", "wb") as file:
        write_safetensors({**kept, "by columns": bits.t()}, file)
    planes, _ = read_planes(tmp_path / "numbers.safetensors")
    assert set(planes) == {*kept, "by columns"}
    assert all(planes[name].tensor().view(torch.int8).equal(bits) for name in kept)
    assert planes["by columns"].tensor().equal(bits.t())

"""Reading GGUF that is wrong: each fault is said in one line, and no damage gets past the checks."""

import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damaged_gguf import ARRAY, BAD, HUGE, TEXT, U8, U32
from damaged_gguf import array as _array
from damaged_gguf import file as _file
from damaged_gguf import pair as _pair
from damaged_gguf import row as _row
from damaged_gguf import text as _text
from kernelmux.errors import ModelError
from kernelmux.graph.formats import FORMATS
from kernelmux.models.gguf import read
from kernelmux.models.header import LONGEST_HEADER, LONGEST_ITEM, LONGEST_TEXT, MOST_ITEMS, MOST_PAIRS


@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_explained_in_one_line(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.file == str(path)


def test_the_file_of_those_parts_is_otherwise_good(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(_file([_pair("k", ARRAY, _array(TEXT, 1, _text("v")))], [_row("w", (4, 2))], version=2))
    file = read(path)
    assert file.metadata == {"k": ["v"]}
    assert file.weights["w"].planes[0].tolist() == [[0.0] * 4] * 2


def test_a_name_of_half_the_file_is_not_printed_whole(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(_file([_pair("k\n" * 30_000, 13, bytes(8))]))
    with pytest.raises(ModelError) as caught:
        read(path)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_text_as_long_as_the_weights_is_not_read(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(_file([_pair("k", TEXT, struct.pack("<Q", LONGEST_HEADER))]))
    with path.open("r+b") as file:
        file.truncate(2 * LONGEST_HEADER)
    with pytest.raises(ModelError, match=r"metadata 'k': .* run past the longest header that is read"):
        read(path)


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(ModelError, match="no such file") as absent:
        read(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a directory") as folder:
        read(str(tmp_path))
    assert [caught.value.file for caught in (absent, folder)] == [str(tmp_path / "none.gguf"), str(tmp_path)]


HOSTILE = {
    "a string of 3 MB": (lambda: [_pair("k", TEXT, _text("a" * 3_000_000))], f"3000000 bytes; up to {LONGEST_TEXT}"),
    "a token of 5 MB": (
        lambda: [_pair("tokens", ARRAY, _array(TEXT, 1, _text("a" * 5_000_000)))],
        f"'tokens': a string of 5000000 bytes; up to {LONGEST_ITEM} are read",
    ),
    "a key of 5 MB": (lambda: [_pair("k" * 5_000_000, U8, b"1")], "a string of 5000000 bytes; up to 65535"),
    "a hundred thousand keys": (
        lambda: [_pair(f"{number}", U8, b"1") for number in range(100_000)],
        f"100000 metadata pairs; up to .* and {MOST_PAIRS} are read",
    ),
    "an array of two million": (
        lambda: [_pair("k", ARRAY, _array(U8, 2_000_000, bytes(2_000_000)))],
        f"an array of 2000000 items; up to {MOST_ITEMS} are read",
    ),
    "many strings, all empty": (
        lambda: [_pair("k", ARRAY, _array(TEXT, 2_000_000, bytes(16_000_000)))],
        f"an array of 2000000 items; up to {MOST_ITEMS} are read",
    ),
    "40 MB of tokens": (
        lambda: [_pair("k", ARRAY, _array(TEXT, 10_000, _text("a" * 4000) * 10_000))],
        "its strings take more than 33554432 bytes",
    ),
}


@pytest.mark.parametrize(("pairs", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_model_has_costs_neither_time_nor_memory(tmp_path, pairs, message):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(_file(pairs()))
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as caught:
            read(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 1
    assert most < 120e6
    assert len(str(caught.value)) < 600


def test_tensor_names_are_as_long_as_ggml_takes_them(tmp_path):
    (tmp_path / "good.gguf").write_bytes(_file(rows=[_row("w" * 63)]))
    assert list(read(tmp_path / "good.gguf").weights) == ["w" * 63]
    (tmp_path / "bad.gguf").write_bytes(_file(rows=[_row("w" * 64)]))
    with pytest.raises(ModelError, match="name of tensor 0: a string of 64 bytes; up to 63 are read"):
        read(tmp_path / "bad.gguf")


def test_every_truncation_is_noticed(tmp_path):
    raw = _file([_pair("k", TEXT, _text("value"))], [_row("v"), _row("w", offset=32)], data=48)
    for length in range(1, len(raw)):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            read(path)


# Damage at random

SEED_PAIRS = [
    _pair("general.architecture", TEXT, _text("llama")),
    _pair("general.alignment", U32, struct.pack("<I", 32)),
    _pair("words", ARRAY, _array(TEXT, 3, _text("a") + _text("") + _text("東京"))),
    _pair("numbers", ARRAY, _array(U32, 4, bytes(16))),
]
SEED_ROWS = [
    _row("norm", (16,)),
    _row("q8", (64, 2), 8, 64),
    _row("bf16", (8, 2, 2), 30, 224),
    _row("last", (4, 4), 0, 288),
]
SEED_FILE = _file(SEED_PAIRS, SEED_ROWS, data=352)
HEADER_BYTES = len(SEED_FILE) - 352
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, HUGE]

at = st.integers(0, HEADER_BYTES + 8)
damages = st.one_of(
    st.tuples(st.just("flip"), at, st.integers(0, 7)),
    st.tuples(st.just("overwrite"), at, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("overwrite"), at, st.sampled_from(EXTREMES).map(lambda number: struct.pack("<Q", number))),
    st.tuples(st.just("overwrite"), at, st.integers(0, 2**32 - 1).map(lambda number: struct.pack("<I", number))),
    st.tuples(st.just("insert"), at, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("delete"), at, st.integers(1, 16)),
    st.tuples(st.just("truncate"), st.integers(0, len(SEED_FILE)), st.none()),
)


def _damaged(raw, damage):
    kind, where, how = damage
    if kind == "flip":
        how = bytes([raw[where] ^ 1 << how]) if where < len(raw) else b""
        kind = "overwrite"
    if kind == "overwrite":
        return raw[:where] + how + raw[where + len(how) :]
    if kind == "insert":
        return raw[:where] + how + raw[where:]
    return raw[:where] + raw[where + how :] if kind == "delete" else raw[:where]


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(damages, min_size=1, max_size=4))
def test_a_damaged_header_is_refused_or_read_within_bounds(tmp_path_factory, damage):
    raw = SEED_FILE
    for one in damage:
        raw = _damaged(raw, one)
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    refusal = ""
    try:
        weights = read(path).weights
    except ModelError as error:
        refusal, weights = str(error), {}
    assert "\n" not in refusal
    for weight in weights.values():
        assert weight.planes[0].shape == FORMATS[weight.format].planes[0].shape(weight.shape)
        weight.planes[0].sum()
    assert sum(plane.nbytes for weight in weights.values() for plane in weight.planes) <= len(raw)


def test_the_file_that_is_damaged_is_good(tmp_path):
    (tmp_path / "seed.gguf").write_bytes(SEED_FILE)
    file = read(tmp_path / "seed.gguf")
    assert [(weight.name, weight.shape, weight.format) for weight in file.weights.values()] == [
        ("norm", (16,), "f32"),
        ("q8", (2, 64), "Q8_0"),
        ("bf16", (2, 2, 8), "bf16"),
        ("last", (4, 4), "f32"),
    ]

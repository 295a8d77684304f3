"""Reading GGUF that is wrong: each fault is said in one line, and no damage gets past the checks."""

import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelmux.errors import ModelError
from kernelmux.graph.formats import FORMATS
from kernelmux.models.gguf import read
from kernelmux.models.header import LONGEST_HEADER, LONGEST_ITEM, LONGEST_TEXT, MOST_ITEMS, MOST_PAIRS

U8, U32, TEXT, ARRAY = 0, 4, 8, 9
HUGE = 2**64 - 1


def _text(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pair(key, kind, value):
    return _text(key) + struct.pack("<I", kind) + value


def _row(name, shape=(4,), number=0, offset=0):
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def _file(pairs=(), rows=(), data=64, *, magic=b"GGUF", version=3, tensors=None, count=None, order="<"):
    """A file by its parts; 64 bytes of data unless told."""
    counts = (len(rows) if tensors is None else tensors, len(pairs) if count is None else count)
    head = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join([*pairs, *rows])
    return head + bytes(-len(head) % 32) + bytes(data)


def _array(kind, count, items=b""):
    return struct.pack("<IQ", kind, count) + items


BAD = {
    "empty": (b"", "is empty"),
    "wrong magic": (_file(magic=b"PK\x03\x04"), r"starts with b'PK.*b'GGUF'"),
    "shorter than its magic": (b"GG", "starts with b'GG'"),
    "cut in the counts": (_file()[:20], "counts: 16 bytes at byte 8 run past the end of the file"),
    "version 1": (_file(version=1), "version: found 1; versions 2 and 3"),
    "version of the future": (_file(version=4), "version: found 4; versions 2 and 3"),
    "big-endian": (_file(order=">"), "big-endian"),
    "more tensors than bytes": (_file(tensors=HUGE), f"{HUGE} tensors and 0 metadata pairs do not fit"),
    "more pairs than bytes": (_file(count=2**40), f"0 tensors and {2**40} metadata pairs do not fit"),
    "pairs that are not there": (_file(count=3), "metadata"),
    "endless key": (_file([struct.pack("<Q", HUGE) + bytes(20)]), rf"key of metadata pair 0: {HUGE} bytes"),
    "endless text": (_file([_pair("k", TEXT, struct.pack("<Q", 2**62))]), "metadata 'k': .* run past the end"),
    "text that is not UTF-8": (_file([_pair("k", TEXT, _text(b"\xff\xfe"))]), "metadata 'k': .* not UTF-8"),
    "key that is not UTF-8": (_file([_pair(b"\xc3", U8, b"1")]), "key of metadata pair 0: .* not UTF-8"),
    "unknown value type": (_file([_pair("k", 13, bytes(8))]), "metadata 'k': value type 13 is unknown; known: 0, 1"),
    "unknown item type": (_file([_pair("k", ARRAY, _array(99, 1, bytes(8)))]), "'k': value type 99 is unknown"),
    "nested array": (_file([_pair("k", ARRAY, _array(ARRAY, 1, _array(U8, 1, b"1")))]), "array of arrays"),
    "endless array": (_file([_pair("k", ARRAY, _array(U32, HUGE))]), "metadata 'k': .* run past the end"),
    "endless array of text": (_file([_pair("k", ARRAY, _array(TEXT, HUGE))]), "metadata 'k': .* run past the end"),
    "array of text cut short": (_file([_pair("k", ARRAY, _array(TEXT, 5, _text("a" * 9)))], data=0), "'k': 8 bytes at"),
    "key twice": (_file([_pair("k", U8, b"1"), _pair("k", U8, b"2")]), "metadata 'k': occurs twice"),
    "one of several parts": (_file([_pair("split.count", U8, b"\x03")]), "is part 1 of 3: name it NAME-00001-of-00003"),
    "parts in words": (
        _file([_pair("split.count", TEXT, _text("3"))]),
        "'split.count': found '3'; a number up to 1000",
    ),
    "a part beyond all": (
        _file([_pair("split.count", U8, b"\x03"), _pair("split.no", U8, b"\x03")]),
        "is part 4 of 3: name it",
    ),
    "alignment of no power": (_file([_pair("general.alignment", U32, struct.pack("<I", 24))]), "found 24; a power"),
    "alignment of zero": (_file([_pair("general.alignment", U32, bytes(4))]), "found 0; a power of two"),
    "alignment in words": (_file([_pair("general.alignment", TEXT, _text("32"))]), "found '32'; a power"),
    "tensor twice": (_file(rows=[_row("w"), _row("w", offset=32)]), "tensor 'w': occurs twice"),
    "tensor name not UTF-8": (_file(rows=[_row(b"\xff")]), "name of tensor 0: .* not UTF-8"),
    "no dimensions": (_file(rows=[_row("w", ())]), "tensor 'w': 0 dimensions; from 1 to 4"),
    "too many dimensions": (_file(rows=[_row("w", (1,) * 5)]), "tensor 'w': 5 dimensions; from 1 to 4"),
    "no elements": (_file(rows=[_row("w", (4, 0))]), r"tensor 'w': shape \(0, 4\) has no elements"),
    "unknown type": (_file(rows=[_row("w", number=4)]), "tensor 'w': type number 4 .* known: 0 f32, 1 f16, 2 Q4_0"),
    "block that does not divide": (_file(rows=[_row("w", (48,), 2)]), r"\(48,\): Q4_0 stores rows in blocks of 32"),
    "endless extent": (_file(rows=[_row("w", (2**62, 2**62))]), "tensor 'w': f32 .* the file has"),
    "extent past the file": (
        _file(rows=[_row("w", (17,))]),
        r"f32 \(17,\) takes 68 bytes from byte 64 on, the file has 128",
    ),
    "offset past the file": (_file(rows=[_row("w", offset=2**63)]), f"data at offset {2**63}"),
    "tensors that overlap": (
        _file(rows=[_row("v"), _row("w")]),
        "'w': data at offset 0, the tensors before it end at 32",
    ),
    "no data": (_file(rows=[_row("w")], data=0), "tensor 'w': .* fetch it again"),
}


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

"""Writing GGUF: what is written is what `read`, and the gguf package, read."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelmux.graph.formats import Value
from kernelmux.models.gguf import read
from kernelmux.models.header import ARRAY, NUMBERS, STRING
from kernelmux.models.writer import Writer, kind_of

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.float32)}
VALUES = [Value(name, array.shape, "f32") for name, array in TENSORS.items()]


def write(path, metadata, kinds=None, tensors=VALUES):
    with path.open("wb") as file:
        writer = Writer(file, metadata, kinds or {}, tensors)
        for tensor in tensors:
            writer.tensor(iter([memoryview(TENSORS[tensor.name]).cast("B")]))
    return path


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_tensors_lie_where_every_reader_looks_for_them(tmp_path, alignment):
    metadata = {"general.architecture": "llama"} | ({} if alignment is None else {"general.alignment": alignment})
    path = write(tmp_path / "w.gguf", metadata)
    for name, weight in read(path).weights.items():
        np.testing.assert_array_equal(weight.planes[0].numpy(), TENSORS[name])
    for tensor in gguf.GGUFReader(path).tensors:
        np.testing.assert_array_equal(tensor.data, TENSORS[tensor.name])
        assert tensor.data_offset % (alignment or 32) == 0


RANGES = {
    **{0: (0, 2**8 - 1), 1: (-(2**7), 2**7 - 1), 2: (0, 2**16 - 1), 3: (-(2**15), 2**15 - 1), 4: (0, 2**32 - 1)},
    **{5: (-(2**31), 2**31 - 1), 10: (0, 2**64 - 1), 11: (-(2**63), 2**63 - 1)},
}
typed = st.one_of(
    *(st.tuples(st.just((kind,)), st.integers(*RANGES[kind])) for kind in RANGES),
    *(st.tuples(st.just((ARRAY, kind)), st.lists(st.integers(*RANGES[kind]), max_size=4)) for kind in RANGES),
    st.tuples(st.just((6,)), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just((12,)), st.floats(allow_nan=False)),
    st.tuples(st.just((7,)), st.booleans()),
    st.tuples(st.just((STRING,)), st.text(max_size=9)),
    st.tuples(st.just((ARRAY, STRING)), st.lists(st.text(max_size=9), max_size=4)),
)


@given(pairs=st.dictionaries(st.text(min_size=1, max_size=9).map(lambda key: f"k.{key}"), typed, max_size=6))
def test_metadata_comes_back_with_its_types(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "typed.gguf"
    metadata = {key: value for key, (_, value) in pairs.items()}
    kinds = {key: kind for key, (kind, _) in pairs.items()}
    file = read(write(path, metadata, kinds))
    assert file.metadata == metadata
    assert file.kinds == kinds


@given(
    value=st.one_of(st.text(), st.booleans(), st.floats(width=32, allow_nan=False), st.integers(-(2**63), 2**64 - 1))
)
def test_values_without_a_type_are_read_as_what_they_were(tmp_path_factory, value):
    path = write(
        tmp_path_factory.getbasetemp() / "plain.gguf", {"k": value, "l": [value, value]} if value else {"k": value}
    )
    assert read(path).metadata["k"] == value
    assert type(read(path).metadata["k"]) is type(value)


def test_kinds_that_are_chosen():
    assert [kind_of(value) for value in (1, 2**32, -1, -(2**40))] == [(4,), (10,), (5,), (11,)]
    assert [kind_of(value) for value in ([], [1, -1], [2**31], ["a"], [1.5], [True])] == [
        *((ARRAY, 5), (ARRAY, 5), (ARRAY, 11), (ARRAY, STRING), (ARRAY, 6), (ARRAY, 7)),
    ]
    assert set(NUMBERS) == {0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12}

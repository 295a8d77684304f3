"""A model file's bytes: what is no file is said in its own words, and what changes under a reader is an error."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.models.gguf import read
from kernelmux.models.stored import LARGEST_READ, StoredFile, StoredPlane, StoredWeight, loaded, made_plane, rows_of
from tiny_model import write_tiny_llama


def _loop(path):
    path.symlink_to(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


NO_FILE = {
    "pipe": (os.mkfifo, "is a pipe, and a model is read from several places: save it to a file first"),
    "loop": (_loop, "is a link that leads back to itself"),
    "socket": (_socket, "cannot be read: No such device or address"),
    "dangling": (lambda path: path.symlink_to(path.with_name("gone")), "no such file"),
    "empty": (lambda path: path.touch(), "is empty, 0 bytes; fetch it again"),
}


@pytest.mark.parametrize(("make", "message"), NO_FILE.values(), ids=NO_FILE)
def test_what_is_no_file_is_said_in_its_own_words(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m.gguf")
    with pytest.raises(ModelError) as caught:
        StoredFile(tmp_path / "m.gguf")
    assert str(caught.value) == f"{tmp_path / 'm.gguf'}: {message}"


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path, message in {
        tmp_path / ("n" * 300): "the path is too long for the file system",
        tmp_path / "file" / "m.gguf": "no such file: a part of the path is no directory",
        tmp_path / "a\0b": "no such file: embedded null byte",
        "/dev/null": "is a device, not a file",
        tmp_path: "is a directory",
    }.items():
        with pytest.raises(ModelError, match=message):
            StoredFile(type(tmp_path)(path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """As told by the system: root, as whom tests may run, reads everything."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ModelError, match=r"m\.gguf: no permission to read it"):
        StoredFile(tmp_path / "m.gguf")


def test_a_weight_is_read_when_it_is_asked_for_and_kept_once_loaded(tmp_path):
    weight = read(write_tiny_llama(tmp_path / "m.gguf")).weights["output_norm.weight"]
    assert isinstance(weight, StoredWeight)
    first, second = weight.planes[0], weight.planes[0]
    assert first.equal(second)
    assert first.data_ptr() != second.data_ptr()
    kept = loaded(weight)
    assert kept.planes[0].data_ptr() == kept.planes[0].data_ptr()
    assert (kept.name, kept.shape, kept.format) == (weight.name, weight.shape, weight.format)


def test_large_reads_are_made_in_pieces(tmp_path, monkeypatch):
    assert LARGEST_READ < 2**31
    monkeypatch.setattr("kernelmux.models.stored.LARGEST_READ", 3)
    (tmp_path / "m").write_bytes(b"0123456789")
    assert StoredFile(tmp_path / "m").read(1, 8) == b"12345678"


def test_a_file_that_is_deleted_or_replaced_is_still_the_one_that_was_opened(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    weights = read(path).weights
    before = weights["output_norm.weight"].planes[0]
    write_tiny_llama(tmp_path / "other.gguf", seed=1).replace(path)
    assert weights["output_norm.weight"].planes[0].equal(before)
    path.unlink()
    assert weights["output_norm.weight"].planes[0].equal(before)


def test_files_are_closed_with_what_was_read_from_them(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    before = len(os.listdir("/proc/self/fd"))
    file = read(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del file
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_cut_short_after_it_was_opened_is_one_line(tmp_path):
    """In a process of its own: what is mapped and gone kills it."""
    path = write_tiny_llama(tmp_path / "m.gguf")
    code = f"""
        import os
        import kernelmux
        from kernelmux.errors import ModelError
        for use in (("*=reference",), ("*=torch",)):
            model = kernelmux.load({str(path)!r})
            plan = model.plan(use=use)
            size = os.path.getsize({str(path)!r})
            with open({str(path)!r}, "r+b") as file:
                file.truncate(size // 3)
            try:
                model.forward([1, 2], plan)
            except ModelError as error:
                print(error)
            with open({str(path)!r}, "r+b") as file:
                file.truncate(size)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("has become shorter since it was opened" in line for line in lines)


def test_what_was_packed_before_goes_on(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    model = kernelmux.load(path)
    plan = model.plan(use=["*=reference"])
    before = model.forward([1, 2], plan)
    os.truncate(path, 100)
    assert model.forward([1, 2], plan).equal(before)


def test_a_file_that_is_written_to_is_not_read_on(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    weights = read(path).weights
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match="was written to since it was opened; load it again"):
        weights["output_norm.weight"].dequantize()


def test_some_rows_of_a_matrix_are_read_alone(tmp_path):
    """Of fused projections each part is a weight of its own, and opening the model reads none of them."""
    weight = read(write_tiny_llama(tmp_path / "m.gguf")).weights["token_embd.weight"]
    part = rows_of(weight, "part", slice(2, 5))
    assert isinstance(part, StoredWeight)
    assert (part.name, part.shape, part.format) == ("part", (3, weight.shape[1]), weight.format)
    assert part.dequantize().equal(weight.dequantize()[2:5])
    assert part.nbytes == sum(plane.nbytes for plane in part.stored)
    again = rows_of(loaded(weight), "part", slice(2, 5))
    assert again.dequantize().equal(part.dequantize())


def test_a_plane_that_is_made_is_made_once_for_all_its_pieces_and_let_go(tmp_path):
    (tmp_path / "numbers").write_bytes(bytes(range(60)))
    stored = StoredPlane(StoredFile(tmp_path / "numbers"), 0, "uint8", (60,), 60)
    made = []

    def doubled(numbers):
        made.append(numbers)
        return numbers.to(torch.int32) * 2

    plane = made_plane("int32", (6, 10), (stored,), doubled)
    again = made_plane("int32", (10, 6), (plane,), lambda numbers: numbers.T)
    assert again.sources == (stored,)
    assert made == []
    with ThreadPoolExecutor(4) as threads:
        pieces = list(threads.map(lambda start: bytes(plane.read(start, 20)), range(0, 240, 20)))
    assert torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.int32).equal(torch.arange(60).int() * 2)
    assert len(made) == 1
    assert plane.rows(slice(2, 4)).tensor().tolist() == [list(range(40, 60, 2)), list(range(60, 80, 2))]
    assert len(made) == 2, "what has been read is let go"
    assert again.tensor().equal(plane.tensor().T)

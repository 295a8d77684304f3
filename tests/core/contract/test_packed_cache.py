"""Packed weights on disk: what was kept comes back to the bit, and whatever is not that is packed anew, and told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernelmux
from command import TIMEOUT
from fake_backend import CPU, FakeKernel
from kernelmux.contract import contents, packed_cache, packed_file
from kernelmux.contract.cache import Cache
from kernelmux.contract.device import Device
from kernelmux.contract.packed_cache import PackedCache
from kernelmux.contract.packed_file import LAYOUT, MAGIC
from kernelmux.errors import ModelError
from kernelmux.graph.formats import Weight
from kernelmux_torch.mul_mat import F32
from tiny_model import write_tiny_llama

USE = ("*=torch:f32,torch:sdpa,torch:rows",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bool)
MATRICES = 15
FORM = (("w",), "torch/form")


def write_model(path: Path, seed: int = 0) -> Path:
    """Matrices in 4 bits, so that all of them are packed."""
    return write_tiny_llama(path, weight_type=gguf.GGMLQuantizationType.Q4_0, seed=seed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf")


def start(path: Path, use=USE):
    """A session as a process begins it, all packed, and all written."""
    model = kernelmux.load(path)
    session = model.session(model.plan(use=use, max_rows=8), 20, cache_packed=True)
    for _ in session.prepare(()):
        pass
    session.packed_cache.background.finish()
    return session


def files() -> list[Path]:
    folder = Cache("packed").folder
    return sorted(folder.iterdir()) if folder.is_dir() else []


def held(session):
    return session.walker.packed._held


def as_bytes(planes):
    return [packed_file.flat_bytes(plane).numpy().tobytes() for plane in planes]


def logits(session):
    return session.feed(session.open(), [1, 2, 3])


def packed_anew(session):
    """How many forms of matrices a session packed: the others are none, or the model's own memory, at each start."""
    return session.walker.made.packed - (len(held(session)) - MATRICES)


# What comes back


def test_a_second_start_packs_nothing_and_computes_the_same(path: Path):
    first, second = start(path), start(path)
    matrices = [
        form for form, planes in held(first).items() if planes and form[1] == "torch/f32" and planes[0].dim() == 2
    ]
    assert len(files()) == len(matrices) == packed_anew(first) == MATRICES
    assert packed_anew(second) == 0
    assert first.packed_cache.mapped_bytes == 0
    assert second.packed_cache.mapped_bytes == sum(held(second)[form][0].nbytes for form in matrices)
    for form, planes in held(first).items():
        assert as_bytes(planes) == as_bytes(held(second)[form])
    assert logits(first).equal(logits(second))
    assert first.packed_cache.notes == second.packed_cache.notes == []


def test_nothing_is_kept_unless_asked_for(path: Path):
    model = kernelmux.load(path)
    assert "".join(model.generate("hi", max_tokens=2))
    assert not files()


def test_an_answer_is_as_it_was(path: Path):
    def answer():
        generation = kernelmux.load(path).generate("hello", max_tokens=8, cache_packed=True)
        text = "".join(generation)
        generation.session.packed_cache.background.finish()
        return text, generation.session.packed_cache.mapped_bytes

    (first, none), (second, some) = answer(), answer()
    assert first == second
    assert none == 0 < some


planes_of = st.tuples(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.permutations(range(3)), st.integers(0, 3)
)


@pytest.mark.slow
@given(drawn=st.lists(planes_of, max_size=3), large=st.booleans())
def test_any_planes_come_back_with_their_shapes_strides_and_bytes(tmp_path_factory, drawn, large):
    """Whatever their order in memory, and wherever in it they begin; also of more than one piece."""
    planes = []
    for dtype, shape, order, offset in drawn:
        axes = [axis for axis in order if axis < len(shape)]
        count = torch.Size(shape).numel()
        memory = torch.randint(2, 256, (8 * (count + offset),), generator=torch.Generator().manual_seed(count))
        memory = memory.to(torch.uint8) if dtype != torch.bool else memory.to(torch.uint8) % 2
        flat = memory[: (count + offset) * dtype.itemsize].view(dtype)[offset:]
        back = [axes.index(axis) for axis in range(len(shape))]
        planes.append(flat.view([shape[axis] for axis in axes]).permute(back))
    if large:
        planes.append(torch.arange(packed_file.PIECE // 2 + 5, dtype=torch.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELMUX_CACHE", str(tmp_path_factory.mktemp("cache")))
        one, kernel = a_cache(), FakeKernel()
        one.keep(FORM, kernel, tuple(planes), [])
        one.start()
        one.background.finish()
        other = a_cache()
        found = other.find(FORM, kernel)
        if not planes:
            assert found is None
            return
        assert found is not None
        assert all(plane.data_ptr() % packed_file.ALIGNMENT == 0 for plane in found.planes if len(plane))
        there = other.checked(found, kernel)
        assert there is not None
        assert [(p.dtype, p.shape, p.stride()) for p in there] == [(p.dtype, p.shape, p.stride()) for p in planes]
        assert as_bytes(there) == as_bytes(planes)
        assert not one.notes
        assert not other.notes


def a_cache(path: str = "m.gguf", device: Device = CPU, stamp: tuple[int, int] | None = (1, 2)) -> PackedCache:
    weight = Weight("w", (4, 4), "f32", (torch.arange(16.0).view(4, 4),))
    return PackedCache({"w": weight}, device, Path(path), stamp)


def test_what_is_mapped_may_be_written_to_and_the_file_stays(path: Path):
    start(path)
    before = [file.read_bytes() for file in files()]
    for planes in held(start(path)).values():
        for plane in planes:
            plane.zero_()
    assert [file.read_bytes() for file in files()] == before


def test_planes_with_gaps_are_not_kept_and_that_is_told():
    one = a_cache()
    one.keep(FORM, FakeKernel(), (torch.zeros(4, 4)[:, :2],), [])
    one.keep(FORM, FakeKernel(), (torch.zeros(4, 1).expand(4, 4),), [])
    one.background.finish()
    assert not files()
    assert one.notes == ["torch/form is packed at each start: its planes have gaps, and are not kept"]


def test_no_more_files_stay_open_than_before(path: Path):
    start(path)
    before = len(os.listdir("/proc/self/fd"))
    session = start(path)
    assert session.packed_cache.mapped_bytes
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # The model's.


# What it is known by


def test_a_moved_or_copied_file_hits_and_another_one_does_not(path: Path, tmp_path: Path):
    start(path)
    moved = path.rename(tmp_path / "moved.gguf")
    copied = tmp_path / "copied.gguf"
    copied.write_bytes(moved.read_bytes())
    for same in (moved, copied):
        assert packed_anew(start(same)) == 0
    other = start(write_model(path, seed=1))
    assert packed_anew(other) == len(files()) // 2 == MATRICES


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_file_that_was_written_to_is_another_even_where_no_sample_is_taken(path: Path, where: str):
    first = start(path)
    weights = kernelmux.load(path).source.file.weights
    name, before = "blk.0.ffn_up.weight", path.read_bytes()
    at = before.index(as_bytes(weights[name].planes)[0]) + (2 if where == "start" else weights[name].nbytes - 1)
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    second = start(path)
    assert len(files()) == 16
    assert packed_anew(second) == 1
    assert as_bytes(held(first)[(name,), "torch/f32"]) != as_bytes(held(second)[(name,), "torch/f32"])


def test_files_of_one_time_and_size_are_told_apart(path: Path, tmp_path: Path):
    """As of an archive whose files have all the same time."""
    other = write_model(tmp_path / "other.gguf", seed=1)
    for each in (path, other):
        os.utime(each, (10**9, 10**9))
    first, second = start(path), start(other)
    assert first.packed_cache._contents._key != second.packed_cache._contents._key
    assert packed_anew(second) == MATRICES


def test_an_unchanged_file_is_not_read_again(path: Path, monkeypatch):
    start(path)
    monkeypatch.setattr(contents, "checksum", None)
    assert start(path).packed_cache.mapped_bytes


def test_each_part_of_the_key_makes_another_file(monkeypatch):
    class Newer(FakeKernel):
        pass

    keys = [a_cache()._key(FORM, FakeKernel()), a_cache()._key((("w",), "torch/other"), FakeKernel())]
    keys += [
        a_cache()._key(FORM, Newer(version="2")),
        a_cache(device=Device("cpu", arch="avx2"))._key(FORM, FakeKernel()),
    ]
    keys.append(a_cache()._key((("w", "w"), "torch/form"), FakeKernel()))
    for name, value in (
        ("library_versions", lambda names: dict.fromkeys(names, "0")),
        ("source_hash", lambda thing: "another core"),
        ("LAYOUT", LAYOUT + 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(packed_cache, name, value)
            keys.append(a_cache()._key(FORM, FakeKernel()))
    assert len(set(keys)) == len(keys)
    assert a_cache("moved.gguf", stamp=(3, 4))._key(FORM, FakeKernel()) == keys[0]


def test_another_version_of_a_kernel_and_another_plan_miss(path: Path, monkeypatch):
    start(path)
    assert packed_anew(start(path, use=(*USE, "mul_mat=torch:int4"))) > 10
    monkeypatch.setattr(F32, "version", "another")
    assert packed_anew(start(path)) == MATRICES


# What is damaged, and what is foreign


def rewritten(data: bytes, **header) -> bytes:
    """The same file with another header, whose hash fits."""
    at = data.index(b"\n") + 1
    length = int.from_bytes(data[at + 32 : at + 40], "little")
    text = json.dumps({**json.loads(data[at + 40 : at + 40 + length]), **header}).encode()
    whole = data[:at] + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text
    return whole + data[len(whole) :]


ORIGIN = f"{MAGIC.decode()}{LAYOUT}\n".encode()
DAMAGE = {
    "truncated": (lambda data: data[:-1], "bytes of"),
    "cut in the header": (lambda data: data[: len(ORIGIN) + 10], "it is truncated"),
    "cut in the header's text": (lambda data: data[: len(ORIGIN) + 60], "its header is damaged"),
    "empty": (lambda data: b"", "it is no file of packed weights"),
    "longer": (lambda data: data + b"\0", "bytes of"),
    "a bit of a plane": (lambda data: data[:-5] + bytes([data[-5] ^ 16]) + data[-4:], "plane 0 is damaged"),
    "a plane of zeros": (lambda data: data[:4096] + bytes(len(data) - 4096), "plane 0 is damaged"),
    "another shape": (lambda data: re.sub(rb'("float32", \[)\d', rb"\g<1>1", data, count=1), "its header is damaged"),
    "another layout": (lambda data: data.replace(ORIGIN, MAGIC + b"9\n"), "it is of another layout"),
    "another form": (lambda data: rewritten(data, key="0" * 32), "it holds another form"),
    "foreign": (lambda data: b"mine, and not to be read " * 1000, "it is no file of packed weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_packed_anew_told_and_replaced(path: Path, damage: str):
    first = start(path)
    file, (change, why) = files()[7], DAMAGE[damage]
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    assert file.read_bytes() != whole
    second = start(path)
    (line,) = second.packed_cache.notes
    assert str(file) in line
    assert why in line
    assert "is packed anew" in line
    assert packed_anew(second) == 1
    assert logits(first).equal(logits(second))
    assert file.read_bytes() == whole
    assert packed_anew(start(path)) == 0


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path_factory, place, bit):
    """But in the gap between header and planes, which nobody reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELMUX_CACHE", str(tmp_path_factory.mktemp("cache")))
        one, kernel = a_cache(), FakeKernel()
        planes = torch.arange(100, dtype=torch.int32), torch.arange(7, dtype=torch.uint8)
        one.keep(FORM, kernel, planes, [])
        one.start()
        one.background.finish()
        (file,) = files()
        data = bytearray(file.read_bytes())
        data[int(place * len(data))] ^= 1 << bit
        file.write_bytes(data)
        other = a_cache()
        found = other.find(FORM, kernel)
        there = found and other.checked(found, kernel)
        assert not there or as_bytes(there) == as_bytes(planes)
        assert len(other.notes) == (there is None)


def test_a_folder_in_a_files_place_is_told_once_and_costs_that_file_only(path: Path):
    start(path)
    file = files()[3]
    file.unlink()
    file.mkdir()
    second = start(path)
    assert all("Is a directory" in note for note in second.packed_cache.notes)
    assert packed_anew(second) == 1
    assert [each for each in files() if each.name.startswith("tmp")] == []


# Folders, disks and processes

CODE = """
import os, resource, sys, time, kernelmux
model = kernelmux.load({path!r})
def start(cache_packed=True):
    plan = model.plan(use=["*=torch:f32,torch:sdpa,torch:rows"], max_rows=8)
    session = model.session(plan, 20, cache_packed=cache_packed)
    for _ in session.prepare(()):
        pass
    return session
def tell(session):
    session.packed_cache.background.finish()
    print(session.packed_cache.mapped_bytes, session.packed_cache.notes)
"""


def process(path: Path, code: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    code = CODE.format(path=str(path)) + textwrap.dedent(code)
    env = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=cwd, env=env, stdout=-1, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    return out


def test_a_folder_that_cannot_be_written_is_one_line_and_what_is_in_it_is_used(path: Path):
    """Root may write anywhere, so that the process becomes nobody, who reaches the folder as its own only."""
    start(path)
    files()[0].unlink()
    kept = sum(file.stat().st_size - packed_file.ALIGNMENT for file in files())
    cache = Cache("packed").folder.parent
    for each in (cache, *cache.rglob("*")):
        each.chmod(0o555 if each.is_dir() else 0o444)
    code = """
        start(cache_packed=False)  # All is imported.
        if os.getuid() == 0:
            os.seteuid(65534)
        tell(start())
    """
    told = output(process(path, code, cwd=cache, KERNELMUX_CACHE="."))
    assert told == f"{kept} ['packed weights are not kept in packed: Permission denied']\n"
    assert len(files()) == MATRICES - 1


@pytest.mark.parametrize("place", ["/dev/null/cache", "x" * 300])
def test_a_folder_that_cannot_be_made_costs_time_and_a_line_each_way(path: Path, place: str, monkeypatch):
    monkeypatch.setenv("KERNELMUX_CACHE", place)
    notes = start(path).packed_cache.notes
    assert [note.split(" in ")[0].split(" from ")[0] for note in notes] == [
        "packed weights are not taken",
        "packed weights are not kept",
    ]


def test_a_full_disk_is_one_line_and_leaves_whole_files_alone(path: Path):
    """A limit on a file's size stands for the disk: some forms fit, most fail half way."""
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, resource.RLIM_INFINITY))
        tell(start())
    """
    out = output(process(path, code))
    assert out.count("not kept") == 1
    assert "File too large" in out
    assert not [file for file in files() if file.name.startswith("tmp")]
    assert start(path).packed_cache.notes == []


def test_the_process_waits_at_its_end_until_all_is_written(path: Path):
    assert output(process(path, "start()")) == ""
    assert len(files()) == MATRICES


@pytest.mark.slow
def test_two_processes_at_once_keep_one_file_a_form_and_see_no_broken_one(path: Path):
    code = """
        from kernelmux.contract.cache import Cache
        for turn in range(10):
            session = start()
            session.packed_cache.background.finish()
            assert session.packed_cache.notes == [], session.packed_cache.notes
            whole = [file for file in Cache("packed").folder.iterdir() if not file.name.startswith("tmp")]
            for file in whole[turn % 5 :: 5]:
                file.unlink(missing_ok=True)
            del session
        tell(start())
    """
    both = [process(path, code) for _ in range(2)]
    assert [output(each).endswith("[]\n") for each in both] == [True, True]
    last = start(path)
    assert len(files()) == MATRICES
    assert last.packed_cache.notes == []


def test_what_is_stopped_leaves_whole_files_only(path: Path, monkeypatch):
    model = kernelmux.load(path)
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    for _ in session.prepare(()):
        pass
    cache, begun = session.packed_cache, threading.Event()
    go_on, calls = cache.background.go_on, []

    def slow():
        calls.append(1)
        if len(calls) == 5:
            begun.set()
            time.sleep(0.3)
        go_on()

    monkeypatch.setattr(cache.background, "go_on", slow)
    cache.background._hurried.set()
    assert begun.wait(60)
    cache.background.stop()
    assert 0 < len(files()) < MATRICES
    assert not [file for file in files() if file.name.startswith("tmp")]
    assert start(path).packed_cache.notes == []
    assert len(files()) == MATRICES


def test_what_nobody_has_used_for_long_is_deleted_and_what_is_mapped_is_used(path: Path):
    start(path)
    folder, long_ago = Cache("packed").folder, time.time() - packed_cache.UNUSED - 60
    used, part = files(), folder / "tmpkilled"
    other = folder / ("0" * 32)
    for unused in (part, other):
        unused.write_bytes(b"left")
    for file in files():
        os.utime(file, (long_ago, long_ago))
    start(path)
    assert files() == used
    assert not part.exists()
    assert not other.exists()


def test_without_a_model_file_it_says_so_and_goes_on():
    model = kernelmux.run.model.load_random("tiny:Q4_0")
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    assert logits(session).isfinite().all()
    session.packed_cache.background.finish()
    (line,) = session.packed_cache.notes
    assert "random:tiny:Q4_0 is no file" in line
    assert not files()


def test_what_a_step_packs_is_kept_too(path: Path):
    """Where nobody prepared the session."""
    model = kernelmux.load(path)
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    before = logits(session)
    session.packed_cache.background.finish()
    assert len(files()) == MATRICES
    model = kernelmux.load(path)
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    sequence = session.open()
    assert session.feed(sequence, [1, 2, 3]).equal(before)
    assert session.packed_cache.mapped_bytes
    shutil.rmtree(Cache("packed").folder)
    session.close(sequence)
    assert session.feed(session.open(), [1, 2, 3]).equal(before)


def test_what_was_packed_before_the_file_changed_is_kept_as_what_it_held(path: Path):
    model = kernelmux.load(path)
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    for _ in session.prepare(()):
        pass
    before, copied = logits(session), Path(shutil.copy2(path, path.with_name("copied.gguf")))
    other = write_model(path.with_name("other.gguf"), seed=1).read_bytes()
    with path.open("r+b") as file:
        file.write(other)
    session.packed_cache.background.finish()
    assert logits(start(copied)).equal(before)
    assert not logits(start(path)).equal(before)


def test_a_file_that_changes_before_it_is_packed_is_one_error(path: Path):
    model = kernelmux.load(path)
    session = model.session(model.plan(use=USE, max_rows=8), 20, cache_packed=True)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match="was written to since it was opened; load it again"):
        logits(session)
    session.packed_cache.background.finish()
    assert files() == []

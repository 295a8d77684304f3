"""What is kept on disk comes back whole or not at all, whatever becomes of the folder, the files, and two at a time."""

import importlib
import os
import pwd
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import TIMEOUT
from kernelmux.contract import cache as module
from kernelmux.contract.cache import Cache, files_hash, library_versions, read_table, source_hash, update_table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The test's own cache."""
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code, cwd=None, **environment):
    """A process that runs code; its output can be read."""
    env = {**os.environ, **environment}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process):
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert not err
    return out


# Entries


@given(key=st.text(), other=st.text(), data=st.binary())
def test_what_is_put_comes_back_under_its_key_and_kind_only(tmp_path_factory, key, other, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELMUX_CACHE", str(tmp_path_factory.mktemp("cache")))
        Cache("one").put(key, data)
        assert Cache("one").get(key) == data
        assert Cache("two").get(key) is None
        assert other == key or Cache("one").get(other) is None
        Cache("one").put(key, data + b"x")
        assert Cache("one").get(key) == data + b"x"


def test_asking_creates_nothing(folder):
    assert Cache("cupy").get("key") is None
    assert read_table("measured", "key") == {}
    assert not folder.exists()


def test_the_variable_goes_before_xdg_and_that_before_home(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Cache("kind").folder == folder / "kind"
    monkeypatch.setenv("KERNELMUX_CACHE", "")
    assert Cache("kind").folder == tmp_path / "xdg/kernelmux/kind"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache("kind").folder == tmp_path / "home/.cache/kernelmux/kind"


@pytest.fixture
def entry(folder):
    """The one file of a cache that holds an entry."""
    Cache("kind").put("key", b"some data\n")
    (file,) = (folder / "kind").iterdir()
    return file


def test_any_byte_damaged_and_any_truncation_is_no_entry_and_the_next_put_mends_it(entry):
    whole = entry.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 128)]
    damaged += [whole + b"\0", whole + whole, b"data without a head"]
    for content in damaged:
        entry.write_bytes(content)
        assert Cache("kind").get("key") is None, content
        Cache("kind").put("key", b"anew")
        assert Cache("kind").get("key") == b"anew"


def test_a_damaged_table_is_an_empty_one_and_is_written_anew(folder):
    update_table("kind", "key", {"a": 1})
    (file,) = (path for path in (folder / "kind").iterdir() if path.name != "lock")
    file.write_bytes(file.read_bytes()[:-1])
    assert read_table("kind", "key") == {}
    update_table("kind", "key", {"b": 2})
    assert read_table("kind", "key") == {"b": 2}


def test_a_reader_sees_no_entry_half_written(entry, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(Cache("kind").get("key")), replace(*paths)))
    Cache("kind").put("key", b"later")
    assert seen == [b"some data\n"]
    assert list(entry.parent.iterdir()) == [entry]


# Folders that cannot be used


def use():
    """Everything that touches the disk; what comes back."""
    Cache("kind").put("key", b"data")
    update_table("kind", "table", {"a": 1})
    return Cache("kind").get("key"), read_table("kind", "table")


def test_a_file_in_the_folders_place_costs_the_time_only(folder):
    folder.write_text("mine")
    assert use() == (None, {})
    assert folder.read_text() == "mine"


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache", "x" * 300])
def test_a_folder_that_cannot_be_made_costs_the_time_only(place, monkeypatch):
    monkeypatch.setenv("KERNELMUX_CACHE", place)
    assert use() == (None, {})


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder):
    """Root may write anywhere, so that the process becomes nobody, who reaches the folder as its own only."""
    update_table("kind", "table", {"old": 0})
    for path in (folder, folder / "kind", *(folder / "kind").iterdir()):
        path.chmod(0o555)
    code = """
        import os
        from kernelmux.contract.cache import *
        if os.getuid() == 0:
            os.seteuid(65534)
        Cache("kind").put("key", b"data")
        update_table("kind", "table", {"a": 1})
        print(Cache("kind").get("key"), read_table("kind", "table"), os.access("kind", os.W_OK, effective_ids=True))
    """
    assert output(start(code, cwd=folder, KERNELMUX_CACHE=".")) == "None {'old': 0} False\n"


def test_a_folder_in_a_files_place_costs_the_time_only(entry):
    entry.unlink()
    entry.mkdir()
    assert use() == (None, {"a": 1})
    assert sorted(entry.parent.glob("tmp*")) == []


def test_without_a_home_there_is_no_cache(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("KERNELMUX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert use() == (None, {})


def test_a_full_disk_keeps_what_was_there_and_leaves_no_litter(entry):
    """A limit on a file's size stands for the disk: the write fails half way."""
    code = f"""
        import resource
        from kernelmux.contract.cache import Cache, update_table
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
        Cache("kind").put("key", bytes(10**6))
        update_table("kind", "table", {{"a": "x" * 10**6}})
    """
    output(start(code))
    assert Cache("kind").get("key") == b"some data\n"
    assert read_table("kind", "table") == {}
    assert {path.name for path in entry.parent.iterdir()} == {entry.name, "lock"}


# Two processes


def both(code, tmp_path):
    """Two processes run code at the same time, each knowing `me`; they begin when both are there."""
    wait = f"""
        import os, pathlib, sys, time
        here, me = pathlib.Path({str(tmp_path)!r}), int(os.environ["ME"])
        (here / f"ready{{me}}").touch()
        while not (here / f"ready{{1 - me}}").exists():
            time.sleep(0.001)
    """
    code = "from kernelmux.contract.cache import *\n" + textwrap.dedent(wait) + textwrap.dedent(code)
    processes = [start(code, ME=str(me)) for me in (0, 1)]
    return [output(process) for process in processes]


def test_two_processes_writing_one_entry_never_show_a_broken_one(folder, tmp_path):
    code = """
        cache = Cache("kind")
        for turn in range(200):
            cache.put("key", bytes([turn]) * (100_000 + me))
            seen = cache.get("key")
            assert seen is not None and seen == seen[:1] * len(seen) and len(seen) in (100_000, 100_001)
    """
    both(code, tmp_path)
    assert Cache("kind").get("key")[:1] == bytes([199])
    assert len(list((folder / "kind").iterdir())) == 1


def test_two_processes_adding_to_one_table_lose_nothing(tmp_path):
    code = """
        for turn in range(200):
            update_table("kind", "key", {f"{me} {turn}": turn, "last": me})
    """
    both(code, tmp_path)
    table = read_table("kind", "key")
    assert table.pop("last") in (0, 1)
    assert table == {f"{me} {turn}": turn for me in (0, 1) for turn in range(200)}


def test_a_process_that_is_killed_leaves_the_lock_free():
    code = """
        import os
        from kernelmux.contract.cache import *
        from kernelmux.contract.cache import _alone
        with _alone(Cache("kind").folder):
            print("held", flush=True)
            os.read(0, 1)
    """
    process = start(code)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    update_table("kind", "key", {"a": 1})
    assert read_table("kind", "key") == {"a": 1}


@pytest.mark.parametrize("system", ["no locks at all", "none in this folder"])
def test_without_locks_a_table_is_still_written(system, monkeypatch):
    def refuses(file, how):
        raise OSError("no locks available")

    if system == "no locks at all":
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(module.fcntl, "flock", refuses)
    update_table("kind", "key", {"a": 1})
    update_table("kind", "key", {"b": 2})
    assert read_table("kind", "key") == {"a": 1, "b": 2}


# Tables and keys


@given(tables=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4))
def test_a_table_holds_the_last_value_of_every_name_in_it_and_in_the_tables_within_it(tmp_path_factory, tables):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELMUX_CACHE", str(tmp_path_factory.mktemp("cache")))
        expected = {}
        for table in tables:
            update_table("kind", "key", table)
            expected = added(expected, table)
            assert read_table("kind", "key") == expected
        assert read_table("kind", "other") == {}


def added(to, table):
    if not (isinstance(to, dict) and isinstance(table, dict)):
        return table
    return to | {name: added(to.get(name), value) for name, value in table.items()}


@given(first=st.lists(JSON, max_size=4), second=st.lists(JSON, max_size=4))
def test_keys_are_equal_only_for_equal_parts(first, second):
    assert Cache.key(*first) == Cache.key(*first)
    # repr, since 1 == True == 1.0; names sorted, since their order says nothing.
    assert (Cache.key(*first) == Cache.key(*second)) == (repr(canonical(first)) == repr(canonical(second)))


def canonical(value):
    if isinstance(value, dict):
        return {name: canonical(value[name]) for name in sorted(value)}
    return [canonical(part) for part in value] if isinstance(value, list) else value


def test_parts_are_told_apart_and_a_set_is_refused():
    assert Cache.key("ab", "c") != Cache.key("a", "bc")
    assert Cache.key(("a", 1)) == Cache.key(["a", 1])
    with pytest.raises(TypeError, match="set"):
        Cache.key({"no", "order"})


def test_keys_and_hashes_are_the_same_in_any_process(folder):
    code = """
        import kernelmux
        from kernelmux.contract.cache import Cache, source_hash
        parts = {"b": [1, 2.5, None], "a": "ü", **{name: 0 for name in {"x", "y", "z"}}}
        print(Cache.key("kind", parts), source_hash(kernelmux), Cache("kind").folder)
    """
    here = f"{Cache.key('kind', {'a': 'ü', 'b': [1, 2.5, None], 'x': 0, 'y': 0, 'z': 0})} {source_hash(module)} "
    processes = [start(code, PYTHONHASHSEED=seed) for seed in ("0", "1", "2026")]
    assert [output(process) for process in processes] == [f"{here}{folder / 'kind'}\n"] * 3


def test_import_touches_no_disk_and_no_environment(folder):
    code = """
        import os, sys
        before = dict(os.environ)
        import kernelmux.contract.cache
        assert dict(os.environ) == before
        print(sorted({"torch", "numpy"} & sys.modules.keys()))
    """
    assert output(start(code)) == "[]\n"
    assert not folder.exists()


# Hashes of source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of files and imports it; a name is used once."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, **files):
        for file, text in {"__init__.py": "", **files}.items():
            path = tmp_path / name.replace(".", "/") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return make


SOURCE = {"__init__.py": "class Kernel: ...", "cuda/gemv.cu": "gemv", "cuda/block.cuh": "block", "host.cpp": "host"}


def test_a_package_has_one_hash_for_all_that_is_in_it(package):
    pack = package("one_pack", **SOURCE, **{"ops/__init__.py": "def f(): ...", "ops/norm.py": "class Norm: ..."})
    norm = importlib.import_module("one_pack.ops.norm")
    things = [pack, pack.Kernel, pack.Kernel(), norm, norm.Norm, norm.Norm(), importlib.import_module("one_pack.ops").f]
    (only,) = {source_hash(thing) for thing in things}
    assert len(only) == 16
    int(only, 16)


def test_a_hash_depends_on_every_source_and_its_name_and_on_nothing_else(package):
    first = source_hash(package("pack_0", **SOURCE))
    others = {"data.json": "{}", "notes.md": "text", "__pycache__/x.cpython-311.pyc": "code"}
    assert source_hash(package("pack_1", **SOURCE, **others)) == first
    changed = [{**SOURCE, name: text + " "} for name, text in SOURCE.items()]
    changed += [{**SOURCE, "cuda/more.h": ""}, {**SOURCE, "cuda/gemv.cu": "", "cuda/gemw.cu": "gemv"}]
    hashes = {source_hash(package(f"changed_{i}", **files)) for i, files in enumerate(changed)}
    assert len(hashes | {first}) == len(changed) + 1


def test_a_hash_is_made_once_a_process(package):
    pack = package("cached_pack", **SOURCE)
    first = source_hash(pack)
    (Path(pack.__file__).parent / "host.cpp").write_text("changed")
    assert source_hash(pack.Kernel) == first


def test_a_namespace_is_no_package(package, tmp_path):
    one = package("shared_space.one", **SOURCE)
    first = source_hash(one)
    two = package("shared_space.two", **{"__init__.py": "class Kernel: ...", "x.cu": "other"})
    assert source_hash(one.Kernel) == first != source_hash(two.Kernel)


def test_a_module_by_itself_is_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lone_backend.py").write_text("class Kernel: ...")
    lone = importlib.import_module("lone_backend")
    first = source_hash(lone)
    (tmp_path / "neighbour.py").write_text("")
    assert source_hash(lone.Kernel) == source_hash(lone.Kernel()) == first
    assert first == files_hash([tmp_path / "lone_backend.py"], tmp_path)


def test_a_notebooks_class_is_known_by_its_text_or_its_name():
    """IPython keeps the text of a cell where linecache finds it; a plain console keeps none."""
    code = """
        import linecache, types, sys
        from kernelmux.contract.cache import source_hash
        def cell(text, number, kept=True):
            name = f"<cell {number}>"
            if kept:
                linecache.cache[name] = (len(text), None, text.splitlines(True), name)
            exec(compile(text, name, "exec"), globals())
            return source_hash(Kernel)
        one = "class Kernel:\\n    def bind(self):\\n        return 1\\n"
        first = cell(one, 1)
        assert first == source_hash(Kernel()) == cell(one, 2)
        assert cell(one.replace("1", "2"), 3) != first
        assert cell(one, 4, kept=False) != first
        assert cell(one.replace("Kernel", "Other") + "Kernel = Other", 5, kept=False) != cell(one, 6, kept=False)
        assert len(first) == 16
    """
    output(start(code))


def test_versions_of_what_is_installed():
    assert library_versions(["torch", "no-such-distribution"]) == {"torch": importlib.metadata.version("torch")}

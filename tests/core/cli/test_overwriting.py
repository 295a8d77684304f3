"""What a command writes takes the place of nothing that it reads, and of no model; a file is whole or as it was."""

import pytest

from command import assert_one_line_error, call_command
from fake_backend import FakeKernel, compute
from kernelmux.conformance.testing import backend
from kernelmux.contract import registry
from kernelmux.graph.ops import CORE_OPS, OPS, Fused

BENCH = ("--prompt", 4, "--context", 4, "--decode", 1, "--max-rows", 4)


@pytest.fixture
def files(tmp_path, tiny):
    """A model, another one, a link to the first, and a policy."""
    for name in ("model", "other"):
        (tmp_path / f"{name}.gguf").write_bytes(tiny.read_bytes())
    (tmp_path / "link").symlink_to(tmp_path / "model.gguf")
    (tmp_path / "p.toml").write_text("fuse = false\n")
    return tmp_path


WRITING = {
    "plan --lock": ("plan", "{model}", "--policy", "{policy}", "--lock"),
    "run --capture-cases": ("run", "{model}", "-p", "hello", "--policy", "{policy}", "--capture-cases"),
    "bench model --save": ("bench", "model", "{model}", "--policy", "{policy}", *BENCH, "--save"),
    "tune --output": ("tune", "{model}", "--budget", "1s", "-o"),
    "bench ops --save": ("bench", "ops", "--shape", "32x64:f32", "--save"),
    "check --save": ("check", "--op", "silu", "--smoke", "--save"),
    "check --html": ("check", "--op", "silu", "--smoke", "--html"),
}


TARGETS = {
    f"{name} {target}": (command, target)
    for name, command in WRITING.items()
    for target in ("model.gguf", "link", "other.gguf", *(["p.toml"] if "{policy}" in command else []))
}


@pytest.mark.parametrize(("command", "target"), TARGETS.values(), ids=TARGETS)
def test_no_output_takes_the_place_of_a_model_or_of_what_is_read(files, command, target):
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    named = {"{model}": files / "model.gguf", "{policy}": files / "p.toml"}
    result = call_command(*(named.get(part, part) for part in command), files / target)
    assert (result.code, result.out) == (2, "")
    assert "name another file" in result.err
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


WRITING_MORE = {"quantize -o": ("quantize", "{model}", "--to", "Q8_0", "-o"), "report -o": ("report", ".", "-o")}


@pytest.mark.parametrize("command", [*WRITING.values(), *WRITING_MORE.values()], ids=[*WRITING, *WRITING_MORE])
def test_no_file_is_called_as_stdout_is_elsewhere(files, command, monkeypatch):
    monkeypatch.chdir(files)
    before = {*files.iterdir()}
    named = {"{model}": "model.gguf", "{policy}": "p.toml"}
    result = call_command(*(named.get(part, part) for part in command), "-")
    assert_one_line_error(result, " -: it is written to a file, not to stdout: name one")
    assert {*files.iterdir()} == before


@pytest.mark.parametrize("command", [*WRITING.values(), *WRITING_MORE.values()], ids=[*WRITING, *WRITING_MORE])
def test_where_there_is_no_folder_for_a_file_nothing_is_done(files, command, monkeypatch):
    """It was told when the work was done, and the result was lost."""
    monkeypatch.chdir(files)
    named = {"{model}": "model.gguf", "{policy}": "p.toml"}
    result = call_command(*(named.get(part, part) for part in command), "none/x.out")
    assert_one_line_error(result, "there is no folder none to write x.out to")


def test_one_file_is_not_asked_for_twice(tmp_path):
    result = call_command("check", "--op", "silu", "--smoke", "--save", tmp_path / "out", "--html", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert "is the JSON asked for: name another file" in result.err
    assert not (tmp_path / "out").exists()


def test_cases_of_before_are_there_until_those_of_a_run_are_whole(files):
    """Also of a run whose kernel raises; nothing else is left in the folder."""

    def look(node, tensors):
        assert path.read_text() == "old"
        raise OverflowError("out of tiles")

    path = files / "cases.json"
    path.write_text("old")
    plain = {op: FakeKernel(work=compute) for op in CORE_OPS if not isinstance(OPS[op], Fused)}
    with registry.isolated(a=backend(**{**plain, "silu": FakeKernel(work=look)})):
        result = call_command("run", files / "model.gguf", "-p", "hello", "--capture-cases", path)
    assert result.code == 2
    assert "OverflowError: out of tiles" in result.err
    assert path.read_text().startswith('{"schema"')
    assert sorted(each.name for each in files.iterdir()) == ["cases.json", "link", "model.gguf", "other.gguf", "p.toml"]

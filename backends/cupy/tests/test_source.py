"""Refusals, and the cache of compiled code."""

import shutil
from pathlib import Path

import pytest

from kernelmux.contract.device import Device
from kernelmux_cupy import source

H100 = Device("cuda", 0, "H100", (9, 0))


@pytest.fixture(autouse=True)
def _forgetful():
    source._missing.cache_clear()
    yield
    source._missing.cache_clear()


def test_the_cpu_is_declined():
    assert source.refusal(Device("cpu")).kind == "device"


def test_a_card_without_dp4a_is_declined():
    refused = source.refusal(Device("cuda", 0, "P100", (6, 0)))
    assert (refused.kind, refused.reason) == ("capability", "DP4A needs compute capability 6.1, P100 has 6.0")


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    refused = source.refusal(H100)
    assert refused.kind == "missing dependency"
    assert "kernelmux-cupy[cuda12]" in refused.reason


def test_without_nvrtc_it_says_so(monkeypatch):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")

    def fails():
        raise RuntimeError("libnvrtc.so not found")

    monkeypatch.setattr(nvrtc, "getSupportedArchs", fails)
    refused = source.refusal(H100)
    assert refused.kind == "missing dependency"
    assert "libnvrtc.so not found" in refused.reason


@pytest.fixture
def compiler():
    """What compiles; where nothing does, the backend's own reason."""
    if refused := source.refusal(H100):
        pytest.skip(refused.reason)


DEFINES = (("FROM", "f32"), ("TO", "bf16"))


@pytest.fixture
def compiled(compiler, monkeypatch, tmp_path):
    """The sources that are compiled, each time one is; the cache is the test's own, and so is the folder of sources."""
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "FOLDER", Path(shutil.copytree(source.FOLDER, tmp_path / "cuda")))
    files = []
    translate = source.translate
    monkeypatch.setattr(
        source, "translate", lambda file, *card, **named: files.append(file) or translate(file, *card, **named)
    )
    return files


def test_code_is_compiled_once_and_kept_on_disk(compiled, tmp_path):
    code = source._code("convert", (9, 0), DEFINES)
    assert source._code("convert", (9, 0), DEFINES) == code
    assert compiled == ["convert"]
    (kept,) = (path for path in tmp_path.joinpath("cache").rglob("*") if path.is_file())
    assert kept.parent.name == "cupy"
    assert code in kept.read_bytes()


def test_what_the_code_depends_on_is_compiled_for_and_nothing_else(compiled, monkeypatch):
    from cupy_backends.cuda.libs import nvrtc

    codes = [
        source._code("convert", (9, 0), DEFINES),
        source._code("convert", (8, 0), DEFINES),
        source._code("convert", (9, 0), (("FROM", "f32"), ("TO", "f16"))),
    ]
    assert len(set(codes)) == len(compiled) == 3
    (source.FOLDER / "copy.cu").write_text("// another file")
    assert source._code("convert", (9, 0), DEFINES) == codes[0]
    assert len(compiled) == 3
    for file in ("convert.cu", min(path.name for path in source.FOLDER.glob("*.cuh"))):
        with (source.FOLDER / file).open("a") as text:
            text.write("// changed\n")
        source._code("convert", (9, 0), DEFINES)
    assert len(compiled) == 5
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 0))
    source._code("convert", (9, 0), DEFINES)
    assert len(compiled) == 6


def test_damaged_code_is_compiled_anew(compiled, tmp_path):
    code = source._code("convert", (9, 0), DEFINES)
    (kept,) = (path for path in tmp_path.joinpath("cache").rglob("*") if path.is_file())
    kept.write_bytes(kept.read_bytes()[:-1])
    assert [source._code("convert", (9, 0), DEFINES) for _ in range(2)] == [code] * 2
    assert compiled == ["convert"] * 2


def test_a_folder_that_cannot_be_written_costs_the_time_only(compiled, tmp_path):
    (tmp_path / "cache").write_text("")
    assert source._code("convert", (9, 0), DEFINES)
    assert source._code("convert", (9, 0), DEFINES)
    assert compiled == ["convert"] * 2

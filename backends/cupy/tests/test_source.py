"""Refusals, and the cache of compiled code."""

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


@pytest.mark.usefixtures("compiler")
def test_code_is_compiled_once_and_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    defines = (("FROM", "f32"), ("TO", "bf16"))
    code = source._cached("convert", (9, 0), defines)
    monkeypatch.setattr(source, "translate", lambda *args, **named: pytest.fail("compiled again"))
    assert source._cached("convert", (9, 0), defines) == code
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".cubin"]


@pytest.mark.usefixtures("compiler")
def test_a_folder_that_cannot_be_written_costs_the_time_only(monkeypatch, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert source._cached("convert", (9, 0), (("FROM", "f32"), ("TO", "bf16")))

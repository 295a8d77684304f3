"""Devices by name: what is there, and one line for what is not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kernelmux.contract.device import Device, described_device, find_device, is_out_of_memory, out_of_memory
from kernelmux.errors import PlanError


def test_a_device_is_described_without_torch():
    code = (
        "import sys; from kernelmux.contract.device import *; print(described_device('cuda sm_90 NVIDIA H200'));"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [str(Device("cuda", 0, "NVIDIA H200", (9, 0))), "False"]


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ("cpu", Device("cpu")),
        ("cpu avx2", Device("cpu", arch="avx2", features=frozenset({"avx2"}))),
        ("cpu avx512", Device("cpu", arch="avx512", features=frozenset({"avx2", "avx512"}))),
        ("cpu avx512_bf16", Device("cpu", arch="avx512_bf16", features=frozenset({"avx2", "avx512", "bf16"}))),
        ("cpu amx", Device("cpu", arch="amx", features=frozenset({"avx2", "avx512", "bf16", "amx"}))),
        ("cuda sm_90 NVIDIA H200", Device("cuda", 0, "NVIDIA H200", (9, 0), processors=132, shared_memory=232448)),
        (
            "cuda sm_80 NVIDIA A100-SXM4-80GB, 108 processors",
            Device("cuda", 0, "NVIDIA A100-SXM4-80GB", (8, 0), processors=108),
        ),
        ("cuda sm_120 NVIDIA RTX, PRO", Device("cuda", 0, "NVIDIA RTX, PRO", (12, 0), shared_memory=101376)),
        ("rocm gfx942 AMD Instinct MI300X", Device("rocm", 0, "AMD Instinct MI300X", arch="gfx942", processors=304)),
        (
            "rocm gfx90a AMD Instinct MI250X, 110 processors",
            Device("rocm", 0, "AMD Instinct MI250X", arch="gfx90a", processors=110),
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_device_class_describes_the_device(words: str, device: Device):
    assert described_device(words) == device
    assert device.device_class == words


def test_of_cuda_alone_there_is_a_compute_capability():
    assert described_device("cuda sm_103 NVIDIA B300").capability == (10, 3)
    assert described_device("rocm gfx942 AMD Instinct MI300X").capability is None


@pytest.mark.parametrize(
    "words", ["cuda", "cuda NVIDIA H200", "cuda sm_x NVIDIA H200", "cpu avx9", "rocm sm_90 MI300X"]
)
def test_a_description_without_a_known_architecture_is_refused_with_an_example(words: str):
    kind = words.partition(" ")[0]
    with pytest.raises(
        PlanError, match=rf"describes no device: an architecture follows {kind}, and .* as in '{kind} \w+"
    ):
        described_device(words)


def test_a_kind_that_nobody_has_is_refused_with_those_that_are_known():
    with pytest.raises(PlanError, match=r"unknown device 'tpu v5 Trillium'; known: cpu, cuda, cuda:N, rocm, rocm:N"):
        described_device("tpu v5 Trillium")


@pytest.fixture
def rocm_torch(monkeypatch: pytest.MonkeyPatch):
    """torch as built for ROCm, with one card."""
    card = SimpleNamespace(
        name="AMD Instinct MI300X",
        gcnArchName="gfx942:sramecc+:xnack-",
        total_memory=192 * 2**30,
        multi_processor_count=304,
        major=9,
        minor=4,
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)


def test_a_rocm_build_of_torch_has_devices_of_kind_rocm_which_torch_calls_cuda(rocm_torch):
    found = find_device("rocm")
    assert (found.kind, found.torch, found.capability, found.arch) == ("rocm", "cuda:0", None, "gfx942")
    assert found.device_class == "rocm gfx942 AMD Instinct MI300X"
    assert (found.memory, found.processors) == (192 * 2**30, 304)


def test_a_rocm_build_of_torch_has_no_cuda_device_and_says_so(rocm_torch):
    with pytest.raises(PlanError, match="'cuda:0' was asked for, torch is built for rocm: ask for rocm"):
        find_device("cuda")


def test_a_cuda_build_of_torch_has_no_rocm_device_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PlanError, match="'rocm:0' was asked for, torch is built for cuda: ask for cuda"):
        find_device("rocm")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu0"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
    with pytest.raises(PlanError, match=r"unknown device .*; known: cpu, cuda, cuda:N"):
        find_device(name)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Torch not compiled with CUDA enabled", "Torch not compiled with CUDA enabled"),
        ("Found no NVIDIA driver on your system.\nPlease check.", "Found no NVIDIA driver on your system"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "is too old (found version 11040)"),
    ],
)
def test_without_a_gpu_the_reason_is_said_in_one_line(monkeypatch, said, shown):
    def init():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(PlanError) as caught:
        find_device("cuda")
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "cpu works" in str(caught.value)


def test_torchs_message_about_full_memory_becomes_short():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.50 GiB is "
        "free. Including non-PyTorch memory, this process has 77.66 GiB memory in use."
    )
    assert is_out_of_memory(error)
    assert out_of_memory("cuda:0", error) == "cuda:0 is out of memory (20.00 GiB were asked for, 1.50 GiB are free)"


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_cuda_itself_and_cublas_say_that_memory_is_full_in_their_own_words(text, full):
    assert is_out_of_memory(RuntimeError(text)) is full


@pytest.mark.parametrize(
    ("words", "gib", "counts_as"),
    [
        ("cuda sm_90 NVIDIA H200", 140, ""),
        ("cuda sm_89 NVIDIA L4", 22, ""),
        ("cuda sm_80 NVIDIA A100-SXM4-80GB", 80e9 / 2**30, ""),
        ("cuda sm_80 NVIDIA A100", 39, ""),
        ("cuda sm_90 NVIDIA H20O", 79, "H100"),
        ("rocm gfx942 AMD Instinct MI300X", 191, "A100"),
        ("cpu avx2", 0, ""),
    ],
)
def test_a_described_card_has_the_memory_of_its_kind_and_says_as_which_it_counts(words, gib, counts_as):
    device = described_device(words)
    assert device.memory == gib * 2**30
    assert device.platform.counts_as(device) == counts_as

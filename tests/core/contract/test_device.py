"""Devices by name: what is there, and one line for what is not."""

import pytest
import torch

from kernelmux.contract.device import Device, find_device, is_out_of_memory, out_of_memory
from kernelmux.errors import PlanError


def test_the_cpu_is_always_there():
    assert find_device("cpu") == Device("cpu")


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

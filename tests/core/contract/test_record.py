"""What came of smoke cases is on record for the kernel, libraries and device that it is about, and for no others."""

import datetime

import pytest

from fake_backend import CPU, FakeKernel
from kernelmux.conformance.testing import backend
from kernelmux.contract import record as module
from kernelmux.contract.cache import Cache
from kernelmux.contract.device import described_device
from kernelmux.contract.record import KIND, Record
from kernelmux.contract.registry import Registry

CARD = described_device("cuda sm_90 NVIDIA H200")
KERNEL = FakeKernel()


def registry_of(version="1", libraries=(), kernel=KERNEL):
    registry = Registry()
    registry.register(backend(silu=kernel), "a", version, libraries)
    return registry


def failure(registry=None, device=CPU, kernel=KERNEL, op="silu"):
    return Record(registry or registry_of(), device).failure(op, "a:f32", kernel)


def note(case="", device=CPU):
    Record(registry_of(), device).note("silu", "a:f32", case)


def test_a_failure_says_case_and_day_and_what_runs_it_again():
    note("silu-m5")
    again = "kernelmux check --kernel a:f32 --op silu --smoke"
    day = datetime.date.today().isoformat()
    assert failure() == f"its smoke cases failed here on {day} (silu-m5): {again} runs them again"
    note("silu-m5", CARD)
    assert f"{again} --device cuda runs" in failure(device=CARD)


def test_nothing_is_known_of_what_never_ran_and_a_pass_clears_a_failure():
    record = Record(registry_of(), CPU)
    assert (record.passed("silu", "a:f32"), record.failure("silu", "a:f32", KERNEL)) == (False, "")
    record.note("silu", "a:f32", "silu-m5")
    assert (record.passed("silu", "a:f32"), bool(record.failure("silu", "a:f32", KERNEL))) == (False, True)
    record.note("silu", "a:f32")
    assert (record.passed("silu", "a:f32"), record.failure("silu", "a:f32", KERNEL)) == (True, "")
    assert Record(registry_of(), CPU).passed("silu", "a:f32")


def test_another_op_device_version_library_or_source_has_a_record_of_its_own(monkeypatch):
    note("silu-m5")
    assert failure()
    assert not failure(op="mul")
    assert not failure(device=CARD)
    assert not failure(registry_of(version="2"))
    assert not failure(registry_of(libraries=["pytest"]))
    monkeypatch.setattr(module, "source_hash", lambda kernel: "changed")
    assert not failure()


@pytest.mark.parametrize("damage", [b"", b"kernelmux cache 1\n"], ids=["empty", "cut off"])
def test_a_damaged_file_says_nothing_and_is_written_anew(damage):
    note("silu-m5")
    (file,) = (path for path in Cache(KIND).folder.iterdir() if path.name != "lock")
    file.write_bytes(damage)
    assert failure() == ""
    note("silu-m5")
    assert failure()


def test_asking_writes_nothing():
    assert failure() == ""
    assert not Cache(KIND).folder.exists()


def test_a_folder_that_cannot_be_used_costs_the_record_alone(monkeypatch):
    monkeypatch.setenv("KERNELMUX_CACHE", "/dev/null/none")
    note("silu-m5")
    assert failure() == ""


def test_of_a_kernel_that_takes_no_case_there_is_nothing_to_note():
    record = Record(registry_of(), CPU)
    record.note("mul", "a:f32", "mul-m5")
    record.note("silu", "a:other", "silu-m5")
    assert not Cache(KIND).folder.exists()

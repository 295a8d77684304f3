"""Ceilings: measured on this machine, and the one that a kernel is held against."""

from __future__ import annotations

import pytest

from fake_backend import CPU
from kernelmux.measure.ceilings import Ceilings, gemm_ceiling, measure_ceilings


def test_a_cpu_copies_reads_and_multiplies():
    found = measure_ceilings(CPU, nbytes=2**20, size=64)
    assert found.copy > 1e6
    assert found.read > 1e6
    assert set(found.gemm) == {"bf16", "f32"}
    assert min(found.gemm.values()) > 1e6


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("bf16", "bf16"), 2.0),
        (("bf16", "f32"), 1.0),
        (("f16", "f16"), 2.0),
        (("fp8_row", "bf16"), 3.0),
        (("fp8_block", "f32"), 3.0),
    ],
)
def test_a_kernel_is_held_against_the_gemm_of_its_operands(formats: tuple[str, str], expected: float):
    assert gemm_ceiling(Ceilings(1.0, 1.0, {"f32": 1.0, "bf16": 2.0, "fp8": 3.0}), formats) == expected


def test_no_ceiling_where_none_was_measured():
    assert gemm_ceiling(Ceilings(1.0, 1.0, {"bf16": 2.0}), ("fp8_row", "bf16")) is None

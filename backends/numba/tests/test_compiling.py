"""What is compiled: for other processors than this one too; and kernels held against the suite on each class."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from kernelmux_numba.attention import Shape
from kernelmux_numba.code import (
    attention,
    compiling,
    convert,
    copy,
    elementwise,
    embed,
    norm,
    packing,
    products,
    rope,
    threads,
)
from kernelmux_numba.loaded import address_of
from kernelmux_numba.packing import packing_of
from kernelmux_numba.target import Target

ARM = Target("cortex-a76", "", 4, "pairs", x86=False, triple="aarch64-unknown-linux-gnu")
MACHINE = slice(18, 20)
"""Where an ELF file says which processor it is for, and what it says of arm64 (the ELF specification's e_machine)."""
AARCH64 = (183).to_bytes(2, "little")
MADE = {
    "integers": lambda: convert.sixteen_bits(ARM),
    "products of Q4_1": lambda: products.quantised(ARM, packing_of("Q4_1", ARM)),
    "products of Q6_K": lambda: products.quantised(ARM, packing_of("Q6_K", ARM)),
    "products of bf16": lambda: products.dense(ARM, "bf16"),
    "packing": lambda: packing.pack(ARM, "Q5_K"),
    "attention": lambda: attention.attend(ARM, Shape("f16", 4, 2, 64, 0.125, 0.0, "q8_32")),
    "norm": lambda: norm.norm(ARM, True, "f32"),
    "swiglu": lambda: elementwise.elementwise(ARM, "swiglu", ("f32", "f32"), "q8_32"),
    "rope": lambda: rope.rope(ARM, "halves"),
    "copy": lambda: copy.copy(ARM, "fp8_row"),
    "embed": lambda: embed.embed(ARM, "Q4_K", "f32"),
    "helper": lambda: threads.helper(ARM),
    "runner": lambda: threads.runner(ARM),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_arm64_gets_code_of_its_own_and_no_instruction_of_x86(make):
    module = compiling.optimised(make(), ARM)
    assert "llvm.x86" not in str(module)
    assert ARM.machine().emit_object(module)[MACHINE] == AARCH64


def test_code_is_kept_by_all_of_what_it_is_compiled_for(tmp_path, monkeypatch):
    """A processor that is limited to an older class has the same name and features, and fewer lanes."""
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path))
    # No other test has this one's features: it is compiled here.
    eight = Target("x86-64-v3", "+avx2,+fma", 8, "pairs")
    targets = [eight, replace(eight, lanes=4), replace(eight, dot="fours")]
    for target in targets:
        address_of("convert:sixteen_bits", target)
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]) == len(targets)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_kernels_are_right_on_processors_that_have_less(limit):
    """AVX2's vectors and pairs of bytes; and those of SSE4.2, where everything is plain."""
    limits = {"ATEN_CPU_CAPABILITY": limit, "ONEDNN_MAX_CPU_ISA": "AVX2" if limit == "avx2" else "SSE41"}
    command = [sys.executable, "-m", "kernelmux", "check", "--backend", "numba", "--smoke"]
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " 0 fail" in done.stdout

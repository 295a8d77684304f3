"""Triton kernels compiled for an H100 by machines without one: what they need of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernelmux.formats import as_planes, lookup, torch_dtype

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Needs:
    """What a program takes of a multiprocessor; `spilled` is bytes a thread, None where no ptxas is there to say."""

    shared: int
    spilled: int | None
    ptx: str


def planes_of(value):
    """A value's planes, without memory, as a kernel is given them."""
    planes = lookup(value.format).planes
    return as_planes(
        tuple(torch.empty(p.shape(value.extents), dtype=torch_dtype(p.dtype), device="meta") for p in planes)
    )


def compile_for_h100(kernel, args: Sequence[object], warps: int, tmp_path) -> Needs:
    """Compiles a kernel as `launch.bind` would for these arguments, of which tensors may be without memory."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return Needs(compiled.metadata.shared, _spilled(ptx, tmp_path), ptx)


def _spilled(ptx, tmp_path):
    path = tmp_path / "kernel.ptx"
    path.write_text(ptx)
    try:
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(path), "-o", str(tmp_path / "cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    except (AttributeError, OSError):
        return None
    found = re.search(r"(\d+) bytes spill stores", report)
    return int(found[1]) if found else None

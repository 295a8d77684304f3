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

from kernelmux.graph.formats import as_planes, lookup, torch_dtype

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Needs:
    """What a program takes of a multiprocessor; `spilled` is bytes a thread."""

    shared: int
    spilled: int
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
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    # Triton is about to change what it does with products and sums unless told, and warns of that.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Needs(compiled.metadata.shared, _spilled(compiled.asm["cubin"], tmp_path), compiled.asm["ptx"])


def _spilled(cubin, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])

"""Triton kernels compiled for an H100 as they would be bound, without one: they fit, and spill nothing.

To add some: a line of NODES for each node whose binding is worth a look.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernelmux.conformance.testing import one_node
from kernelmux.contract import Tensors
from kernelmux.graph.formats import Value, as_planes, lookup, torch_dtype
from kernelmux.graph.ops import Rotation

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from kernelmux_triton import copy, elementwise, embed, norm, rope, rope_copy  # noqa: E402
from offered import kernel_of  # noqa: E402


def tool(name):
    """Where one of the programs lies that Triton brings from CUDA; None where it does not."""
    try:
        return getattr(triton.knobs.nvidia, name).path
    except (AttributeError, OSError, RuntimeError):
        return None


pytestmark = pytest.mark.skipif(tool("ptxas") is None, reason="this Triton has no ptxas")
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""
STACK = 64
"""Bytes a thread may keep out of registers: those of a division in float64."""
M = 64
HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def rows(*formats, k=4096):
    return [Value(f"x{index}", (M, k), format) for index, format in enumerate(formats)]


def made(op, inputs, formats, **fields):
    """A node with outputs in these formats."""
    node = one_node(op, *inputs, **fields)
    return replace(node, outputs=tuple(replace(v, format=f) for v, f in zip(node.outputs, formats, strict=True)))


def normed(op, inputs, *formats):
    k = inputs[0].shape[1]
    return made(op, inputs, formats, gamma=(Value("gamma", (k,)),), epsilon=1e-5)


def converted(source, target, k=4096):
    node = made("convert", rows(source, k=k), [target])
    return kernel_of(node), node


def roped(pairing, dims, **fields):
    q, k = Value("q", (M, 32 * 128), "bf16"), Value("k", (M, 8 * 128), "f32")
    rotation = Rotation(theta=1e4, dims=dims, pairing=pairing)
    values = q, k, Value("positions", (M,), "i32")
    return rope.Rope(), made("rope", values, ["bf16", "f16"], rotation=rotation, **HEADS, **fields)


def roped_and_copied(**fields):
    values = [Value("q", (M, 32 * 128), "bf16"), *(Value(port, (M, 8 * 128), "bf16") for port in "kv")]
    state = [Value("positions", (M,), "i32"), *cached("bf16")]
    node = one_node("rope_copy", *values, *state, rotation=Rotation(theta=1e4, dims=128), **HEADS, **fields)
    return rope_copy.RopeCopy(), node


def tempered():
    return [*rows("bf16"), Value("positions", (M,), "i32")]


def heads_normed():
    """Of eight heads and four, in two formats."""
    q, k = rows("bf16", k=1024)[0], replace(rows("f32", k=512)[0], name="k")
    gamma = tuple(Value(f"{port}_gamma", (128,)) for port in "qk")
    heads = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 128}
    return norm.QkNorm(), made("qk_norm", [q, k], ["f32", "bf16"], gamma=gamma, epsilon=1e-6, **heads)


def cached(format):
    caches = [Value(name, (9, 16, 8, 128), format) for name in ("k_cache", "v_cache")]
    return [Value("slots", (M,), "i32"), *caches]


BF16_F32 = rows("bf16", "f32")
NODES = {
    "rms_norm": (norm.RmsNorm(), normed("rms_norm", rows("f32"), "bf16")),
    "rms_norm q8_32": (norm.RmsNorm(), normed("rms_norm", rows("bf16"), "q8_32")),
    "add_rms_norm fp8_row": (norm.AddRmsNorm(), normed("add_rms_norm", BF16_F32, "bf16", "fp8_row")),
    "add_rms_norm fp8_block": (norm.AddRmsNorm(), normed("add_rms_norm", rows("f32", "f32"), "f32", "fp8_block")),
    "add_rms_norm of 16384": (norm.AddRmsNorm(), normed("add_rms_norm", rows("f32", "f32", k=16384), "f32", "q8_32")),
    "long fp8_row": (norm.AddRmsNorm(), normed("add_rms_norm", rows("bf16", "bf16", k=20480), "bf16", "fp8_row")),
    "long q8_32": (norm.AddRmsNorm(), normed("add_rms_norm", rows("bf16", "bf16", k=20480), "bf16", "q8_32")),
    "add": (elementwise.Elementwise(), made("add", BF16_F32, ["f16"])),
    "mul of odd rows": (elementwise.Elementwise(), made("mul", rows("f16", "f16", k=33), ["f16"])),
    "silu": (elementwise.Elementwise(), made("silu", rows("bf16"), ["bf16"])),
    "gelu": (elementwise.Elementwise(), made("gelu", rows("bf16"), ["f32"])),
    "scale": (elementwise.Elementwise(), made("scale", rows("f32"), ["bf16"], scale=12.0)),
    "soft_cap": (elementwise.Elementwise(), made("soft_cap", rows("bf16"), ["f32"], soft_cap=30.0)),
    "clamped_swiglu": (
        elementwise.Elementwise(),
        made("clamped_swiglu", rows("bf16", "f32"), ["bf16"], limit=7.0, alpha=1.702),
    ),
    "temper": (elementwise.Temper(), made("temper", tempered(), ["f32"], scale=0.1, span=8192)),
    "qk_norm": heads_normed(),
    "swiglu fp8_row": (elementwise.Swiglu(), made("swiglu", rows("bf16", "bf16", k=14336), ["fp8_row"])),
    "swiglu fp8_block": (elementwise.Swiglu(), made("swiglu", rows("bf16", "bf16", k=14336), ["fp8_block"])),
    "swiglu q8_32": (elementwise.Swiglu(), made("swiglu", rows("bf16", "bf16", k=14336), ["q8_32"])),
    "bf16 to f32": converted("bf16", "f32"),
    "bf16 to fp8_row": converted("bf16", "fp8_row", 14336),
    "bf16 to fp8_row of 65536": converted("bf16", "fp8_row", 65536),
    "bf16 to fp8_block": converted("bf16", "fp8_block"),
    "f32 to q8_32": converted("f32", "q8_32"),
    "bf16 to fp8_tensor": converted("bf16", "fp8_tensor"),
    "q8_32 to fp8_block": converted("q8_32", "fp8_block"),
    "fp8_block to fp8_tensor": converted("fp8_block", "fp8_tensor"),
    "fp8_tensor to f16": converted("fp8_tensor", "f16"),
    "embed": (embed.Bf16(), made("embed", [Value("ids", (M,), "i32")], ["f32"], weight=(Value("w", (99, 4096)),))),
    "rope adjacent": roped("adjacent", 128),
    "rope halves, a part": roped("halves", 96),
    "rope divided": roped("halves", 128, weight=(Value("divisors", (64,)),)),
    "rope and copy": roped_and_copied(),
    "copy": (copy.Copy(), one_node("copy", *rows("bf16", "f32", k=1024), *cached("f16"), num_kv_heads=8, head_dim=128)),
}


def empty(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def planes(value):
    return as_planes(tuple(empty(p.shape(value.extents), torch_dtype(p.dtype)) for p in lookup(value.format).planes))


def launches(monkeypatch, module, bind):
    """The kernels, arguments and warps that `bind`, of that module, would launch."""
    found = []
    monkeypatch.setattr(module, "bind", lambda *args, num_warps, **_: found.append((args[0], args[2:], num_warps)))
    bind()
    assert found
    return found


def compiled(kernel, args, warps):
    """What Triton makes of a kernel for compute capability 9.0."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    # Triton is about to change what it does with products and sums unless told, and warns of that.
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def stack(cubin, path):
    """Bytes a thread that the compiled kernel keeps out of registers; 0 where nothing is there to tell."""
    if tool("cuobjdump") is None:
        return 0
    path.write_bytes(cubin)
    told = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


def check(monkeypatch, tmp_path, module, bind):
    for kernel, args, warps in launches(monkeypatch, module, bind):
        binary = compiled(kernel, args, warps)
        assert binary.metadata.shared <= SHARED
        assert stack(binary.asm["cubin"], tmp_path / "cubin") <= STACK


@pytest.mark.parametrize(("kernel", "node"), NODES.values(), ids=NODES)
def test_it_compiles_and_fits(monkeypatch, tmp_path, kernel, node):
    packed = tuple(empty(v.extents, getattr(kernel, "dtype", torch.float32)) for v in node.weights)
    scratch = empty((kernel.workspace(node),), torch.uint8)
    inputs, outputs = (tuple(planes(value) for value in values) for values in (node.inputs, node.outputs))
    tensors = Tensors(inputs, outputs, packed, scratch)
    check(monkeypatch, tmp_path, sys.modules[type(kernel).__module__], lambda: kernel.bind(node, tensors, None))

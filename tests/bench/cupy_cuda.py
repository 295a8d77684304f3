"""The DP4A kernels on a CUDA card beside reading as many bytes, torch's int4 and bf16; writes CARD-dp4a.json.

    python tests/bench/cupy_cuda.py --out docs/results check layers fused variants

`check`: each format against float64, with the rows' own 8 bits and without. `layers`: mul_mats of an 8B llama at 1 to 8
rows. `fused`: qkv, gate_up_swiglu, mul_mat_add. `variants`: other choices of warps, stages and grids at one row.
A measurement that fails is a note in the result, and leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from peers import bf16_calls, int4_calls
from result import Result, arguments

from kernelmux.contract import Tensors
from kernelmux.contract.device import Device, find_device
from kernelmux.graph.formats import Value, Weight, dequantize_planes, empty_planes, quantize_planes
from kernelmux.graph.graph import make_node
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.ops import copies, random_weights, time_kernel
from kernelmux.measure.timing import Timing, time_launches
from kernelmux.measure.works import Batch, Work, matrix_work
from kernelmux.models.random import random_planes
from kernelmux_cupy import launch
from kernelmux_cupy.mul_mat import F16, Bf16, Dp4a, Dp4aGateUpSwiglu
from kernelmux_cupy.pack import TILED
from kernelmux_cupy.tuning import H100, RESERVED, Shape, Tuning

LAYERS = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate+up": (28672, 4096)}
HEAD = (128256, 4096)
ROWS = (1, 2, 4, 8)
SLACK = 2.5
"""Microseconds beside the bytes that a layer may take."""

# Warps, stages, groups, chunk, resident blocks, loop.
VARIANTS = (
    Tuning(16, 1, 1, 2, 1),
    Tuning(16, 1, 1, 4, 1),
    Tuning(16, 2, 1, 2, 1),
    Tuning(16, 1, 1, 2, 2),
    Tuning(16, 1, 1, 4, 2),
    Tuning(16, 1, 1, 2, 2, loop=False),
    Tuning(8, 2, 1, 2, 2),
    Tuning(8, 2, 1, 4, 2),
    Tuning(8, 4, 1, 2, 1),
    Tuning(8, 1, 1, 2, 4, loop=False),
    Tuning(4, 2, 1, 2, 4),
)
SEVERAL = (
    Tuning(16, 1, 1, 2, 1),
    Tuning(8, 1, 2, 1, 2),
    Tuning(8, 2, 1, 2, 2),
    Tuning(8, 2, 1, 2, 2, matrix=True),
    Tuning(8, 4, 1, 2, 1, matrix=True),
    Tuning(16, 1, 1, 1, 1, matrix=True),
    Tuning(16, 1, 1, 2, 1, matrix=True),
    Tuning(8, 1, 1, 2, 3, matrix=True),
)
"""For several rows: by dp4a, and by the matrix unit."""

READ = r"""
extern "C" __global__ void __launch_bounds__(512) read(const uint4 *x, unsigned *y, long long count) {
    unsigned bits = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        const uint4 a = __ldcs(x + i), b = __ldcs(x + i + step);
        const uint4 c = __ldcs(x + i + 2 * step), d = __ldcs(x + i + 3 * step);
        bits ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += step) { const uint4 a = __ldcs(x + i); bits ^= a.x ^ a.y ^ a.z ^ a.w; }
    if (bits == 0x9e3779b9u) *y = bits;
}
"""


# Errors ---------------------------------------------------------------------------------------------------------------


def check(result: Result) -> None:
    for format in (*TILED, "bf16", "f16"):
        kernel = {"bf16": Bf16, "f16": F16}.get(format, Dp4a)()
        for m in (1, 3, 8, 16) if format in TILED else (1, 8):
            result.add(f"error of {format} at m={m}", partial(error_of, result.device, kernel, format, m))


def error_of(device: Device, kernel: Any, format: str, m: int, n: int = 1000, k: int = 4096) -> dict[str, Any]:
    """NMSE against float64: of what the kernel is given, and of the rows before they were put in 8 bits."""
    kernel.device, generator = device, torch.Generator(device.torch).manual_seed(m)
    weight = Weight("w", (n, k), format, random_planes(format, (n, k), generator, k**-0.5))
    x = torch.randn(m, k, generator=generator, device=device.torch)
    stored = kernel.inputs(matrix_work(n, k, format, m).node)[0][0]
    node = make_node("mul_mat", "check", Value("x", (m, k), stored), weight=(Value("w", (n, k), format),))
    planes, outputs = empty_planes(node.inputs[0], device.torch), empty_planes(node.outputs[0], device.torch)
    quantize_planes(stored, x, planes)
    packed, stream = kernel.prepare([weight], device), torch.cuda.Stream(device.index)
    given = planes if len(planes) > 1 else planes[0]
    torch.cuda.synchronize()
    kernel.bind(node, Tensors((given,), outputs, packed), stream)()
    torch.cuda.synchronize()
    dense = weight.dequantize(torch.float64).to(device.torch)
    errors = []
    for rows in (dequantize_planes(stored, planes, torch.float64), x.double()):
        wanted = rows @ dense.T
        errors.append(float((outputs[0].double() - wanted).square().sum() / wanted.square().sum()))
    return {
        "work": f"{n}x{k} {format}",
        "m": m,
        "kernel": kernel.name,
        "NMSE": errors[0],
        "NMSE of float rows": errors[1],
    }


# Times ----------------------------------------------------------------------------------------------------------------


def layers(result: Result) -> None:
    for format in ("Q4_K", "Q6_K", "Q8_0", "bf16"):
        for label, (n, k) in LAYERS.items():
            alone = None
            for m in ROWS:
                work = matrix_work(n, k, format, m)
                kernel = Bf16() if format == "bf16" else Dp4a()
                peers = int4_and_bf16(result, n, k) if m == 1 else {}
                what = f"{label} {format} m={m}"
                row = result.attempt(what, partial(timed, result, label, work, kernel, alone, peers))
                if row:
                    alone = alone or row["us"]
                    result.rows.append(row)
    peers = int4_and_bf16(result, *HEAD)
    result.add("lm_head", lambda: timed(result, "lm_head", matrix_work(*HEAD, "Q4_K", 1), Dp4a(), None, peers))
    torch.cuda.empty_cache()


def fused(result: Result) -> None:
    for m in ROWS:
        for label, kernel, node in fused_nodes(m):
            work = Work(label, node, Batch.of(m, 1))
            result.add(f"{label} m={m}", partial(timed, result, label, work, kernel, None, {}))


def fused_nodes(m: int) -> Iterator[tuple[str, Any, Any]]:
    x, wide = Value("x", (m, 4096)), Value("x", (m, 14336))
    ports = (("q", 4096, "Q4_K"), ("k", 1024, "Q4_K"), ("v", 1024, "Q6_K"))
    qkv = tuple(Value(name, (n, 4096), format) for name, n, format in ports)
    yield "qkv in one", Dp4a(), make_node("qkv", "qkv", x, weight=qkv)
    pair = tuple(Value(name, (14336, 4096), "Q4_K") for name in ("gate", "up"))
    yield "gate_up_swiglu", Dp4aGateUpSwiglu(), make_node("gate_up_swiglu", "gate_up", x, weight=pair)
    residual = Value("residual", (m, 4096))
    for label, given, k in (("o + residual", x, 4096), ("down + residual", wide, 14336)):
        weight = (Value(f"w{k}", (4096, k), "Q4_K"),)
        yield label, Dp4a(), make_node("mul_mat_add", "add", given, residual, weight=weight)


def variants(result: Result) -> None:
    """Each choice on each layer that it fits, of Q4_K; the choice that is made by itself is in `layers`."""
    for m, choices in ((1, VARIANTS), (4, SEVERAL), (8, SEVERAL)):
        for label, (n, k) in LAYERS.items():
            shape = Shape(("Q4_K",), (n,), k, m)
            for tuning in choices:
                tuning = replace(
                    tuning, warps=tuning.warps if shape.tiles % tuning.warps == 0 else tuning.warps // 8 * 7
                )
                if tuning.resident * (shape.shared(tuning) + RESERVED) > H100.shared:
                    continue
                work = matrix_work(n, k, "Q4_K", m)
                what, kernel = f"{label}, {described(tuning)}", Dp4a()
                kernel.variant = tuning
                result.add(what, partial(timed, result, what, work, kernel, None, {}))


def described(tuning: Tuning) -> str:
    numbers = f"{tuning.warps} warps, {tuning.stages} stages, {tuning.resident} blocks, {tuning.chunk} at once"
    groups = ", two groups" if tuning.groups == 2 else ""
    return numbers + groups + ("" if tuning.loop else ", a set a block") + (", matrix unit" if tuning.matrix else "")


def timed(
    result: Result, label: str, work: Work, kernel: Any, alone: float | None, peers: dict[str, float]
) -> dict[str, Any]:
    """One kernel at one work; `alone` is its time at one row."""
    kernel.device, weights = result.device, random_weights([work], result.device)
    timing = time_kernel(work, f"cupy:{kernel.name}", kernel, weights, "f32").timing
    nbytes = sum(value.nbytes for value in work.node.weight)
    floor = nbytes / result.ceilings.read * 1e6
    read = time_reading(result.device, nbytes)
    return {
        "work": f"{label} {'+'.join(dict.fromkeys(value.format for value in work.node.weight))}",
        "m": work.m,
        "kernel": f"cupy:{kernel.name}",
        "us": round(timing.median, 2),
        "p10 to p90": [round(timing.p10, 2), round(timing.p90, 2)],
        "file MB": round(nbytes / 1e6, 2),
        "TB/s": round(nbytes / timing.median / 1e6, 3),
        "floor us": round(floor, 2),
        "over floor us": round(timing.median - floor, 2),
        "within": timing.median <= nbytes / 3.09e6 + SLACK,
        "reading alone us": round(read.median, 2),
        "of m=1": round(timing.median / alone, 2) if alone else "",
        **{f"{name} us": us for name, us in peers.items()},
    }


@cache
def time_reading(device: Device, nbytes: int) -> Timing:
    """A kernel that reads as many bytes and does nothing with them."""
    import cupy

    function = cupy.RawModule(code=READ).get_function("read").kernel
    stream, sink = torch.cuda.Stream(device.index), torch.zeros(1, dtype=torch.int32, device=device.torch)
    calls = []
    for _ in range(copies(nbytes, device)):
        x = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch)
        args = (x, sink, np.int64(nbytes // 16))
        calls.append(launch.bind(function, (min(132 * 4, -(-nbytes // (16 * 512))),), (512,), args, stream))
    return time_launches(calls, device, stream=stream)


def int4_and_bf16(result: Result, n: int, k: int) -> dict[str, float]:
    """torch's kernels on one row of the same shape."""
    found = {}
    device = result.device
    peers = {"torch int4": partial(int4_calls, device, n, k), "torch bf16": partial(bf16_calls, device, 1, n, k)}
    for name, calls in peers.items():
        timing = result.attempt(f"{name} {n}x{k}", lambda make=calls: time_launches(make(), device))
        if timing is not None:
            found[name] = round(timing.median, 2)
    return found


def main() -> None:
    parts = {"check": check, "layers": layers, "fused": fused, "variants": variants}
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--apart", action="store_true", help="no launch overlaps with the one before it")
    asked = parser.parse_args()
    if asked.apart:
        launch.OVERLAPPING = (99, 0)
    device = find_device("cuda")
    ceilings = measure_ceilings(device)
    for name in asked.parts:
        title = f"DP4A products of quantised weights: {name}{', launches apart' if asked.apart else ''}"
        result = Result(f"dp4a-{name}{'-apart' if asked.apart else ''}", title, device, ceilings)
        parts[name](result)
        result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()

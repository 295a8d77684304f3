"""Triton's kernels of rows on a CUDA card beside a copy and an empty kernel; writes CARD-triton-rows.json.

    python tests/bench/triton_rows.py --out docs/results

An 8B llama's rms_norm, add_rms_norm, swiglu and rope_copy at 1 and 4,096 rows.
CUDA graphs replayed, operands rotated past the L2 cache; medians of 40 replays.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from result import Result, arguments, kernel_for

from kernelmux.contract import Tensors
from kernelmux.contract.device import Device, find_device
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import TensorNode, make_node
from kernelmux.graph.ops import Rotation
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.ops import copies, random_weights, time_kernel
from kernelmux.measure.timing import time_launches
from kernelmux.measure.works import Batch, Work
from kernelmux_triton.elementwise import Swiglu
from kernelmux_triton.launch import bind
from kernelmux_triton.norm import AddRmsNorm, RmsNorm
from kernelmux_triton.rope_copy import RopeCopy

K, FEED_FORWARD = 4096, 14336
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
ROWS = (1, 4096)


@triton.jit
def _empty(x):
    pass


def time_empty(device: Device) -> float:
    """Microseconds of a launch that does nothing."""
    return time_launches(
        [bind(_empty, (1,), torch.empty(1, device=device.torch), stream=None, num_warps=4)], device
    ).median


def nodes(m: int) -> Iterator[tuple[Any, TensorNode]]:
    gamma = {"gamma": (Value("gamma", (K,)),), "epsilon": 1e-5}
    a, b = Value("a", (m, K)), Value("b", (m, K))
    yield RmsNorm(), make_node("rms_norm", "norm", a, **gamma)
    yield AddRmsNorm(), make_node("add_rms_norm", "norm", a, b, **gamma)
    yield Swiglu(), make_node("swiglu", "swiglu", Value("gate", (m, FEED_FORWARD)), Value("up", (m, FEED_FORWARD)))


def time_rope_copy(m: int, device: Device) -> tuple[float, int]:
    """Microseconds of turning and scattering the rows of one stacked product, and the bytes read and written."""
    where, widths = device.torch, (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
    pages = -(-m // PAGE)
    cache = (pages, PAGE, KV_HEADS, DIM)
    node = make_node(
        "rope_copy",
        "rope_copy",
        *(Value(port, (m, n), "bf16") for port, n in zip("qkv", widths, strict=True)),
        *(Value("positions", (m,), "i32"), Value("slots", (m,), "i32")),
        *(Value(f"{port}_cache", cache, "bf16") for port in "kv"),
        format="bf16",
        rotation=Rotation(theta=5e5, dims=DIM, pairing="adjacent"),
        **{"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM},
    )
    # Each row is read, and all of it written again.
    nbytes = 2 * 2 * m * sum(widths)
    positions = torch.arange(m, dtype=torch.int32, device=where)
    calls = []
    for _ in range(copies(nbytes, device)):
        x = torch.randn(m, sum(widths), device=where).bfloat16()
        q = torch.empty(m, widths[0], dtype=torch.bfloat16, device=where)
        caches = [torch.empty(cache, dtype=torch.bfloat16, device=where) for _ in "kv"]
        tensors = Tensors((*x.split(widths, dim=1), positions, positions, *caches), (q, *caches))
        calls.append(kernel_for(device, RopeCopy).bind(node, tensors, None))
    return time_launches(calls, device).median, nbytes


def main() -> None:
    asked = arguments(__doc__).parse_args()
    device = find_device("cuda")
    ceilings, empty = measure_ceilings(device), time_empty(device)
    result = Result("triton-rows", "Triton: norms, swiglu, rope and copy", device, ceilings)
    result.notes.append(f"bf16 read and written; an empty kernel takes {empty:.2f} us.")

    def row(op: str, m: int, us: float, nbytes: int) -> dict[str, Any]:
        share = 100 * nbytes / us * 1e6 / ceilings.copy
        found = {"op": op, "m": m, "us": round(us, 2), "TB/s": round(nbytes / us / 1e6, 3)}
        return {**found, "% of copy": round(share, 1), "us over an empty kernel": round(us - empty, 2)}

    def timed(m: int, kernel: Any, node: TensorNode) -> dict[str, Any]:
        work = Work(node.op, node, Batch.of(m, 1))
        found = time_kernel(work, "triton:f32", kernel, random_weights([work], device), "bf16")
        return row(node.op, m, found.timing.median, work.nbytes(found.node))

    for m in ROWS:
        for kernel, node in nodes(m):
            result.add(f"{node.op} m={m}", partial(timed, m, kernel, node))
        result.add(f"rope and copy m={m}", lambda m=m: row("rope and copy", m, *time_rope_copy(m, device)))
    result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()

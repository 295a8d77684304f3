"""Paged attention in Triton on a CUDA card beside torch's SDPA over a contiguous cache; writes CARD-triton-PART.json.

    python tests/bench/triton_attention.py --out docs/results decode prefill variants

32 query heads of 8 kv heads of 128. CUDA graphs replayed, caches rotated past the L2 cache; medians of 40 replays.
NMSE is against torch's SDPA of the same numbers. A measurement that fails is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from result import Result, arguments, kernel_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernelmux.contract import Kernel, Launch, Tensors
from kernelmux.contract.device import Device, find_device
from kernelmux.graph.formats import Value, as_planes, dequantize_planes, empty_planes, quantize_planes
from kernelmux.graph.graph import TensorNode, make_node
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.ops import copies
from kernelmux.measure.timing import time_launches
from kernelmux_triton import decode as decode_module
from kernelmux_triton import prefill as prefill_module
from kernelmux_triton.decode import Decode
from kernelmux_triton.prefill import Prefill

HEADS, KV_HEADS, DIM = 32, 8, 128
DECODE = ((1, 4096), (1, 32768), (32, 4096), (64, 1024))
PREFILL = (2048, 4096, 16384)
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Bytes of keys a step, steps in flight, warps, programs a multiprocessor.
DECODE_VARIANTS = (
    (16384, 2, 4, 2),
    (16384, 4, 4, 2),
    (16384, 3, 4, 1),
    (16384, 4, 8, 1),
    (32768, 3, 4, 1),
    (32768, 3, 8, 1),
    (8192, 4, 4, 2),
    (8192, 6, 4, 2),
)
# Rows and bytes of keys a tile, tiles in flight, warps, copy engine.
PREFILL_VARIANTS = (
    (128, 16384, 2, 4, True),
    (128, 16384, 2, 8, True),
    (128, 16384, 4, 8, True),
    (128, 32768, 2, 8, True),
    (128, 32768, 2, 8, False),
    (64, 16384, 2, 4, True),
    (64, 16384, 3, 4, True),
    (64, 16384, 2, 4, False),
    (64, 32768, 2, 4, True),
    (128, 16384, 3, 8, False),
)


@dataclass(frozen=True)
class Work:
    """Sequences of one length; `rows` new rows each."""

    seqs: int
    rows: int
    length: int
    format: str = "bf16"
    page_size: int = 16

    @property
    def node(self) -> TensorNode:
        pages = self.length // self.page_size
        cache = (self.seqs * pages, self.page_size, KV_HEADS, DIM)
        inputs = (
            Value("q", (self.seqs * self.rows, HEADS * DIM), "bf16"),
            Value("k_cache", cache, self.format),
            Value("v_cache", cache, self.format),
            Value("query_start", (self.seqs + 1,), "i32"),
            Value("kv_len", (self.seqs,), "i32"),
            Value("block_table", (self.seqs, pages), "i32"),
        )
        sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "scale": DIM**-0.5}
        return make_node("attention", "attention", *inputs, format="bf16", **sizes)

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(value.nbytes for value in self.node.inputs[1:3])

    @property
    def flops(self) -> float:
        """Of the positions that causal rows see."""
        return 4.0 * HEADS * DIM * self.seqs * self.rows * (self.length - (self.rows - 1) / 2)

    def row(self, label: str, us: float, error: float | None) -> dict[str, Any]:
        """What a table shows."""
        rate = {"TB/s": round(self.nbytes / us / 1e6, 3)} if self.rows == 1 else {}
        return {
            "work": f"{self.seqs} x {self.length}, {'decode' if self.rows == 1 else 'prefill'}",
            "cache": f"{self.format}, pages of {self.page_size}" if error is not None else f"{self.format}, contiguous",
            "kernel": label,
            "us": round(us, 1),
            **(rate or {"TFLOP/s": round(self.flops / us / 1e6, 1)}),
            "NMSE": f"{error:.1e}" if error is not None else "",
        }


class Bound:
    """A kernel bound to as many caches as outrun the L2 cache; all use the same queries."""

    def __init__(self, kernel: Any, work: Work, device: Device) -> None:
        self.work, self.stream = work, torch.cuda.Stream(device.index)
        node, where = work.node, device.torch
        generator = torch.Generator(where).manual_seed(0)
        self.q = torch.randn(node.inputs[0].extents, generator=generator, device=where).bfloat16()
        self.y = torch.empty_like(self.q)
        start = torch.arange(work.seqs + 1, device=where, dtype=torch.int32) * work.rows
        lengths = torch.full((work.seqs,), work.length, device=where, dtype=torch.int32)
        pages = node.inputs[1].extents[0]
        self.table = torch.randperm(pages, generator=generator, device=where).to(torch.int32).view(work.seqs, -1)
        nbytes = kernel.workspace(node)
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=where) if nbytes else None
        self.caches, self.calls = [], []
        for _ in range(copies(work.nbytes, device)):
            caches = [self._cache(value, generator) for value in node.inputs[1:3]]
            inputs = (self.q, *map(as_planes, caches), start, lengths, self.table)
            self.caches.append(caches)
            self.calls.append(kernel.bind(node, Tensors(inputs, (self.y,), (), scratch), self.stream))
        torch.cuda.synchronize()

    def _cache(self, value: Value, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        planes = empty_planes(value, str(generator.device))
        # A page at a time, as float32 of all of them would not always fit.
        for start in range(0, value.extents[0], 4096):
            part = tuple(plane[start : start + 4096] for plane in planes)
            quantize_planes(
                value.format, torch.randn(part[0].shape, generator=generator, device=planes[0].device), part
            )
        return planes

    def error(self) -> float:
        """NMSE of the first cache's result against torch's own."""
        self.calls[0]()
        torch.cuda.synchronize()
        work = self.work
        dense = [dequantize_planes(work.format, planes, torch.bfloat16)[self.table.long()] for planes in self.caches[0]]
        keys, values = (part.view(work.seqs, work.length, KV_HEADS, DIM).transpose(1, 2) for part in dense)
        q = self.q.view(work.seqs, work.rows, HEADS, DIM).transpose(1, 2)
        wanted = scaled_dot_product_attention(q, keys, values, is_causal=work.rows > 1, enable_gqa=True)
        wanted = wanted.transpose(1, 2).reshape(self.y.shape).double()
        return float((self.y.double() - wanted).square().sum() / wanted.square().sum())


def add(result: Result, label: str, work: Work, measure: Callable[[], tuple[float, float | None]]) -> None:
    """One row: microseconds and NMSE."""
    result.add(f"{label}, {work}", lambda: work.row(label, *measure()))


def timed(made: type[Kernel], work: Work, device: Device, variant: Any = None) -> tuple[float, float]:
    bound = Bound(kernel_for(device, made, variant), work, device)
    error = bound.error()
    return time_launches(bound.calls, device, stream=bound.stream).median, error


def peer(name: str, work: Work, device: Device) -> tuple[float, None]:
    """torch's SDPA by one of its backends, over caches [sequence, head, position, dim]."""
    shape = (work.seqs, KV_HEADS, work.length, DIM)
    q = torch.randn(work.seqs, HEADS, work.rows, DIM, device=device.torch, dtype=torch.bfloat16)

    def call(keys: torch.Tensor, values: torch.Tensor) -> object:
        with sdpa_kernel(PEERS[name]):
            return scaled_dot_product_attention(q, keys, values, is_causal=work.rows > 1, enable_gqa=True)

    caches = [
        [torch.randn(shape, device=device.torch, dtype=torch.bfloat16) for _ in "kv"]
        for _ in range(copies(work.nbytes, device))
    ]
    calls: Sequence[Launch] = [partial(call, *pair) for pair in caches]
    return time_launches(calls, device).median, None


def decode(result: Result) -> None:
    device = result.device
    for seqs, length in DECODE:
        for format, page_size in (("bf16", 16), ("bf16", 64), ("fp8_row", 16), ("fp8_row", 64)):
            work = Work(seqs, 1, length, format, page_size)
            add(result, "triton:decode", work, partial(timed, Decode, work, device))
        for name in PEERS:
            add(result, name, work := Work(seqs, 1, length), partial(peer, name, work, device))


def prefill(result: Result) -> None:
    device = result.device
    for length in PREFILL:
        for format, page_size in (("bf16", 16), ("bf16", 64), ("fp8_row", 64)):
            work = Work(1, length, length, format, page_size)
            add(result, "triton:prefill", work, partial(timed, Prefill, work, device))
        add(result, "cuDNN", work := Work(1, length, length), partial(peer, "cuDNN", work, device))


def variants(result: Result) -> None:
    device = result.device
    for numbers in DECODE_VARIANTS:
        tuning = decode_module.Tuning(*numbers)
        for work in (Work(1, 1, 4096), Work(1, 1, 32768), Work(32, 1, 4096)):
            add(result, f"decode {numbers}", work, partial(timed, Decode, work, device, tuning))
    for shape in PREFILL_VARIANTS:
        work = Work(1, 4096, 4096, page_size=64)
        tuning = prefill_module.Tuning(*shape)
        add(result, f"prefill {shape}", work, partial(timed, Prefill, work, device, tuning))


def main() -> None:
    parts = {"decode": decode, "prefill": prefill, "variants": variants}
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=parts)
    asked = parser.parse_args()
    device = find_device("cuda")
    ceilings = measure_ceilings(device)
    for name in asked.parts:
        result = Result(f"triton-{name}", f"Triton: attention, {name}", device, ceilings)
        parts[name](result)
        result.notes.append("32 query heads of 8 kv heads of 128.")
        result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()

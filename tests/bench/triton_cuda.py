"""The Triton backend's products on a CUDA card beside torch's own; writes CARD-triton-PART.json for each part.

    python tests/bench/triton_cuda.py --out docs/results fp8 few-rows tune

`fp8`: e4m3 by e4m3 at 512 and 2048 rows of an 8B llama, and a block-scaled shape. `few-rows`: each weight format at 1
and 16 rows, beside cuBLAS in bf16 and cuBLASLt in e4m3. `tune`: every tiling of every kernel, whose best are written to
kernelmux_triton/tunings/CARD.json; a tiling whose numbers are not the others' is left out. A measurement that fails is
a note in the result, and leaves the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import bf16_calls, fp8_calls
from result import Result, arguments, kernel_for

import kernelmux_triton
from kernelmux.contract import Tensors
from kernelmux.contract.device import Device, find_device
from kernelmux.contract.packed import PackedWeights
from kernelmux.graph.formats import Value, as_planes, empty_planes
from kernelmux.graph.graph import TensorNode, make_node
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.ops import random_weights, time_kernel
from kernelmux.measure.report import card
from kernelmux.measure.table import Tables
from kernelmux.measure.timing import Timing, time_launches
from kernelmux.measure.variants import THREADS, time_variants
from kernelmux.measure.works import Batch, Work, matrix_work, stored_as
from kernelmux.models.random import random_planes
from kernelmux_triton import few_rows, fp8

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
BLOCKS = (1024, 18432, 7168)
"""m, n, k of the block-scaled shape that others publish."""
SCALED = (fp8.Fp8RowFast, fp8.Fp8Row, fp8.Fp8TensorFast, fp8.Fp8Tensor)
GATED = ((few_rows.Fp8Weight, "fp8_row"), (few_rows.Dequant, "Q4_K"))
FEW = (
    *((few_rows.Fp8Weight, "fp8_row"), (fp8.Fp8RowFast, "fp8_row"), (few_rows.Bf16, "bf16")),
    *((few_rows.Dequant, form) for form in ("Q4_K", "Q4_0", "Q8_0")),
)
"""Kernels of few rows, and how their weights are stored."""
ALIKE = 1e-3
"""NMSE between tilings of one kernel."""


def timed(result: Result, what: str, work: Work, kernel: Any) -> Timing | None:
    """One kernel, its tiling chosen as a plan would."""

    def run() -> Timing:
        kernel.variant, _ = Tables(result.device).pick(kernel, work.node)
        weights = random_weights([work], result.device)
        return time_kernel(work, f"triton:{kernel.name}", kernel, weights, "bf16").timing

    return result.attempt(what, run)


def fp8_gemms(result: Result) -> None:
    works = [(f"{label} {n}x{k}", m, n, k, SCALED) for label, (n, k) in LAYERS.items() for m in (512, 2048)]
    works.append(("blocks {1}x{2}".format(*BLOCKS), *BLOCKS, (fp8.Fp8Block,)))
    for label, m, n, k, kernels in works:
        for made in kernels:
            kernel = kernel_for(result.device, made)
            what = f"{kernel.name} {label} m={m}"
            work = matrix_work(n, k, kernel.form, m)
            raw = partial(time_cublaslt, result.device, kernel, m, n, k)
            # The peer before and after: a card that is busy for longer runs at a lower clock.
            before = result.attempt(f"torch {what}", raw)
            ours = timed(result, what, work, kernel)
            after = result.attempt(f"torch {what}", raw)
            theirs = [timing.median for timing in (before, after) if timing]
            if ours is None:
                continue
            peer = sum(theirs) / len(theirs) if theirs else None
            row = {
                "work": label,
                "m": m,
                "kernel": f"triton:{kernel.name}",
                "us": round(ours.median, 1),
                "torch us": round(peer, 1) if peer else "",
                "torch's speed": round(peer / ours.median, 3) if peer else "",
                "TFLOP/s": round(work.flops / ours.median / 1e6, 1),
                "tiling": str(kernel.variant),
            }
            result.rows.append(row)
            print(*row.values(), sep=" | ", flush=True)


def time_cublaslt(device: Device, kernel: fp8.Fp8Row, m: int, n: int, k: int) -> Timing:
    """torch's own call with scales of the same kind, and sums alike."""
    return time_launches(fp8_calls(device, kernel.taken, kernel.reads.fast, m, n, k), device)


def few(result: Result) -> None:
    for label, (n, k) in LAYERS.items():
        for m in (1, 16):
            peers = {
                "bf16": result.attempt(f"cuBLAS {label} m={m}", partial(time_cublas, result.device, m, n, k)),
                "fp8": result.attempt(
                    f"cuBLASLt {label} m={m}",
                    partial(time_cublaslt, result.device, kernel_for(result.device, fp8.Fp8RowFast), m, n, k),
                ),
            }
            for made, form in FEW:
                work = matrix_work(n, k, form, m)
                few_row(result, f"{label} {n}x{k} {form}", work, kernel_for(result.device, made), peers)
    for m in (1, 16):
        for made, form in GATED:
            work = Work("gate_up", gated(m, form), Batch.of(m, 1))
            few_row(result, f"gate_up_swiglu {form}", work, kernel_for(result.device, made), {})


def gated(m: int, form: str) -> TensorNode:
    pair = tuple(Value(name, (14336, 4096), form) for name in ("gate", "up"))
    return make_node("gate_up_swiglu", "gate_up", Value("x", (m, 4096)), weight=pair)


def few_row(result: Result, label: str, work: Work, kernel: Any, peers: dict[str, Timing | None]) -> None:
    timing = timed(result, f"{kernel.name} {label} m={work.m}", work, kernel)
    if timing is None:
        return
    nbytes = kernel.packed_bytes(work.node)
    row = {
        "work": label,
        "m": work.m,
        "kernel": f"triton:{kernel.name}",
        "us": round(timing.median, 2),
        "TB/s": round(nbytes / timing.median / 1e6, 3),
        "% of reading": round(100 * nbytes / timing.median * 1e6 / result.ceilings.read, 1),
        **{f"torch {name} us": round(peer.median, 1) for name, peer in peers.items() if peer},
        "tiling": str(kernel.variant),
    }
    result.rows.append(row)
    print(*list(row.values())[:6], sep="|", flush=True)


def time_cublas(device: Device, m: int, n: int, k: int) -> Timing:
    return time_launches(bf16_calls(device, m, n, k), device)


def tune(result: Result, only: str) -> None:
    """Every tiling; the best of each work goes into the table that is shipped."""
    choices: dict[str, str] = {}
    for made, node in tuned():
        kernel = kernel_for(result.device, made)
        label = kernel.work(node)
        if label in choices or not fnmatchcase(label, only):
            continue
        work = Work("tune", node, Batch.of(1, 1))
        weights = random_weights([work], result.device)
        kept = result.attempt(label, partial(alike, result, kernel, work, weights)) or ()
        times = result.attempt(label, partial(time_variants, work, f"triton:{kernel.name}", kernel, weights)) or {}
        found = {tiling: time for tiling, time in times.items() if tiling in kept and time is not None}
        if not found:
            continue
        choices[label] = min(found, key=found.__getitem__)
        result.rows.append({"shape": label, "best": choices[label], **{k: round(t, 2) for k, t in found.items()}})
    path = Path(kernelmux_triton.__file__).parent / "tunings" / f"{card(result.device)}.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"cards": [], "choices": {}}
    cards = list(dict.fromkeys([*before["cards"], result.device.name]))
    table = {
        "arch": result.device.arch,
        "cards": cards,
        "choices": dict(sorted({**before["choices"], **choices}.items())),
    }
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"{len(choices)} shapes in {path.name}", flush=True)


def tuned() -> Iterator[tuple[Any, TensorNode]]:
    for n, k in LAYERS.values():
        for made, form in FEW:
            for m in (1, 4, 16, 64):
                yield made, matrix_work(n, k, form, m).node
        for made in SCALED:
            for m in (128, 512, 2048):
                yield made, matrix_work(n, k, made.form, m).node
    m, n, k = BLOCKS
    yield fp8.Fp8Block, matrix_work(n, k, fp8.Fp8Block.form, m).node
    for made, form in (*GATED, (fp8.Fp8RowFast, "fp8_row")):
        for m in (1, 16, 512) if made is fp8.Fp8RowFast else (1, 16):
            yield made, gated(m, form)


def alike(result: Result, kernel: Any, work: Work, packed: PackedWeights) -> set[str]:
    """The tilings whose numbers are those of most: each is launched once on the same operands."""
    device, node = result.device, stored_as(work.node, kernel, "bf16")
    weights = packed.get(node, f"triton:{kernel.name}", kernel)
    generator = torch.Generator(device.torch).manual_seed(0)
    x = random_planes(node.inputs[0].format, node.inputs[0].extents, generator, 1.0)

    def bound(tiling: Any) -> Any:
        tiled = copy(kernel)
        tiled.variant = tiling
        y, nbytes = empty_planes(node.outputs[0], device.torch), tiled.workspace(node)
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=device.torch) if nbytes else None
        tensors = Tensors((as_planes(x),), (as_planes(y),), weights, scratch)
        what = f"{kernel.work(node)}, {tiling}"
        return what, y[0], result.tried(what, lambda: tiled.bind(node, tensors, None))

    # Compiled several at a time.
    tilings = kernel.variants(node)
    with ThreadPoolExecutor(THREADS) as pool:
        every = list(pool.map(bound, tilings))
    found = {}
    for tiling, (what, y, launch) in zip(tilings, every, strict=True):
        if launch and result.tried(what, lambda launch=launch: (launch(), torch.cuda.synchronize(), True)):
            found[tiling] = what, y.float()
    if not found:
        return set()
    median = torch.stack([y for _, y in found.values()]).median(dim=0).values
    kept = set()
    for tiling, (what, y) in found.items():
        error = float((y - median).square().sum() / median.square().sum())
        if error <= ALIKE:
            kept.add(str(tiling))
        else:
            result.notes.append(f"{what}: NMSE {error:.2g} against the other tilings.")
            print("!", result.notes[-1], flush=True)
    return kept


def main() -> None:
    titles = {"fp8": "e4m3 products", "few-rows": "products of few rows", "tune": "tilings"}
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=titles)
    parser.add_argument("--only", default="*", metavar="GLOB", help="tune: the shapes of this name")
    asked = parser.parse_args()
    parts = {"fp8": fp8_gemms, "few-rows": few, "tune": partial(tune, only=asked.only)}
    device = find_device("cuda")
    ceilings = measure_ceilings(device)
    for name in asked.parts:
        result = Result(f"triton-{name}", f"Triton: {titles[name]}", device, ceilings)
        parts[name](result)
        result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()

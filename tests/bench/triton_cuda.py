"""The Triton backend's products on a CUDA card beside torch's own; writes CARD-triton-PART.json for each part.

    python tests/bench/triton_cuda.py --out docs/results fp8 few-rows tune

`fp8`: e4m3 by e4m3 at 512 and 2048 rows of an 8B llama, and a block-scaled shape. `few-rows`: each weight format at 1
and 16 rows, beside cuBLAS in bf16 and cuBLASLt in e4m3. `tune`: every tiling of every kernel, whose best are written to
kernelmux_triton/tunings/CARD.json; a tiling whose numbers are not the others' is left out. With `--specialized` also
those whose loads have a warp of their own. A measurement that fails is a note in the result, and leaves the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernelmux_triton
from kernelmux.bench.ceilings import Ceilings, measure_ceilings
from kernelmux.bench.ops import copies, random_weights, stored_as, time_kernel
from kernelmux.bench.report import card, make_report, save_report
from kernelmux.bench.timing import Timing, time_launches
from kernelmux.bench.works import Batch, Work, matrix_work
from kernelmux.device import Device, find_device
from kernelmux.formats import Value, as_planes, empty_planes
from kernelmux.graph import TensorNode, make_node
from kernelmux.hookspecs import Tensors
from kernelmux.models.random import random_planes
from kernelmux_triton import few_rows, fp8, tuning
from kernelmux_triton.measure import THREADS, measure
from kernelmux_triton.mul_mat import measuring, retiled

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
BLOCKS = (1024, 18432, 7168)
"""m, n, k of the block-scaled shape that others publish."""
SCALED = (fp8.Fp8RowFast, fp8.Fp8Row, fp8.Fp8TensorFast, fp8.Fp8Tensor)
QUANTIZED = ("Q4_K", "Q4_0", "Q8_0")
ALIKE = 1e-3
"""NMSE between tilings of one kernel."""


@dataclass
class Result:
    """Rows and notes of one part."""

    device: Device
    ceilings: Ceilings
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; None where it raises, and then a note."""
        try:
            return work()
        except Exception as error:
            self.notes.append(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            print("!", self.notes[-1][:120], flush=True)
            return None

    def timed(self, what: str, work: Work, kernel: Any) -> Timing | None:
        """One kernel, its tiling chosen (and measured, where no table has it) as a plan would."""

        def run() -> Timing:
            kernel.chosen(work.node, measuring(kernel, work.node))
            weights = random_weights([work], self.device)
            return time_kernel(work, f"triton:{kernel.name}", kernel, weights, "bf16").timing

        found = self.attempt(what, run)
        torch.cuda.empty_cache()
        return found


def fp8_gemms(result: Result) -> None:
    works = [(f"{label} {n}x{k}", m, n, k, SCALED) for label, (n, k) in LAYERS.items() for m in (512, 2048)]
    works.append(("blocks {1}x{2}".format(*BLOCKS), *BLOCKS, (fp8.Fp8Block,)))
    for label, m, n, k, kernels in works:
        for made in kernels:
            kernel = made(result.device)
            what = f"{kernel.name} {label} m={m}"
            work = matrix_work(n, k, kernel.form, m)
            raw = partial(time_torch, result.device, kernel, m, n, k)
            # The peer before and after: a card that is busy for longer runs at a lower clock.
            before = result.attempt(f"torch {what}", raw)
            ours = result.timed(what, work, kernel)
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
                "TFLOP/s": round(work.flops() / ours.median / 1e6, 1),
                "tiling": str(kernel.chosen(work.node)),
            }
            result.rows.append(row)
            print(*row.values(), sep=" | ", flush=True)


def time_torch(device: Device, kernel: fp8.Fp8Row, m: int, n: int, k: int) -> Timing:
    """torch's own call with scales of the same kind, on as many operands as outrun the cache."""
    generator = torch.Generator(device.torch).manual_seed(0)
    x, xs = random_planes(kernel.taken, (m, k), generator, 1.0)
    w, ws = random_planes(kernel.form, (n, k), generator, k**-0.5)
    calls: list[Callable[[], object]] = []
    for _ in range(copies(m * k + n * k + 2 * m * n, device)):
        a, b, y = x.clone(), w.clone(), torch.empty(m, n, dtype=torch.bfloat16, device=device.torch)
        if kernel.weights.scaled == "block":
            from torch.nn.functional import ScalingType, scaled_mm

            # cuBLASLt wants the scales of w padded to fours along k.
            padded = ws.new_zeros(len(ws), -(-ws.shape[1] // 4) * 4)
            padded[:, : ws.shape[1]] = ws
            recipes = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
            scales = (xs.t(), recipes[0], padded.t(), recipes[1])
            calls.append(partial(scaled_mm, a, b.t(), *scales, output_dtype=torch.bfloat16))
        else:
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": kernel.weights.fast, "out": y}
            calls.append(partial(torch._scaled_mm, a, b.t(), xs, ws.t(), **options))
    return time_launches(calls, device)


def few(result: Result) -> None:
    for label, (n, k) in LAYERS.items():
        for m in (1, 16):
            peers = {
                "bf16": result.attempt(f"cuBLAS {label} m={m}", partial(time_bf16, result.device, m, n, k)),
                "fp8": result.attempt(
                    f"cuBLASLt {label} m={m}",
                    partial(time_torch, result.device, fp8.Fp8RowFast(result.device), m, n, k),
                ),
            }
            for kernel in few_kernels(result.device):
                work = matrix_work(n, k, kernel.form, m)
                few_row(result, f"{label} {n}x{k} {kernel.form}", work, kernel, peers)
    for m in (1, 16):
        for kernel in (few_rows.Fp8Weight(result.device), few_rows.Dequant(result.device, "Q4_K")):
            pair = tuple(Value(name, (14336, 4096), kernel.form) for name in ("gate", "up"))
            node = make_node("gate_up_swiglu", "gate_up", Value("x", (m, 4096)), weight=pair)
            few_row(result, f"gate_up_swiglu {kernel.form}", Work("gate_up", node, Batch.of(m, 1)), kernel, {})


def few_kernels(device: Device) -> list[Any]:
    dequant = [few_rows.Dequant(device, form) for form in QUANTIZED]
    return [few_rows.Fp8Weight(device), fp8.Fp8RowFast(device), *dequant, few_rows.Bf16(device)]


def few_row(result: Result, label: str, work: Work, kernel: Any, peers: dict[str, Timing | None]) -> None:
    timing = result.timed(f"{kernel.name} {label} m={work.m}", work, kernel)
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
        "tiling": str(kernel.chosen(work.node)),
    }
    result.rows.append(row)
    print(*list(row.values())[:6], sep="|", flush=True)


def time_bf16(device: Device, m: int, n: int, k: int) -> Timing:
    x = torch.randn(m, k, device=device.torch, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=device.torch, dtype=torch.bfloat16) for _ in range(copies(2 * n * k, device))]
    return time_launches([partial(torch.mm, x, weight.t()) for weight in weights], device)


def tune(result: Result, specialized: bool) -> None:
    """Every tiling; the best of each shape goes into the table that is shipped."""
    choices: dict[str, str] = {}
    for kernel, node in tuned(result.device):
        shape = str(kernel.shape(node))
        if shape in choices:
            continue
        tilings = [t for t in kernel.tilings(node) if specialized or not getattr(t, "specialized", False)]
        kernels = result.attempt(shape, partial(alike, result, shape, [retiled(kernel, t) for t in tilings], node))
        times = result.attempt(shape, partial(measure, node, kernels)) if kernels else None
        torch.cuda.empty_cache()
        found = {str(k.tiling): t for k, t in zip(kernels or (), times or (), strict=True) if t is not None}
        if not found:
            continue
        choices[shape] = min(found, key=lambda name: found[name])
        result.rows.append({"shape": shape, "best": choices[shape], **{k: round(t, 2) for k, t in found.items()}})
    path = Path(kernelmux_triton.__file__).parent / "tunings" / f"{card(result.device)}.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {"cards": [], "choices": {}}
    cards = list(dict.fromkeys([*kept["cards"], result.device.name]))
    path.write_text(tuning.as_text(cards, {**kept["choices"], **choices}), "utf-8")
    print(f"{len(choices)} shapes in {path.name}", flush=True)


def tuned(device: Device) -> Iterator[tuple[Any, TensorNode]]:
    for n, k in LAYERS.values():
        for kernel in few_kernels(device):
            for m in (1, 4, 16, 64):
                yield kernel, matrix_work(n, k, kernel.form, m).node
        for made in SCALED:
            for m in (128, 512, 2048):
                yield made(device), matrix_work(n, k, made.form, m).node
    m, n, k = BLOCKS
    yield fp8.Fp8Block(device), matrix_work(n, k, fp8.Fp8Block.form, m).node
    for kernel in (few_rows.Fp8Weight(device), few_rows.Dequant(device, "Q4_K"), fp8.Fp8RowFast(device)):
        for m in (1, 16, 512) if isinstance(kernel, fp8.Fp8Row) else (1, 16):
            pair = tuple(Value(name, (14336, 4096), kernel.form) for name in ("gate", "up"))
            yield kernel, make_node("gate_up_swiglu", "gate_up", Value("x", (m, 4096)), weight=pair)


def alike(result: Result, shape: str, kernels: list[Any], node: TensorNode) -> list[Any]:
    """The kernels whose numbers are those of most: each is launched once on the same operands."""
    device, first = result.device, kernels[0]
    node = stored_as(node, first, "bf16")
    weights = random_weights([Work("tune", node, Batch.of(1, 1))], device).get(node, f"triton:{first.name}", first)
    generator = torch.Generator(device.torch).manual_seed(0)
    x = random_planes(node.inputs[0].format, node.inputs[0].extents, generator, 1.0)

    def bound(kernel: Any) -> Any:
        y, nbytes = empty_planes(node.outputs[0], device.torch), kernel.workspace(node)
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=device.torch) if nbytes else None
        tensors = Tensors((as_planes(x),), (as_planes(y),), weights, scratch)
        what = f"{shape}, {kernel.tiling}"
        return what, y[0], result.attempt(what, lambda: kernel.bind(node, tensors, None))

    # Compiled several at a time.
    with ThreadPoolExecutor(THREADS) as pool:
        every = list(pool.map(bound, kernels))
    found = {}
    for kernel, (what, y, launch) in zip(kernels, every, strict=True):
        if launch and result.attempt(what, lambda launch=launch: (launch(), torch.cuda.synchronize())):
            found[kernel.tiling] = y.float()
    if not found:
        return []
    median = torch.stack(list(found.values())).median(dim=0).values
    kept = []
    for kernel in kernels:
        if kernel.tiling in found:
            error = float((found[kernel.tiling] - median).square().sum() / median.square().sum())
            if error <= ALIKE:
                kept.append(kernel)
            else:
                result.notes.append(f"{shape}, {kernel.tiling}: NMSE {error:.2g} against the other tilings.")
                print("!", result.notes[-1], flush=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("fp8", "few-rows", "tune"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--commit", default="", help="where the tree is no checkout")
    parser.add_argument("--specialized", action="store_true", help="also tilings whose loads have a warp of their own")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    device = find_device("cuda")
    ceilings = measure_ceilings(device)
    parts = {"fp8": fp8_gemms, "few-rows": few, "tune": partial(tune, specialized=asked.specialized)}
    titles = {"fp8": "e4m3 products", "few-rows": "products of few rows", "tune": "tilings"}
    for name in asked.parts:
        result, started = Result(device, ceilings), time.perf_counter()
        parts[name](result)
        gemm = ", ".join(f"{format} {rate / 1e12:.0f} TFLOP/s" for format, rate in ceilings.gemm.items())
        said = f"In the same run: read {ceilings.read / 1e12:.2f} TB/s, 8192^3 GEMM {gemm}."
        method = "CUDA graphs replayed, operands rotated past the L2 cache; medians of 40 replays a launch"
        report = make_report(
            f"Triton: {titles[name]}", device, method, result.rows, [said, *result.notes], asked.commit
        )
        path = asked.out / f"{card(device)}-triton-{name}.json"
        save_report(report, path)
        print(
            f"[{name}] {time.perf_counter() - started:.0f} s, {len(result.rows)} rows, {len(result.notes)} notes", said
        )


if __name__ == "__main__":
    main()

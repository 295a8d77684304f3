"""torch's GEMMs, and Triton between them, on a CUDA card beside transformers; writes CARD-PART.json for each part.

    python tests/bench/torch_cuda.py --out docs/results fp8 llama-8b llama-1b

`fp8`: fp8 mul_mats of an 8B llama, and torch's own call on the same kind of operands; quantising the activations.
`llama-8b`, `llama-1b`: random models, prompts and decoding, and transformers' LlamaForCausalLM with random weights
(a prompt eager; decoding with StaticCache and torch.compile's reduce-overhead), one after another in this process.
`--small` runs every part on sizes that a CPU can bear, to try the script. A measurement that fails is a note in the
result, and leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers_llama
from peers import fp8_calls
from result import Result, arguments

from kernelmux.contract import registry
from kernelmux.contract.device import Device, find_device
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.ops import OpTiming, copies, find_kernels, random_weights, time_kernel
from kernelmux.measure.timing import Timing, time_launches
from kernelmux.measure.works import Work, convert_work, matrix_work
from kernelmux.models.random import SHAPES, Sizes
from kernelmux.run.bench import Load, ModelTiming, time_model
from kernelmux.run.model import load_random

POLICIES = Path(__file__).parents[2] / "examples" / "policies"
LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
ROWS = (512, 2048)
READING = (
    "\"torch's speed\" is torch's time over the kernel's; copying is an elementwise kernel that moves as many bytes as "
    "quantising. fp8_tensor reads its input twice, which is counted once: by the bytes that it moves it runs at 1.67 "
    "times the shares given."
)
TURNS = 3
"""Times that a kernel and torch's call are each measured."""
PROMPT, CONTEXT, DECODE = 2048, 512, 128


# fp8 ------------------------------------------------------------------------------------------------------------------


def measure_fp8(result: Result, small: bool) -> None:
    """A row for each layer, row count and fp8 kernel."""
    layers = {"o": (256, 256)} if small else LAYERS
    for label, (n, k) in layers.items():
        for m in (64,) if small else ROWS:
            quantised = {
                format: result.attempt(f"quantise {m}x{k} to {format}", partial(time_quantising, result, m, k, format))
                for format in ("fp8_tensor", "fp8_row", "fp8_block")
            }
            work = matrix_work(n, k, "bf16", m)
            kernels, declined = find_kernels(work, registry.current(), result.device)
            refused = {name: no for name, no in declined.items() if name.startswith("torch:fp8")}
            result.notes += [f"{name} declines: {no.reason}." for name, no in refused.items()]
            for name, kernel in kernels.items():
                if name.startswith("torch:fp8"):
                    what = f"{name} {label} m={m}"
                    row = result.attempt(what, partial(fp8_row, result, label, work, name, kernel, quantised))
                    result.rows += [row] if row else []
    result.notes += [READING]


def time_quantising(result: Result, m: int, k: int, format: str) -> OpTiming:
    """bf16 to fp8, in Triton where it runs."""
    work = convert_work(k, format, m)
    kernels, declined = find_kernels(work, registry.current(), result.device)
    found = min(kernels, key=lambda name: not name.startswith("triton:"), default=None)
    if found is None:
        raise LookupError(f"no kernel converts to {format}: {declined}")
    return time_kernel(work, found, kernels[found], random_weights([work], result.device), "bf16")


def fp8_row(
    result: Result, label: str, work: Work, name: str, kernel: Any, quantised: dict[str, OpTiming | None]
) -> dict[str, Any]:
    n, k = work.node.weight[0].extents
    scheme, fast = name.partition(":")[2].removesuffix("_fast"), name.endswith("_fast")
    weights = random_weights([work], result.device)
    calls = fp8_calls(result.device, scheme, fast, work.m, n, k)
    # In turns: a card that is busy for longer runs at a lower clock, whoever keeps it so.
    turns = [
        (time_kernel(work, name, kernel, weights, "bf16").timing, time_launches(calls, result.device))
        for _ in range(TURNS)
    ]
    ours, raw = (sorted(timings, key=lambda timing: timing.median)[TURNS // 2] for timings in zip(*turns, strict=True))
    rate = work.flops / ours.median * 1e6
    row = {
        "layer": f"{label} {n}x{k}",
        "m": work.m,
        "kernel": name,
        "us": round(ours.median, 1),
        "p10 to p90": [round(ours.p10, 1), round(ours.p90, 1)],
        "torch alone us": round(raw.median, 1),
        "torch's speed": round(raw.median / ours.median, 3),
        "TFLOP/s": round(rate / 1e12, 1),
        "% of fp8 GEMM": round(100 * rate / result.ceilings.gemm["fp8"], 1) if "fp8" in result.ceilings.gemm else "",
    }
    before = quantised.get(scheme)
    if before is None:
        return row | {"quantise us": "", "copy us": "", "% of copy": "", "% of copy ceiling": "", "both us": ""}
    moved = before.work.nbytes(before.node)
    copied = time_copying(result.device, moved)
    return row | {
        "quantise us": round(before.timing.median, 1),
        "copy us": round(copied.median, 1),
        "% of copy": round(100 * copied.median / before.timing.median, 1),
        "% of copy ceiling": round(100 * moved / before.timing.median * 1e6 / result.ceilings.copy, 1),
        "both us": round(before.timing.median + ours.median, 1),
    }


@cache
def time_copying(device: Device, nbytes: int) -> Timing:
    """A copy that reads half of `nbytes` and writes the other half."""
    pairs = [[torch.zeros(nbytes // 8, device=device.torch) for _ in range(2)] for _ in range(copies(nbytes, device))]
    # An elementwise kernel: at these sizes faster than cudaMemcpy.
    return time_launches([partial(torch.neg, source, out=target) for source, target in pairs], device)


# Models ---------------------------------------------------------------------------------------------------------------


def measure_models(result: Result, shape: str, policies: list[str], small: bool) -> None:
    """Rows of prompt and decoding for each policy, beside transformers on the same sizes."""
    prompt, context, decode = (64, 16, 8) if small else (PROMPT, CONTEXT, DECODE)
    peer = {}
    for work, length, steps in (("prompt", prompt, 0), ("decode", context, decode)):
        measure = partial(transformers_llama.measure, work, SHAPES[shape], result.device, length, steps)
        peer[work] = result.attempt(f"transformers, {work}", measure)
    load = Load(prompt=prompt, context=context, batch=1, decode=decode)
    for policy in policies:
        path = None if policy == "default" else POLICIES / f"{policy}.toml"
        timed = result.attempt(f"kernelmux, {policy}", partial(time_ours, shape, path, load, result.device))
        if timed is not None:
            result.rows += model_rows(result, shape, policy, timed, peer)
            memory = ", ".join(f"{name} {nbytes / 1e9:.2f} GB" for name, nbytes in timed.memory.items())
            python = f"; Python takes {timed.host.median:.0f} us a step" if timed.host else ""
            result.notes.append(f"{policy}: {memory}{python}.")
    if not result.rows:
        measured = {work: timing.median for work, timing in peer.items() if timing is not None}
        result.notes += [f"transformers bf16, {work}: {median:.0f} us." for work, median in measured.items()]


def time_ours(shape: str, policy: Path | None, load: Load, device: Device) -> ModelTiming:
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = load_random(f"{shape}:bf16", device.torch)
    plan = model.plan(policy, device=device.torch, max_rows=max(load.prompt, load.batch))
    return time_model(model, plan, load)


def model_rows(
    result: Result, shape: str, policy: str, timed: ModelTiming, peer: dict[str, Timing | None]
) -> Iterator[dict[str, Any]]:
    load, sizes = timed.load, SHAPES[shape]
    # A step reads every matrix once, of the token table one row.
    read = 2 * (parameters(sizes) - (0 if sizes.tied else sizes.vocab * sizes.hidden))
    for work, ours, tokens in (
        ("prompt", timed.prefill, load.prompt),
        ("decode", timed.decode, load.batch),
    ):
        theirs = peer[work]
        rates = [tokens / microseconds * 1e6 for microseconds in (ours.median, ours.p90, ours.p10)]
        share = read / ours.median * 1e6 / result.ceilings.read
        yield {
            "work": f"prompt of {load.prompt}" if work == "prompt" else f"decode, batch 1, context {load.context}",
            "policy": policy,
            "unit": "tokens/s",
            "kernelmux": round(rates[0], 1),
            "p10 to p90": [round(rates[1], 1), round(rates[2], 1)],
            "% of reading bf16": round(100 * share, 1) if work == "decode" else "",
            "launches": timed.launches if work == "decode" else "",
            "transformers bf16": round(tokens / theirs.median * 1e6, 1) if theirs else "",
            "ratio": round(theirs.median / ours.median, 2) if theirs else "",
        }


def parameters(sizes: Sizes) -> int:
    """How many weights the matrices have."""
    kv = sizes.hidden // sizes.heads * sizes.kv_heads
    layer = sizes.hidden * (2 * sizes.hidden + 2 * kv + 3 * sizes.feed_forward)
    return sizes.layers * layer + (1 if sizes.tied else 2) * sizes.vocab * sizes.hidden


def main() -> None:
    parts = {
        "fp8": ("fp8 mul_mat of an 8B llama, beside torch's own call", None, []),
        "llama-8b": ("8B llama, random weights, beside transformers", "llama-8b", ["cuda-bf16", "cuda-fp8"]),
        "llama-1b": ("1B llama, random weights, beside transformers", "llama-1b", ["cuda-bf16"]),
    }
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    asked = parser.parse_args()
    device = find_device(asked.device)
    ceilings = measure_ceilings(device, *((2**20, 64) if asked.small else ()))
    for name in asked.parts:
        title, shape, policies = parts[name]
        if asked.small:
            title, policies = f"{title}, tried on small sizes", ["default"]
        result = Result(name, title, device, ceilings)
        if shape is None:
            measure_fp8(result, asked.small)
        else:
            result.method = (
                f"medians of whole prompts, and of rounds of {DECODE} steps; one after another in one process"
            )
            measure_models(result, "tiny" if asked.small else shape, policies, asked.small)
        result.write(asked.out, asked.commit)


if __name__ == "__main__":
    main()

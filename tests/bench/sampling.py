"""What drawing a token costs beside the rest of a step: the session's way, its parts, and ways that were considered.

    python tests/bench/sampling.py [--device cuda] [--rows 1,32] [--vocab 128256]

Microseconds of one drawing of all rows, captured in a graph where the device captures. "same" tells whether a way gave
the ids of the session's; a part gives none.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernelmux.contract.device import Device, find_device
from kernelmux.measure.timing import time_launches
from kernelmux.run import drawing
from kernelmux.run.drawing import Rows, draw_of_likeliest, draw_sorted
from kernelmux.run.sampling import Sampling

SETTINGS = (
    Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1),
    Sampling(temperature=1.0),
    Sampling(temperature=1.2, top_k=50, min_p=0.05),
)
BITS = 16
"""Of the distances' float32 numbers that one histogram tells apart: two find any."""
Draw = Callable[[torch.Tensor, Rows], torch.Tensor]


def unstable(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Ties in whatever order torch.sort gives."""
    return drawing._drawn(*logits.sort(dim=1, descending=True), rows)


def in_float32(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Weights and sums in float32."""
    narrow = {name: column.float() for name, column in rows._asdict().items() if name != "last"}
    return draw_sorted(logits, rows._replace(**narrow))


def by_topk(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """1,024 candidates and the whole's weight: exact only where they reach; else the host had to draw again."""
    values, ids = logits.topk(drawing.CANDIDATES, dim=1)
    whole = drawing._below(logits, values[:, :1], rows).neg_().exp_().sum(dim=1, keepdim=True)
    sums, near = drawing._weigh(values, rows)
    last = drawing._last_kept(sums, near, whole, rows).clamp_(max=drawing.CANDIDATES - 1)
    return ids.gather(1, drawing._place(sums, last, sums.gather(1, last), rows))


def by_histograms(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Without sorting: which distance from the likeliest the sums of weights reach a bound at, half its bits at a time.

    As exact as sorting for `top_p`, and it draws in the same order, except that equal logits are drawn by no order; it
    has no `top_k` and no `min_p`, which would take histograms of counts too, so that it is a lower bound.
    """
    below = drawing._below(logits, logits.amax(dim=1, keepdim=True), rows)
    weights = below.neg().exp_()
    keys = below.float().view(torch.int32)
    high = (keys >> BITS).long()
    sums = _histogram(high, weights)
    whole = sums[:, -1:].clone()
    kept = _reached(sums, high, keys, weights, whole * rows.top_p)[1]
    key, _ = _reached(sums, high, keys, weights, kept * rows.uniform)
    return (keys == key).int().argmax(dim=1, keepdim=True)


def _histogram(bins: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Running sums of the weights over the bins."""
    return weights.new_zeros(len(bins), 1 << BITS).scatter_add_(1, bins, weights).cumsum(dim=1)


def _reached(
    sums: torch.Tensor, high: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, bound: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key at which the sums reach a bound, and the sum with all of that key."""
    first = torch.searchsorted(sums, bound).clamp_(max=(1 << BITS) - 1)
    here = high == first
    before = torch.where(first > 0, sums.gather(1, (first - 1).clamp_(min=0)), 0)
    fine = _histogram((keys & ((1 << BITS) - 1)).long(), weights * here)
    second = torch.searchsorted(fine, bound - before).clamp_(max=(1 << BITS) - 1)
    return ((first << BITS) | second).int(), before + fine.gather(1, second)


def by_pow(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """One scan a row, and weights as powers of 1/e: a launch less than negating, then exp."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    below = drawing._below(values, values[:, :1], rows)
    near = torch.searchsorted(below, rows.reach, right=True) - 1
    sums = torch.pow(math.exp(-1), below).cumsum(dim=1)
    last = drawing._last_kept(sums, near, sums.gather(1, rows.last), rows)
    return ids.gather(1, drawing._place(sums, last, sums.gather(1, last), rows))


def one_scan(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Running sums by torch's scan alone, however many rows there are."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    below = drawing._below(values, values[:, :1], rows)
    near = torch.searchsorted(below, rows.reach, right=True) - 1
    sums = below.neg_().exp_().cumsum(dim=1)
    last = drawing._last_kept(sums, near, sums.gather(1, rows.last), rows)
    return ids.gather(1, drawing._place(sums, last, sums.gather(1, last), rows))


def by_factors(logits: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The penalty from two float32 factors of each token instead of a mask, which marking would have to write."""
    return torch.nn.functional.prelu(logits.view(1, -1), factors[0].view(-1)).view_as(logits) * factors[1]


def ways(device: Device) -> Iterator[tuple[str, Draw]]:
    yield "sorted, stable, float64 (captured decoding)", draw_sorted
    yield "sorted, not stable", unstable
    yield "sorted, float32", in_float32
    yield "sorted, one scan a row", one_scan
    yield "sorted, one scan a row, pow instead of exp", by_pow
    yield "topk, exact where it reaches", by_topk
    yield "histograms, top_p alone", by_histograms
    if not device.platform.captures:
        yield "of the likeliest (eager decoding)", draw_of_likeliest


def parts(logits: torch.Tensor, rows: Rows) -> Iterator[tuple[str, Callable[[], object]]]:
    seen = torch.zeros_like(logits, dtype=torch.bool)
    values = logits.sort(dim=1, descending=True, stable=True).values
    below = drawing._below(values, values[:, :1], rows)
    sums = drawing._running_sums(-below)
    last = rows.last * 0
    factors = torch.ones(2, *logits.shape, device=logits.device)
    yield "argmax (greedy decoding)", lambda: logits.argmax(dim=-1)
    yield "part: penalty", lambda: drawing._penalised(logits, rows.penalty, seen)
    yield "part: penalty, by factors of 8 bytes a token", lambda: by_factors(logits, factors)
    yield "part: mark as seen", lambda: seen.scatter_(1, last, True)
    yield "part: sort", lambda: logits.sort(dim=1, descending=True, stable=True)
    yield "part: weights", lambda: drawing._below(values, values[:, :1], rows).neg_().exp_()
    yield "part: weights and running sums", lambda: drawing._weigh(values, rows)
    yield "part: what is kept", lambda: drawing._last_kept(sums, last, sums.gather(1, rows.last), rows)
    yield "part: the place", lambda: drawing._place(sums, last, sums.gather(1, last), rows)
    yield "one elementwise launch", lambda: logits + 1


def measure(count: int, vocab: int, device: Device) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = (torch.randn(count, vocab, generator=generator) * 3).to(device.torch)
    samplers = [SETTINGS[row % len(SETTINGS)] for row in range(count)]
    rows = Rows.of([sampling.sampler() for sampling in samplers], vocab).to(device.torch)
    wanted = draw_sorted(logits, rows)
    print(f"\n{count} x {vocab}, {device.name}")
    whole = partial(_whole, logits, rows, torch.zeros_like(logits, dtype=torch.bool))
    for name, call in [("the whole: penalty, drawing, marking", whole), *parts(logits, rows)]:
        _tell(name, call, "", device)
    for name, draw in ways(device):
        same = int((draw(logits, rows) == wanted).sum())
        _tell(name, partial(draw, logits, rows), f"same {same} of {count}", device)


def _whole(logits: torch.Tensor, rows: Rows, seen: torch.Tensor) -> None:
    seen.scatter_(1, draw_sorted(drawing._penalised(logits, rows.penalty, seen), rows), True)


def _tell(name: str, call: Callable[[], object], note: str, device: Device) -> None:
    try:
        found = f"{time_launches([call], device, device.platform.captures).median:10.1f} us"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    print(f"{name:45} {found}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--vocab", type=int, default=128_256)
    asked = parser.parse_args()
    for count in map(int, asked.rows.split(",")):
        measure(count, asked.vocab, find_device(asked.device))


if __name__ == "__main__":
    main()

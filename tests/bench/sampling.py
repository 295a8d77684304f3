"""What drawing a token costs beside the rest of a step: the whole by settings, its parts, and ways considered.

    python tests/bench/sampling.py [--device cuda] [--rows 1,32] [--vocab 128256]

Microseconds of one drawing of all rows, captured in a graph where the device captures. The whole is all that a step of
a session launches to draw, and one launch of a single number more. "same" tells how many rows got the session's ids,
and "off by" the largest difference to its weights, of which all of a row's are at least 1; a part has neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernelmux.contract.device import Device, find_device
from kernelmux.measure.timing import time_launches
from kernelmux.run import drawing, nucleus
from kernelmux.run.drawing import Drawing
from kernelmux.run.nucleus import BLOCK, Rows, Way
from kernelmux.run.sampling import DRAWS, Sampling

SETTINGS = {
    "temperature 0.8": [Sampling(temperature=0.8)],
    "and top_p 0.9": [Sampling(temperature=0.8, top_p=0.9)],
    "and min_p 0.05": [Sampling(temperature=0.8, top_p=0.9, min_p=0.05)],
    "and repetition_penalty 1.1": [Sampling(temperature=0.8, top_p=0.9, min_p=0.05, repetition_penalty=1.1)],
    "temperature 0.8, min_p 0.05": [Sampling(temperature=0.8, min_p=0.05)],
    "temperature 0.8, top_k 50 (sorted)": [Sampling(temperature=0.8, top_k=50)],
    "temperature 0.8, top_p 0.5 (sorted)": [Sampling(temperature=0.8, top_p=0.5)],
    "a mixed batch": [Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=0.8, top_k=50, top_p=0.9)],
}
BAG = 32
"""Tokens whose weights one group of threads adds up, of `embedding_bag`."""
Above = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# Ways to weigh what is likelier than each candidate, as `nucleus._weight_above` does.


def by_product(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """The mask times the weights, instead of a choice."""
    masks = logits[:, None] > likely[:, :, None]
    return (masks * weights[:, None]).view(*likely.shape, -1, BLOCK).sum(dim=3).sum(dim=2)


def in_float32(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Weights rounded to float32, sums in float64: half the bytes, and a border that is off by 1e-8."""
    masks = logits[:, None] > likely[:, :, None]
    blocks = torch.where(masks, weights.float()[:, None], 0).view(*likely.shape, -1, BLOCK)
    return blocks.sum(dim=3, dtype=torch.float64).sum(dim=2)


def by_float_masks(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """A mask in float64, then products of small matrices, a block of tokens each."""
    masks = weights.new_empty(*likely.shape, logits.shape[1])
    torch.gt(logits[:, None], likely[:, :, None], out=masks)
    blocks = masks.view(*likely.shape, -1, BLOCK).transpose(1, 2).flatten(0, 1)
    return blocks.bmm(weights.view(-1, BLOCK, 1)).view(len(logits), -1, likely.shape[1]).sum(dim=1)


def by_ranks(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Each token's place among the sorted candidates, and the weights of each place by `embedding_bag`."""
    count = likely.shape[1]
    values, order = likely.sort(dim=1)
    ranks = torch.searchsorted(values, logits, out_int32=True)
    table = torch.ones(count + 1, count, dtype=weights.dtype, device=weights.device).tril_(-1)
    bag = partial(torch.nn.functional.embedding_bag, mode="sum")
    sums = bag(ranks.view(-1, BAG), table, per_sample_weights=weights.view(-1, BAG)).view(len(logits), -1, count)
    return torch.empty_like(sums[:, 0]).scatter_(1, order, sums.sum(dim=1))


def in_one_sum(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """One reduction a candidate, instead of one a block and one of these."""
    return torch.where(logits[:, None] > likely[:, :, None], weights[:, None], 0).sum(dim=2)


def halving(logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Four candidates a row one after another, as a search for the least likely that is kept would weigh them."""
    found = [nucleus._weight_above(logits, weights, likely[:, index : index + 1]) for index in (8, 4, 2, 1)]
    return torch.cat(found, dim=1).repeat(1, DRAWS // 4)


def few_at_once(nbytes: int, logits: torch.Tensor, weights: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    usual, nucleus.AT_ONCE = nucleus.AT_ONCE, nbytes
    try:
        return nucleus._weight_above(logits, weights, likely)
    finally:
        nucleus.AT_ONCE = usual


ABOVE: dict[str, Above] = {
    "where, float64 (the session's)": nucleus._weight_above,
    "mask times weights": by_product,
    "where, float32, sums in float64": in_float32,
    "float64 masks and bmm": by_float_masks,
    "ranks and embedding_bag": by_ranks,
    "where, one sum": in_one_sum,
    "where, four of them in a row (a search)": halving,
    "where, 16 MB at once": partial(few_at_once, 2**24),
    "where, 128 MB at once": partial(few_at_once, 2**27),
    "where, 1 GB at once": partial(few_at_once, 2**30),
}


# Ways to sort.


def unstable(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """Ties in whatever order torch.sort gives."""
    return nucleus._drawn(*logits.sort(dim=1, descending=True), rows, uniforms)


def by_topk(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> torch.Tensor:
    """1,024 candidates and the whole's weight: exact only where they reach; else the host had to draw again."""
    values, ids = logits.topk(nucleus.CANDIDATES, dim=1)
    whole = nucleus._exponents(logits, values[:, :1], rows).exp_().sum(dim=1, keepdim=True)
    sums, near = nucleus._weigh(values, rows)
    last = nucleus._last_kept(sums, near, whole, rows).clamp_(max=nucleus.CANDIDATES - 1)
    return ids.gather(1, nucleus._place(sums, last, uniforms))


def wholes(logits: torch.Tensor, device: Device) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "greedy: argmax", lambda: logits.argmax(dim=-1)
    for name, settings in SETTINGS.items():
        samplings = [settings[row % len(settings)] for row in range(len(logits))]
        way = Way.of(samplings if len(logits) > 1 else settings)
        assert way is not None
        whole = Drawing(*logits.shape, device)
        whole.start([sampling.sampler() for sampling in samplings])
        whole.send()
        yield name, partial(_draw, whole, logits, way)


def _draw(whole: Drawing, logits: torch.Tensor, way: Way) -> None:
    # A session does this every so many steps.
    whole._step.zero_()
    whole.draw(logits, way)


def parts(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    assert rows.penalty is not None
    assert rows.top_p is not None
    assert rows.least is not None
    penalty, top_p, least = rows.penalty, rows.top_p, rows.least
    seen = torch.zeros_like(logits, dtype=torch.bool)
    numbers, step = uniforms[:, None].repeat(1, drawing.NUMBERS_AHEAD, 1), torch.zeros_like(rows.last[0])
    padded = nucleus._padded(logits)
    largest = padded.amax(dim=1, keepdim=True)
    exponents = nucleus._exponents(padded, largest, rows)
    weights = exponents.exp()
    sums = nucleus._running_sums(weights)
    ids = torch.searchsorted(sums, sums[:, -1:] * uniforms, right=True).clamp_(max=logits.shape[1] - 1)
    above = nucleus._weight_above(padded, weights, padded.gather(1, ids))
    yield "one elementwise launch", lambda: largest + 1
    yield "this step's numbers", lambda: (numbers.index_select(1, step), step.add_(0))
    yield "penalty", lambda: drawing._penalised(logits, penalty, seen)
    yield "mark as seen", lambda: seen.scatter_(1, rows.last, True)
    yield "padding", lambda: nucleus._padded(logits)
    yield "maximum, of blocks", lambda: nucleus._in_blocks(padded).amax(dim=2).amax(dim=1, keepdim=True)
    yield "maximum, at once", lambda: padded.amax(dim=1, keepdim=True)
    yield "weights", lambda: nucleus._exponents(padded, largest, rows).exp_()
    yield "running sums, of blocks", lambda: nucleus._running_sums(weights)
    yield "running sums, one scan a row", lambda: weights.cumsum(dim=1)
    yield "min_p", lambda: weights.masked_fill_(exponents < least, 0)
    yield "the whole beside it", lambda: nucleus._in_blocks(weights).sum(dim=2).sum(dim=1, keepdim=True)
    yield "candidates", lambda: torch.searchsorted(sums, sums[:, -1:] * uniforms, right=True).clamp_(max=1)
    yield "their logits", lambda: padded.gather(1, ids)
    yield "the first that is kept", lambda: _first_kept(above, top_p, sums[:, -1:], ids)
    values = logits.sort(dim=1, descending=True, stable=True).values
    running, near = nucleus._weigh(values, rows)
    last = rows.last * 0
    yield "sorted: sort", lambda: logits.sort(dim=1, descending=True, stable=True)
    yield "sorted: weights and running sums", lambda: nucleus._weigh(values, rows._replace(least=None))
    yield "sorted: with min_p", lambda: nucleus._weigh(values, rows)
    yield "sorted: what is kept", lambda: nucleus._last_kept(running, near, running.gather(1, rows.last), rows)
    yield "sorted: the place", lambda: nucleus._place(running, last, uniforms)


def _first_kept(above: torch.Tensor, top_p: torch.Tensor, whole: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    excess = torch.addcmul(above, top_p, whole, value=-1).clamp_(min=-nucleus.TINY)
    return ids.gather(1, excess.argmin(dim=1, keepdim=True))


def measure(count: int, vocab: int, device: Device) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = (torch.randn(count, vocab, generator=generator) * 3).to(device.torch)
    settings = Sampling(temperature=0.8, top_p=0.9, min_p=1e-5, repetition_penalty=1.1)
    rows = Rows.of([settings] * count, vocab).to(device.torch)
    uniforms = torch.rand(count, DRAWS, dtype=torch.float64, generator=generator).to(device.torch)
    print(f"\n{count} x {vocab}, {device.name}")
    for name, call in wholes(logits, device):
        _tell(f"whole: {name}", call, "", device)
    for name, call in parts(logits, rows, uniforms):
        _tell(f"part: {name}", call, "", device)
    padded = nucleus._padded(logits)
    ids, weights, _ = nucleus._candidates(padded, rows._replace(least=None), uniforms, vocab - 1)
    likely = padded.gather(1, ids)
    wanted = nucleus._weight_above(padded, weights, likely)
    for name, above in ABOVE.items():
        off = 0.0 if above is halving else float((above(padded, weights, likely) - wanted).abs().max())
        _tell(f"likelier: {name}", partial(above, padded, weights, likely), f"off by {off:.0e}", device)
    by_sorting = nucleus.draw_sorted(logits, rows, uniforms)
    for name, draw in {"stable": nucleus.draw_sorted, "not stable": unstable, "topk alone": by_topk}.items():
        same = int((draw(logits, rows, uniforms) == by_sorting).sum())
        _tell(f"sorted: {name}", partial(draw, logits, rows, uniforms), f"same {same} of {count}", device)


def _tell(name: str, call: Callable[[], object], note: str, device: Device) -> None:
    try:
        found = f"{time_launches([call], device, device.platform.captures).median:10.1f} us"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    print(f"{name:50} {found}  {note}", flush=True)


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

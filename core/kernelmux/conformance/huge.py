"""Cases whose offsets pass 2^31 elements and bytes: a small case, spread over memory that takes a card.

Enters: an op's case. Leaves: a case marked `huge`, and its Outcome. The truth is the small case's, so that nothing
takes 8 bytes an element: of a weight's rows the first ones come again and again, and so do the outputs that they make;
of a cache few pages hold anything, and these lie far apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.guarded import POISONS
from kernelmux.conformance.outcome import Outcome
from kernelmux.conformance.trial import CACHED, Trial
from kernelmux.contract.answers import bound, checked_workspace
from kernelmux.contract.device import Device
from kernelmux.contract.kernel import Kernel, Tensors
from kernelmux.graph.formats import Value, Weight, as_planes, dequantize_planes, empty_planes, human_bytes, lookup
from kernelmux.graph.graph import TensorNode
from kernelmux.graph.ops import OPS, Case

LIMIT = 2**31
"""What a signed offset of 32 bits counts."""
PERIOD = 1152
"""Rows of a weight after which they come again: whole blocks of 128, and offsets off by a power of two show."""
COLUMNS = 4096
WEIGHTS = ("bf16", "Q4_0", "Q8_0", "Q4_K", "fp8_row")
"""One with a byte or two an element, blocks and superblocks, and scales of its own."""
CACHES = ("bf16", "fp8_row")
MOST_PAGES = 64
"""Of the small case: of those with fewer the one with the most is taken."""
PAGED = ("copy", "rope_copy", "attention")


@dataclass(frozen=True, eq=False)
class Huge:
    """A case, and the small one whose numbers it has."""

    case: Case
    small: Case

    @property
    def nbytes(self) -> int:
        """Of inputs and weights, in the formats that the case states."""
        weights = (*self.case.fields.get("weight", ()), *self.case.inputs)
        return sum(value.nbytes for value in weights)


def huge_cases() -> Mapping[str, Huge]:
    """Every huge case, by its name."""
    return _made(LIMIT)


@cache
def _made(limit: int) -> Mapping[str, Huge]:
    return {huge.case.name: huge for huge in make_huge(limit)}


def make_huge(limit: int, columns: int = COLUMNS) -> Iterator[Huge]:
    """Cases whose weight or cache has more than `limit` elements, and more bytes."""
    for format in WEIGHTS:
        weight = Value("w", (PERIOD, columns), format)
        for m in (1, 64):
            product = Case(
                f"mul_mat-{format}-m{m}-huge-offsets", "mul_mat", (Value("x", (m, columns)),), {"weight": (weight,)}
            )
            yield _with_rows(product, limit)
        # The first rows, and by their turn the last ones.
        ids = torch.tensor([0, 1, PERIOD - 1, 577, 64], dtype=torch.int32)
        looked_up = {"ids": lambda generator, ids=ids: ids.clone()}
        table = replace(weight, name="table")
        asked = (Value("ids", (len(ids),), "i32"),)
        yield _with_rows(Case(f"embed-{format}-huge-offsets", "embed", asked, {"weight": (table,)}, looked_up), limit)
    for op in PAGED:
        of_op = list(OPS[op].cases())
        for format in CACHES:
            caches = [case for case in of_op if any(v.name == "k_cache" and v.format == format for v in case.inputs)]
            several = [case for case in caches if case.inputs[0].extents[0] > 1 and _pages_of(case) <= MOST_PAGES]
            if several:
                yield _with_pages(max(several, key=_pages_of), limit, f"{op}-{format}-huge-offsets")


def _pages_of(case: Case) -> int:
    return next(value.extents[0] for value in case.inputs if value.name.endswith("_cache"))


def _with_rows(small: Case, limit: int) -> Huge:
    (weight,) = small.fields["weight"]
    rows, columns = weight.extents
    least = max(limit, limit * math.prod(weight.extents) // weight.nbytes)
    many = rows * (least // (rows * columns) + 2)
    fields = {**small.fields, "weight": (replace(weight, shape=(many, columns)),)}
    return Huge(replace(small, fields=fields, marks=frozenset({"huge"})), small)


def _with_pages(small: Case, limit: int, name: str) -> Huge:
    def grown(value: Value) -> Value:
        if not value.name.endswith("_cache"):
            return value
        pages, *page = value.extents
        many = max(limit, limit * math.prod(value.extents) // value.nbytes) // math.prod(page) + 2 * pages
        return replace(value, shape=(many, *page))

    inputs = tuple(map(grown, small.inputs))
    return Huge(replace(small, name=name, inputs=inputs, marks=frozenset({"huge"})), small)


def run_huge(
    huge: Huge, kernel: Kernel, nodes: tuple[TensorNode, TensorNode], device: Device, blank: Outcome
) -> Outcome:
    """One launch held against the small case's truth; refused, with the reason, where memory does not suffice.

    `nodes` are the case's own and the small one's, as the kernel stores their values.
    """
    node, small = nodes
    free = device.platform.free_bytes(device)
    free = device.memory // 2 if free is None else free
    # The weights are there twice while they are packed, and a page that is compared is copied.
    needed = huge.nbytes + max(huge.nbytes, 2 * kernel.packed_bytes(node)) + 2**30 * (huge.nbytes > 2**30)
    needed += kernel.workspace(node) + sum(value.nbytes for value in node.outputs)
    if needed > free:
        said = f"it takes {human_bytes(needed)} of memory, of {device.torch} {human_bytes(free)} are free"
        return replace(blank, reason=said)
    drawn = draw_case(huge.small)
    trial = Trial(drawn.planes, [drawn.weights[v.name] for v in small.weights], small, kernel, device)
    weights = [_tiled(weight, value, device) for weight, value in zip(trial.weights, node.weights, strict=True)]
    inputs = _inputs(trial, node, huge)
    outputs = [empty_planes(value, device.torch) for value in node.outputs]
    for source, target in node.contract.updates:
        outputs[target] = inputs[source]
    for target, planes in enumerate(outputs):
        if target not in {updated for _, updated in node.contract.updates}:
            _poison(planes, POISONS[0])
    packed = kernel.prepare(weights, device)
    size = checked_workspace(kernel, node)
    host = [
        planes[0].cpu() if value.format == "i32" else None for value, planes in zip(node.inputs, inputs, strict=True)
    ]
    if device.platform.host_memory:
        host = [planes[0] if mirror is not None else None for mirror, planes in zip(host, inputs, strict=True)]
    tensors = Tensors(
        inputs=tuple(map(as_planes, inputs)),
        outputs=tuple(map(as_planes, outputs)),
        packed=packed,
        workspace=torch.empty(size, dtype=torch.uint8, device=device.torch) if size else None,
        host=tuple(host),
    )
    trial.synchronize()
    call = bound(kernel, node, tensors, trial.stream)
    trial.synchronize()
    call()
    trial.synchronize()
    return _judged(trial, node, outputs, blank)


def _tiled(weight: Weight, value: Value, device: Device) -> Weight:
    """The weight with its rows again and again, in the device's memory, as where a model is loaded."""
    planes = []
    for plane, own in zip(lookup(value.format).planes, weight.planes, strict=True):
        part = own.to(device.torch)
        rows = plane.shape(value.extents)[0] if len(value.extents) > 1 else len(part)
        planes.append(part if rows == len(part) else part[torch.arange(rows, device=part.device) % len(part)])
    return Weight(weight.name, value.extents, weight.format, tuple(planes))


def far_pages(few: int, many: int) -> torch.Tensor:
    """Where `few` pages lie among `many`: the even ones at the end, past the limit, the others far apart before it."""
    pages = torch.arange(few)
    return torch.where(pages % 2 == 0, many - 1 - pages, pages * ((many - few) // few))


def _pages(trial: Trial, node: TensorNode) -> tuple[torch.Tensor, int]:
    """Where the small case's pages lie, and rows of a page; nothing where the op has no cache."""
    for value, given in zip(node.inputs, trial.node.inputs, strict=True):
        if value.name.endswith("_cache"):
            return far_pages(given.extents[0], value.extents[0]), value.extents[1]
    return torch.empty(0, dtype=torch.int64), 1


def _inputs(trial: Trial, node: TensorNode, huge: Huge) -> list[tuple[torch.Tensor, ...]]:
    """The small case's inputs, its pages far apart, and all that points at rows or pages pointing there."""
    far, page_size = _pages(trial, node)
    updated = {source for source, _ in node.contract.updates}
    found: list[tuple[torch.Tensor, ...]] = []
    for index, (value, memory) in enumerate(zip(node.inputs, trial.inputs, strict=True)):
        (first, *_), moved = memory.parts, far.to(memory.parts[0].device)
        planes = memory.parts
        if value.name.endswith("_cache"):
            planes = empty_planes(value, trial.device.torch)
            # What is decoded and stored again stays the same, where it is a number.
            _poison(planes, CACHED if index in updated else POISONS[0])
            for plane, part in zip(planes, memory.parts, strict=True):
                _bytes(plane)[moved] = _bytes(part)
        elif value.name == "block_table":
            planes = (moved[first.long()].int(),)
        elif value.name == "slots":
            page = moved[first.clamp(min=0).long() // page_size]
            planes = (torch.where(first < 0, first, (page * page_size + first.clamp(min=0) % page_size).int()),)
        elif value.name == "ids":
            turns = node.weight[0].extents[0] // PERIOD
            planes = (first + PERIOD * torch.tensor([(turns - 1) * (i % 2) for i in range(len(first))]).to(first),)
        found.append(planes)
    return found


def _judged(trial: Trial, node: TensorNode, outputs: Sequence[tuple[torch.Tensor, ...]], blank: Outcome) -> Outcome:
    """The outcome: outputs of the small case's extents as they are, wider ones by turns, caches by their pages."""
    far, _ = _pages(trial, node)
    failures: list[str] = []
    outcome = replace(blank, status="pass")
    for index, (value, planes) in enumerate(zip(node.outputs, outputs, strict=True)):
        truth = trial.expected[index]
        if len(value.extents) == 4:
            moved = far.to(planes[0].device)
            kept = tuple(_bytes(plane)[moved] for plane in planes)
            for plane in planes:
                _bytes(plane)[moved] = CACHED
            if not all(bool((part == CACHED).all()) for plane in planes for part in torch.split(_bytes(plane), 4096)):
                failures.append(f"inputs: {value.name} was changed where nothing was to be written")
            planes = tuple(part.view(plane.dtype) for part, plane in zip(kept, planes, strict=True))
        elif value.extents != truth.shape:
            truth = truth[:, torch.arange(value.extents[1], device=truth.device) % truth.shape[1]]
        measured = trial.compare(index, dequantize_planes(value.format, planes, torch.double), truth)
        failures += measured.failures
        outcome = replace(outcome, error=measured.error, worst=measured.worst, bound=measured.bound)
    return replace(outcome, status="fail" if failures else "pass", failures=tuple(failures))


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    return plane.view(torch.uint8)


def _poison(planes: tuple[torch.Tensor, ...], pattern: int) -> None:
    for plane in planes:
        _bytes(plane).fill_(pattern)

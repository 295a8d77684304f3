"""One case on one kernel: bound to guarded, poisoned memory, launched, and held against the op's float64 reference.

Enters: a Case and a kernel's name. Leaves: an Outcome that names every check that failed. The kernel is bound as a walk
would bind it, so that what passes here runs in a plan.
"""

from __future__ import annotations

import math
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from kernelmux.conformance import checks, declared
from kernelmux.conformance.draw import LastDrawn
from kernelmux.conformance.huge import Huge, huge_cases, run_huge
from kernelmux.conformance.outcome import Outcome, share
from kernelmux.conformance.trial import Trial
from kernelmux.contract.answers import Offer, checked_formats, checked_variants, stored
from kernelmux.contract.device import Device, find_device, is_out_of_memory, out_of_memory
from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.contract.registry import Registry
from kernelmux.errors import KernelmuxError, contained, named, printable, where_raised
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import TensorNode, case_node
from kernelmux.graph.ops import Case, Fused
from kernelmux.graph.ops.drawn import MARK

ALL = "all"
"""The place of a variant that is about every value in question."""
MANY, FEW = 400, 3
"""How often a smoke case is launched, with other inputs and another binding by turns: one case in `EVERY`, the rest.

Two turns of three are one binding's: it is launched more often than a byte counts.
"""
EVERY = 20
THREADED = 20
"""One case in so many has all of torch's threads: most are so small that threads only wait for each other."""
_under_way_now: list[tuple[str, float]] = []
NUMBERS = LastDrawn()
"""Drawing a case, and its weights in float64, takes longer than a kernel's launches: kernels of one case share it."""


@dataclass(frozen=True)
class Variant:
    """A case with a value stored otherwise than usual: `inputs0`, `outputs1`, or `all` that may be."""

    place: str
    format: str

    def name(self, case: Case) -> str:
        """The case's name, with what is stored how: `add-m5-n576@outputs0=bf16`."""
        return f"{case.name}@{self.place}={self.format}"


def run_case(
    case: Case, kernel: str, registry: Registry, device: str = "cpu", variant: Variant | None = None, peer: str = ""
) -> Outcome:
    """Runs every check of a case on a kernel, `backend:kernel`.

    A kernel that misses its bound passes all the same where `peer`, another kernel, is no closer to float64.
    """
    node, target = case_node(case), find_device(device)
    name = case.name if variant is None else variant.name(case)
    weight_format = "+".join(dict.fromkeys(value.format for value in node.weight))
    blank = Outcome(name, case.op, kernel, weight_format, "refused", device=device, peer=peer)
    offer = registry.offer(node, target)
    found = _find(kernel, offer)
    if isinstance(found, Declined):
        return replace(blank, reason=found.reason)
    # Not before it is known that the kernel takes the case: numbers are most of a refused one's time.
    huge = huge_cases().get(case.name) if "huge" in case.marks else None
    with running(f"{kernel} {name}"):
        if huge:
            return _run_huge(huge, node, found, target, blank)
        with _few_threads(case, name):
            return _run_drawn(case, node, found, offer, registry, target, variant, blank)


def under_way() -> tuple[str, float]:
    """The kernel and the case that run now, `torch:f32 silu-m5-n1`, and since when (time.monotonic); "" where none."""
    return _under_way_now[-1] if _under_way_now else ("", 0.0)


@contextmanager
def running(name: str) -> Iterator[None]:
    """What is under way meanwhile, for whoever watches."""
    _under_way_now.append((name, time.monotonic()))
    try:
        yield
    finally:
        _under_way_now.pop()


def _run_drawn(
    case: Case,
    node: TensorNode,
    found: Kernel,
    offer: Offer,
    registry: Registry,
    target: Device,
    variant: Variant | None,
    blank: Outcome,
) -> Outcome:
    """The case's numbers drawn, and every check made."""
    kernel, peer = blank.kernel, blank.peer
    try:
        drawn = NUMBERS.draw(case)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return replace(blank, reason=out_of_memory("the host", error))
    try:
        # Untold the first, as in a plan that nothing was measured for.
        found.variant = next(iter(checked_variants(found, node).values()), None)
        weights = [drawn.weights[value.name] for value in node.weights]
        trial = Trial(drawn.planes, weights, _store(node, found, variant), found, target, once=drawn.once)
        declared.pure(trial, kernel.partition(":")[0], registry, node)
        declared.precision(trial)
        declared.symbols(trial)
        declared.packed_name(trial, kernel, _packers(node, offer, kernel, registry, target))
        allowed = _reach(run_case(case, peer, registry, blank.device, variant)) if peer else (0.0, 0.0)
        outcome = _check(trial, replace(blank, status="pass"), allowed, launches(case, blank.case))
    except BaseException as error:
        NUMBERS.forget()
        contained(error)
        return _raised(blank, error)
    if not outcome.failures:
        return outcome
    NUMBERS.forget()
    return replace(outcome, status="fail")


@contextmanager
def _few_threads(case: Case, name: str) -> Iterator[None]:
    """Torch with one thread, but for large cases and one in `THREADED`; by its name, so that alone it has as many."""
    before = torch.get_num_threads()
    if "large" not in case.marks and not _one_in(THREADED, name):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_in(count: int, name: str) -> bool:
    """Whether a case is one in so many; by its name, so that it is wherever and with whatever others it runs."""
    return zlib.crc32(name.encode()) % count == 0


def _raised(blank: Outcome, error: BaseException) -> Outcome:
    said, place = f"{error}" if isinstance(error, KernelmuxError) else named(error), where_raised(error)
    failure = f"raises: {printable(' '.join(said.split()))} ({place})"
    trace = printable("".join(traceback.format_exception(error)))
    return replace(blank, status="fail", failures=(failure,), trace=trace, raised=f"{type(error).__name__}, {place}")


def _run_huge(huge: Huge, node: TensorNode, kernel: Kernel, device: Device, blank: Outcome) -> Outcome:
    try:
        kernel.variant = next(iter(checked_variants(kernel, node).values()), None)
        nodes = _store(node, kernel, None), _store(case_node(huge.small), kernel, None)
        return run_huge(huge, kernel, nodes, device, blank)
    except BaseException as error:
        contained(error)
        # What a kernel takes beside what it states shows only here.
        return (
            replace(blank, reason=out_of_memory(device.torch, error))
            if is_out_of_memory(error)
            else _raised(blank, error)
        )


def _find(name: str, offer: Offer) -> Kernel | Declined:
    backend = name.partition(":")[0]
    nothing = Declined(f"{backend} does not offer {name} for this case")
    return offer.kernels.get(name) or offer.declined.get(name) or offer.declined.get(backend) or nothing


def _packers(node: TensorNode, offer: Offer, name: str, registry: Registry, device: Device) -> Mapping[str, Kernel]:
    """The backend's kernels that may pack this very node's weights: those offered for it, and for its plain parts."""
    found = dict(offer.kernels)
    for plain in node.contract.plain(node) if isinstance(node.contract, Fused) else ():
        if plain.weights and plain.weights == node.weights:
            found = {**registry.offer(plain, device).kernels, **found}
    return {other: kernel for other, kernel in found.items() if other.partition(":")[0] == name.partition(":")[0]}


def _reach(peer: Outcome) -> tuple[float, float]:
    """How far off a peer is: its NMSE, and its worst element; nothing where it has no number of its own."""
    reach = peer.error or 0.0, peer.worst or 0.0
    return reach if all(map(math.isfinite, reach)) else (0.0, 0.0)


def choices(node: TensorNode, kernel: Kernel) -> Mapping[str, Sequence[str]]:
    """The values of a node, as `inputs0`, that a kernel takes in several formats, and which."""
    # What the op updates is input and output at once: it has the format that the case states.
    kept = {f"inputs{source}" for source, _ in node.contract.updates}
    kept |= {f"outputs{target}" for _, target in node.contract.updates}
    sides = checked_formats(kernel, node)
    places = {f"{side}{index}": formats for side, listed in sides.items() for index, formats in enumerate(listed)}
    return {place: formats for place, formats in places.items() if len(formats) > 1 and place not in kept}


def launches(case: Case, name: str) -> int:
    """How often a case is launched after others: by its marks and its name, so that alone it runs as it does in a row.

    What wears out does so in any case: it is enough that those of many launches are spread over shapes and formats.
    """
    chosen = _one_in(EVERY, name)
    if "smoke" in case.marks:
        return MANY if chosen else FEW
    # Sizes and attributes are what a drawn case is for: state shows in all the others.
    return int(chosen or MARK not in case.marks)


def _store(node: TensorNode, kernel: Kernel, variant: Variant | None) -> TensorNode:
    """The node with its values in formats that the kernel declares: the case's own where it can."""
    if variant is None:
        return stored(node, kernel, lambda place, value: value.format)
    several = choices(node, kernel)
    # Outputs that are joined have the format of the first.
    joined = kernel.joins(node) and variant.place.startswith("outputs")
    where = "outputs0" if joined else variant.place

    def wanted(place: str, value: Value) -> str:
        otherwise = variant.place == ALL or place == where
        return variant.format if otherwise and variant.format in several.get(place, ()) else value.format

    return stored(node, kernel, wanted)


def _check(trial: Trial, outcome: Outcome, peer: tuple[float, float], times: int) -> Outcome:
    """The outcome with every check made, the error first. Guards come last: they hold for all that went before."""
    before = checks.process_state()
    trial.start()
    outcome = _measure(trial, outcome, peer)
    checks.written(trial)
    checks.inputs_unchanged(trial)
    checks.untouched_cache(trial)
    checks.scales(trial)
    checks.sums(trial)
    checks.in_place(trial)
    checks.apart(trial)
    checks.follows(trial, times)
    if times > 1:
        checks.after_failure(trial)
    checks.own_stream(trial)
    checks.captured(trial)
    if not (outcome.failures or trial.failures):
        outcome = replace(outcome, batch_invariant=checks.one_row(trial, peer))
    checks.weights_unchanged(trial)
    checks.process_kept(trial, before)
    checks.guards(trial)
    failures = dict.fromkeys((*outcome.failures, *trial.failures))
    # What is not written at all is wrong as well, and that says less.
    return replace(outcome, failures=tuple(sorted(failures, key=lambda failure: not failure.startswith("written:"))))


def _measure(trial: Trial, outcome: Outcome, peer: tuple[float, float]) -> Outcome:
    """The outcome with the error of the output that takes most of its bound."""
    measured = [trial.measure(index, memory, peer=peer) for index, memory in enumerate(trial.outputs)]
    failures = tuple(failure for found in measured for failure in found.failures)
    outcomes = [replace(outcome, error=found.error, worst=found.worst, bound=found.bound) for found in measured]
    return replace(max(outcomes, key=share), failures=failures)

"""Random cases of ops' domains on a backend's kernels, and the smallest case on which one that fails still does.

Enters: a backend, a count, a seed. Leaves: an Outcome a case and kernel; a failure's is that of its smallest case,
which a file gives back as it was run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from kernelmux.conformance.case_file import reread
from kernelmux.conformance.hookup import Filter, require_backend
from kernelmux.conformance.outcome import Outcome
from kernelmux.conformance.run import run_case
from kernelmux.contract.device import Device, find_device
from kernelmux.contract.registry import Registry
from kernelmux.errors import BackendError
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS, Case, Op
from kernelmux.graph.ops.domain import Domain, Point, any_point, smaller
from kernelmux.graph.ops.drawn import drawn_case

STEPS = 400
"""Smaller cases that are tried of a failure at most."""


@dataclass(frozen=True)
class Fuzzed:
    """A random case on a kernel, and what came of it; of a failure, of the smallest case that fails alike."""

    case: Case
    outcome: Outcome
    alike: bool = False
    """Whether its kernel has failed the same check of the op before: this case was not made smaller."""


def fuzz(
    backend: str, registry: Registry, count: int, seed: int, device: str = "cpu", wanted: Filter | None = None
) -> Iterator[Fuzzed]:
    """So many random cases of each op on each kernel that takes them; the same ones for the same seed.

    Of failures of one kernel, op and check the first is made smaller, and the others are alike. BackendError where the
    backend is not installed, is quarantined, breaks while it is asked, or takes none of the cases.
    """
    require_backend(backend, registry)
    wanted, target, taken = wanted or Filter(), find_device(device), False
    for op in OPS.values():
        domain = op.domain()
        if domain is None or wanted.op not in ("", op.name):
            continue
        known: set[tuple[str, str]] = set()
        for point in _points(op, domain, count, seed):
            drawn = drawn_case(domain, point)
            takers = _takers(drawn, backend, registry, target, wanted)
            if not takers:
                continue
            case, taken = reread(drawn), True
            for kernel in takers:
                found, ended = Fuzzed(case, run_case(case, kernel, registry, device)), False
                if found.outcome.status == "fail":
                    about = kernel, first_check(found.outcome)
                    if about in known:
                        found = replace(found, alike=True)
                    else:
                        run = partial(run_case, kernel=kernel, registry=registry, device=device)
                        found, ended = _smallest(domain, point, found, run)
                    known.add(about)
                yield found
                if ended:
                    raise KeyboardInterrupt
    if not taken:
        raise BackendError(f"backend {backend!r} takes none of these cases on {device}", backend=backend)


def _points(op: Op, domain: Domain, count: int, seed: int) -> Iterator[Point]:
    """Random points; those of a larger count begin with those of a smaller one."""
    source = random.Random(f"{seed} {op.name}")
    return (any_point(domain, source) for _ in range(count))


def _takers(case: Case, backend: str, registry: Registry, target: Device, wanted: Filter) -> list[str]:
    """The backend's kernels that take a case, of those that are wanted."""
    offer = registry.offer(case_node(case), target, only=backend)
    if fault := registry.backends[backend].fault:
        raise BackendError(f"backend {backend!r} broke while it was asked: {fault}", backend=backend)
    return [name for name in offer.kernels if wanted.kernel in ("", name)]


def first_check(outcome: Outcome) -> str:
    """Which check failed first."""
    return outcome.failures[0].partition(":")[0]


def _smallest(domain: Domain, point: Point, found: Fuzzed, run: Callable[[Case], Outcome]) -> tuple[Fuzzed, bool]:
    """Greedily: extents halved and choices made plainer, one at a time, while the same check fails.

    And whether Ctrl-C ended that: it is as small as it is until then.
    """
    tried = 0
    options = smaller(domain, point)
    while tried < STEPS and (less := next(options, None)) is not None:
        if not domain.holds(less):
            continue
        tried += 1
        try:
            case = reread(drawn_case(domain, less))
            outcome = run(case)
        except KeyboardInterrupt:
            return found, True
        if outcome.status == "fail" and first_check(outcome) == first_check(found.outcome):
            found, options = Fuzzed(case, outcome), smaller(domain, less)
    return found, False

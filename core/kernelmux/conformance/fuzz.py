"""Random cases of ops' domains on a backend's kernels, and the smallest case on which one that fails still does.

Enters: a backend, a count, a seed. Leaves: an Outcome a case and kernel; a failure's is that of its smallest case,
which a file gives back as it was run, with that of the case as it was drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from kernelmux.conformance.case_file import reread
from kernelmux.conformance.hookup import Filter, require_backend
from kernelmux.conformance.outcome import Outcome, Run
from kernelmux.conformance.run import run_case
from kernelmux.contract.device import Device, find_device
from kernelmux.contract.registry import Registry
from kernelmux.errors import BackendError, nearest, shown
from kernelmux.graph.graph import case_node
from kernelmux.graph.ops import OPS, Case, Op
from kernelmux.graph.ops.domain import Domain, Point, any_point, smaller
from kernelmux.graph.ops.drawn import MARK, drawn_case

STEPS = 400
"""Smaller cases that are tried of a failure at most."""


@dataclass(frozen=True)
class Fuzzed:
    """A random case on a kernel, and what came of it; of a failure, of the smallest case that fails alike."""

    case: Case
    outcome: Outcome
    as_drawn: Case | None = None
    """What it was before it was made smaller, if it was."""
    alike: bool = False
    """Whether another has failed like it before: this case was not made smaller."""


def fuzz(
    backend: str,
    registry: Registry,
    count: int,
    seed: int,
    device: str = "cpu",
    wanted: Filter | None = None,
    until: str = "",
) -> Iterator[Fuzzed]:
    """So many random cases of each op on each kernel that takes them; the same ones for the same seed.

    Of failures of one kind the first is made smaller, and the others are alike. `until` ends them with the case of
    that name; they are as they were drawn then, each one. BackendError where the backend is not installed, is
    quarantined, breaks while it is asked, or takes none of the cases, and where none is called so.
    """
    require_backend(backend, registry)
    wanted, target, taken = wanted or Filter(), find_device(device), False
    domains = {op: domain for op in OPS.values() if (domain := op.domain()) and wanted.op in ("", op.name)}
    points = {op: [*_points(op, domain, count, seed)] for op, domain in domains.items()}
    for op, several in (_up_to(until, points, domains, seed) if until else points).items():
        domain, known = domains[op], set[tuple[str, ...]]()
        for point in several:
            drawn = drawn_case(domain, point)
            takers = _takers(drawn, backend, registry, target, wanted)
            case, taken = reread(drawn) if takers else drawn, taken or bool(takers)
            for kernel in takers:
                run = partial(run_case, kernel=kernel, registry=registry, device=device)
                found, ended = Fuzzed(case, replace(run(case), run=Run(fuzz=count, seed=seed))), False
                if found.outcome.status == "fail" and not until:
                    kind = found.outcome.kind
                    if kind in known:
                        found = replace(found, alike=True)
                    else:
                        found, ended = _smallest(domain, point, found, run)
                    known.add(kind)
                yield found
                if ended:
                    raise KeyboardInterrupt
    if not taken:
        raise BackendError(f"backend {backend!r} takes none of these cases on {device}", backend=backend)


def _points(op: Op, domain: Domain, count: int, seed: int) -> Iterator[Point]:
    """Random points; those of a larger count begin with those of a smaller one."""
    source = random.Random(f"{seed} {op.name}")
    return (any_point(domain, source) for _ in range(count))


def _up_to(
    name: str, points: Mapping[Op, list[Point]], domains: Mapping[Op, Domain], seed: int
) -> dict[Op, list[Point]]:
    """The ops up to that of the case, and of its op the points up to the last so called; BackendError where none is."""
    ops = list(points)
    op = next((op for op in ops if name.startswith(f"{op.name}-{MARK}:")), None)
    names = [drawn_case(domains[op], point).name for point in points[op]] if op else []
    if not op or name not in names:
        close = nearest(name, names).partition(";")[0]
        raise BackendError(f"of so many random cases of seed {seed} none is called {shown(name)}{close}")
    last = len(names) - names[::-1].index(name)
    return {**{before: points[before] for before in ops[: ops.index(op)]}, op: points[op][:last]}


def _takers(case: Case, backend: str, registry: Registry, target: Device, wanted: Filter) -> list[str]:
    """The backend's kernels that take a case, of those that are wanted."""
    offer = registry.offer(case_node(case), target, only=backend)
    if fault := registry.backends[backend].fault:
        raise BackendError(f"backend {backend!r} broke while it was asked: {fault}", backend=backend)
    return [name for name in offer.kernels if wanted.kernel in ("", name)]


def _smallest(domain: Domain, point: Point, found: Fuzzed, run: Callable[[Case], Outcome]) -> tuple[Fuzzed, bool]:
    """Greedily: extents halved and choices made plainer, one at a time, while it fails alike.

    And whether Ctrl-C ended that: it is as small as it is until then.
    """
    tried, first = 0, found
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
        if outcome.status == "fail" and outcome.kind == first.outcome.kind:
            whole = first.outcome
            outcome = replace(outcome, run=whole.run, as_drawn=whole)
            found, options = Fuzzed(case, outcome, first.case), smaller(domain, less)
    return found, False

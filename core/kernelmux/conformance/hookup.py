"""Which cases run on which kernels, and the one line by which a backend's tests get them all.

Enters: a backend's name, filters. Leaves: Outcomes, in the order of the ops and their cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from kernelmux.conformance.alone import Again
from kernelmux.conformance.case_file import CaseFile, read_cases
from kernelmux.conformance.huge import huge_cases
from kernelmux.conformance.known import KnownFailures, apply_known, read_known
from kernelmux.conformance.outcome import Outcome
from kernelmux.conformance.run import ALL, Variant, choices, run_case
from kernelmux.contract.device import find_device
from kernelmux.contract.kernel import Kernel
from kernelmux.contract.registry import Registry
from kernelmux.errors import BackendError, nearest
from kernelmux.graph.graph import TensorNode, case_node
from kernelmux.graph.ops import OPS, Case
from kernelmux.graph.ops.cases import all_weights
from kernelmux.graph.ops.drawn import MARK, covering_cases
from kernelmux.graph.ops.op import Op


@dataclass(frozen=True, eq=False)
class Job:
    """One case on one kernel, in one choice of formats."""

    case: Case
    kernel: str
    variant: Variant | None = None
    source: str = ""
    """The file that the case was read from; empty for the suite's own."""

    @property
    def name(self) -> str:
        """The case's name, with the variant's format."""
        return self.case.name if self.variant is None else self.variant.name(self.case)

    def run(self, registry: Registry, device: str = "cpu", peer: str = "") -> Outcome:
        outcome = run_case(self.case, self.kernel, registry, device, self.variant, peer)
        return replace(outcome, cases=self.source)


@dataclass(frozen=True)
class Filter:
    """Which jobs are wanted; empty means all. `case` is a shell pattern for the job's name."""

    op: str = ""
    kernel: str = ""
    case: str = ""
    smoke: bool = False
    """Only the cases marked `smoke`."""
    large: bool = False
    """Also the cases marked `large`, which a CPU had better leave out."""
    huge: bool = False
    """Also the cases marked `huge`, of more than 2^31 elements."""

    def wants(self, job: Job) -> bool:
        return (
            (not self.op or job.case.op == self.op)
            and (not self.kernel or job.kernel == self.kernel)
            and (not self.case or job.name == self.case or fnmatchcase(job.name, self.case))
            and (not self.smoke or "smoke" in job.case.marks)
            and (self.large or "large" not in job.case.marks or job.name == self.case)
            and (self.huge or "huge" not in job.case.marks or job.name == self.case)
        )


def choose(every: Iterable[Job], wanted: Filter) -> list[Job]:
    """The jobs wanted; the name of a case in full means that case alone, even a large one."""
    chosen = [job for job in every if wanted.wants(job)]
    return [job for job in chosen if job.name == wanted.case] or chosen


def all_cases() -> tuple[Case, ...]:
    """Every case of every op, in the order of the ops; those of plugins, too, while they are there."""
    return tuple(case for op in OPS.values() for case in _cases(op, all_weights()))


@cache
def _cases(op: Op, weights: tuple[str, ...]) -> tuple[Case, ...]:
    """An op's cases while there are these formats of weights: those of its file, then those that cover its domain."""
    return (*op.cases(), *covering_cases(op))


def require_backend(backend: str, registry: Registry) -> None:
    """BackendError where a backend is not installed, or is quarantined."""
    if backend not in registry.backends:
        raise BackendError(f"unknown backend {backend!r}{nearest(backend, registry.backends)}", backend=backend)
    if fault := registry.backends[backend].fault:
        raise BackendError(f"backend {backend!r} is quarantined: {fault}", backend=backend)


def jobs(
    backend: str, registry: Registry, device: str = "cpu", wanted: Filter | None = None, file: CaseFile | None = None
) -> Iterator[Job]:
    """Every kernel of a backend on every case of its op, and one case in each format that it declares.

    The cases are those of `file`, or the suite's own; all kernels of one case come in a row.
    BackendError where the backend is not installed, is quarantined, or has no kernel at all.
    """
    require_backend(backend, registry)
    cases, source = (file.cases, file.path) if file else (all_cases(), "")
    if wanted and wanted.huge and file is None:
        cases += tuple(huge.case for huge in huge_cases().values())
    asked_op = wanted.op if wanted else ""
    for op, kernels in _variants_of(backend, registry, device, cases, source, asked_op).items():
        every = chain(
            (Job(case, kernel, None, source) for case in cases if case.op == op for kernel in kernels),
            *kernels.values(),
        )
        yield from (job for job in every if wanted is None or wanted.wants(job))


def _variants_of(
    backend: str, registry: Registry, device: str, cases: Iterable[Case], source: str, asked_op: str = ""
) -> Mapping[str, Mapping[str, list[Job]]]:
    """By op, then by kernel that the backend offers or declines by name: one case in each format that it declares.

    Of one op where that is given. BackendError where the backend offers none, or breaks while it is asked.
    """
    target = find_device(device)
    found: dict[str, dict[str, list[Job]]] = {}
    shown: dict[tuple[str, str], tuple[bool, bool]] = {}
    refusal = ""
    # Of the ops' own cases those that are written by hand are enough to tell which kernels there are.
    telling = [case for case in cases if source or MARK not in case.marks]
    for case in sorted(telling, key=lambda case: asked_op not in ("", case.op)):
        if shown and asked_op not in ("", case.op):
            # Other ops are asked until it is known that the backend has a kernel at all.
            break
        node = case_node(case)
        offer = registry.offer(node, target, only=backend)
        if fault := registry.backends[backend].fault:
            raise BackendError(f"backend {backend!r} broke while it was asked: {fault}", backend=backend)
        of_op = found.setdefault(case.op, {})
        # That a backend has no kernel of an op is no refusal: others may be told.
        refusals = ((name, declined) for name, declined in offer.declined.items() if declined.kind != "not offered")
        refusal = refusal or next((f": {name} says: {declined.reason}" for name, declined in refusals), "")
        # Of several rows, if there is such a case: what lies where in a format shows only there.
        several = case.inputs[0].extents[0] > 1
        worth = several, several and "smoke" in case.marks
        for name in offer.names:
            of_op.setdefault(name, [])
        for name, kernel in offer.kernels.items():
            if worth > shown.get((case.op, name), ()):
                of_op[name] = [Job(case, name, variant, source) for variant in _variants(node, kernel)]
                shown[case.op, name] = worth
    if not shown:
        cases_of = "file" if source else "suite"
        raise BackendError(f"backend {backend!r} takes none of the {cases_of}'s cases on {device}{refusal}")
    return found


def _variants(node: TensorNode, kernel: Kernel) -> Iterator[Variant]:
    """Every format that a kernel declares for a value of a node: one value at a time, then all that may have it."""
    several = choices(node, kernel)
    yield from (Variant(place, format) for place, formats in several.items() for format in formats)
    declared = Counter(format for formats in several.values() for format in formats)
    yield from (Variant(ALL, format) for format, places in declared.items() if places > 1)


def suite(
    backend: str,
    device: str = "cpu",
    known_failures: str | Path | None = None,
    cases: str | Path | None = None,
) -> type:
    """A test class for pytest with one test a job: `TestHello = suite("hello")` in a test file is the whole hookup.

    `cases` is a file that `kernelmux run --capture-cases` wrote: its cases in place of the suite's own.
    """
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise BackendError(f"suite({backend!r}) needs pytest: pip install pytest") from error

    from kernelmux.contract import registry

    known = read_known(Path(known_failures)) if known_failures else KnownFailures()
    current = registry.current()
    wanted = Filter(large=not find_device(device).platform.host_memory)
    every = list(jobs(backend, current, device, wanted, read_cases(cases) if cases else None))
    again = Again()

    def parameter(job: Job) -> Any:
        marks = [getattr(pytest.mark, name) for name in ("smoke", MARK) if name in job.case.marks]
        return pytest.param(job, id=f"{job.kernel}-{job.name}", marks=marks)

    class TestConformance:
        """Every kernel of the backend on every case."""

        @pytest.mark.parametrize("job", [parameter(job) for job in every])
        def test_case(self, job: Job, request: pytest.FixtureRequest) -> None:
            mine = known.about(job.kernel, job.name)
            outcome = again.tell(apply_known([job.run(current, device)], mine)[0])
            # A pattern may hold cases that pass; a case by its name may not.
            if outcome.passed and (named := next((entry for entry in mine.failure if entry.case == job.name), None)):
                outcome = replace(outcome, status="fail", failures=known.stale(named, passes=True).failures)
            carried = asdict(outcome).items()
            plain = ((name, value) for name, value in carried if not isinstance(value, dict))
            request.node.user_properties.extend((f"kernelmux_{name}", value) for name, value in plain)
            if outcome.status == "refused":
                pytest.skip(outcome.reason)
            if outcome.status == "known":
                pytest.xfail(outcome.reason)
            if not outcome.passed:
                trace = [outcome.trace] if outcome.trace and request.config.get_verbosity() > 0 else []
                # What failed is told by the message: the lines of this file say nothing of it.
                pytest.fail("\n".join([*outcome.failures, f"again: {outcome.command}", *trace]), pytrace=False)

        def test_known_failures_name_cases(self) -> None:
            """An entry that is about no case is stale."""
            if lost := [one for one in known.failure if not any(one.meets(job.kernel, job.name) for job in every)]:
                said = [*chain.from_iterable(known.stale(one, passes=False).failures for one in lost)]
                pytest.fail("\n".join(said), pytrace=False)

    return TestConformance

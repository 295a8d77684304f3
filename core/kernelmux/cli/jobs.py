"""Which of the suite's jobs `kernelmux check` was asked for: by backend, op, kernel, case, share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from kernelmux.errors import BackendError, nearest, shown

if TYPE_CHECKING:
    from kernelmux.conformance import Filter, Job
    from kernelmux.conformance.case_file import CaseFile
    from kernelmux.contract.registry import Registry


def named_backends(backend: str, kernel: str, ops: Iterable[str], registry: Registry) -> list[str]:
    """The backends that are asked for, else all that work; BackendError where one, or an op, is unknown."""
    for op in ops:
        _require_op(op)
    return [_asked(backend, kernel)] if backend or kernel else list(registry.working)


def _asked(backend: str, kernel: str) -> str:
    """The one backend that is asked for, if any; BackendError where the kernel is not written as one of it."""
    of_kernel, colon, _ = kernel.partition(":")
    if kernel and not colon:
        raise BackendError(f"a kernel is written backend:kernel, as torch:f32, not {kernel!r}")
    if backend and kernel and backend != of_kernel:
        raise BackendError(f"{kernel} is no kernel of backend {backend}")
    return backend or of_kernel


def find_jobs(
    backend: str, kernel: str, registry: Registry, device: str, file: CaseFile | None
) -> tuple[list[Job], dict[str, str]]:
    """Every job of the backends asked for, and why any of them cannot be checked; BackendError if none can."""
    from kernelmux.conformance import Filter, jobs

    if asked := _asked(backend, kernel):
        return list(jobs(asked, registry, device, Filter(large=True, huge=True), file)), {}
    if not registry.backends:
        raise BackendError("no backend is installed: pip install kernelmux-torch (or kernelmux-reference)")
    every: list[Job] = []
    notes = {}
    for name in registry.backends:
        try:
            every += jobs(name, registry, device, Filter(large=True, huge=True), file)
        except BackendError as error:
            notes[name] = str(error)
    if not every:
        raise BackendError("; ".join(notes.values()))
    return every, notes


def choose(every: Sequence[Job], wanted: Filter) -> list[Job]:
    """The jobs wanted: a name in full means that case alone. BackendError names what matches nothing."""
    from kernelmux.conformance.hookup import choose as of_filter

    if chosen := of_filter(every, wanted):
        return chosen
    if wanted.op:
        _require_op(wanted.op)
        ops = dict.fromkeys(job.case.op for job in every)
        backends = list(dict.fromkeys(job.kernel.partition(":")[0] for job in every))
        # Of a file of cases it may be the case that is missing.
        if wanted.op not in ops and len(backends) == 1 and not any(job.source for job in every):
            raise BackendError(
                f"{backends[0]} offers no kernel of {wanted.op} here; its kernels are of {', '.join(ops)}"
            )
    if wanted.kernel:
        require_kernel(wanted.kernel, every)
    filters = {"op": wanted.op, "kernel": wanted.kernel, "case": wanted.case, "smoke": wanted.smoke}
    asked = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in filters.items() if value)
    close = nearest(wanted.case, {job.name for job in every}).partition(";")[0] if wanted.case else ""
    raise BackendError(f"no case matches {asked}{close}; kernelmux check --list shows them, with --large all")


def up_to(name: str, chosen: list[Job]) -> list[Job]:
    """The jobs up to the last one of that name, or all if there is none; BackendError where no job is called so."""
    if not name:
        return chosen
    found = [index for index, job in enumerate(chosen) if job.name == name]
    if not found:
        close = nearest(name, {job.name for job in chosen}).partition(";")[0]
        raise BackendError(f"no case among those chosen is called {name!r}{close}; kernelmux check --list shows them")
    return chosen[: found[-1] + 1]


def _require_op(name: str) -> None:
    from kernelmux.graph.ops import OPS

    if name not in OPS:
        raise BackendError(f"unknown op {name!r}{nearest(name, OPS)}")


def require_kernel(name: str, every: Iterable[Job]) -> None:
    """BackendError unless a kernel has jobs: a peer that is misspelt would excuse nothing, and nobody would know."""
    kernels = {job.kernel for job in every}
    if name not in kernels:
        raise BackendError(f"unknown kernel {name!r}{nearest(name, kernels)}")


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as numbers; all of one where nothing is asked."""
    read = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text or "1/1")
    if read is None or int(read[1]) > int(read[2]):
        raise typer.BadParameter(f"it is K/N with K from 1 to N, as 2/8, not {shown(text)}", param_hint="--shard")
    return int(read[1]), int(read[2])


def shared_out(chosen: Iterable[Job], part: int, parts: int) -> list[Job]:
    """One share of the cases' jobs; all kernels of a case in a row, which share its numbers."""
    cases: dict[tuple[str, str], list[Job]] = {}
    for job in chosen:
        cases.setdefault((job.case.op, job.case.name), []).append(job)
    return [job for jobs in list(cases.values())[part - 1 :: parts] for job in jobs]

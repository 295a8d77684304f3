"""`kernelmux check`: backends held against the conformance suite; what fails, and what runs just that again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelmux.cli.alone import run_alone
from kernelmux.cli.common import (
    DeviceName,
    Json,
    SaveJson,
    Verbose,
    refuse_overwriting,
    refuse_together,
    traced,
)
from kernelmux.cli.ending import interrupts
from kernelmux.cli.fuzz import run_fuzz
from kernelmux.cli.jobs import choose, find_jobs, named_backends, read_shard, require_kernel, shared_out, up_to
from kernelmux.cli.output import print_json, stdout, tell
from kernelmux.cli.progress import counting
from kernelmux.errors import KernelmuxError

if TYPE_CHECKING:
    from kernelmux.conformance import Job, Outcome
    from kernelmux.conformance.known import Known, KnownFailures
    from kernelmux.conformance.report import Report
    from kernelmux.contract.record import Record
    from kernelmux.contract.registry import Registry


@traced
def check(
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="Only this one; else all.")] = "",
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="OP", help="Only this op's cases; may be repeated.")
    ] = None,
    kernel: Annotated[str, typer.Option("--kernel", metavar="KERNEL", help="Only this one, as torch:f32.")] = "",
    case: Annotated[str, typer.Option("--case", metavar="GLOB", help="Only the case of this name or pattern.")] = "",
    until: Annotated[
        str,
        typer.Option("--until", metavar="CASE", help="Only the cases up to this one, in their order; of --fuzz too."),
    ] = "",
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="K/N", help="Only the K-th of N shares of the cases."),
    ] = "",
    device: DeviceName = "cpu",
    smoke: Annotated[bool, typer.Option("--smoke", help="Only the cases that run in seconds.")] = False,
    large: Annotated[
        bool,
        typer.Option(
            "--large",
            help="Also the large cases, which the CPU leaves out, and those of over 2^31 elements.",
        ),
    ] = False,
    peer: Annotated[
        str, typer.Option("--peer", metavar="KERNEL", help="Who misses a bound passes if this one is no closer.")
    ] = "",
    known: Annotated[Path | None, typer.Option("--known", metavar="FILE", help="A known_failures.toml.")] = None,
    cases: Annotated[
        Path | None,
        typer.Option("--cases", metavar="FILE", help="Of run --capture-cases, in place of the suite's own."),
    ] = None,
    fuzz: Annotated[
        int, typer.Option("--fuzz", min=0, metavar="N", help="In place of those, so many random cases of each op.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random cases: each has others.")] = 0,
    fuzz_cases: Annotated[
        Path | None,
        typer.Option(
            "--fuzz-cases", metavar="FILE", help="Where cases that fail go, the smallest; else fuzz-SEED.json."
        ),
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Only list the cases: op, name, marks.")] = False,
    json: Json = False,
    save: SaveJson = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page to read.")] = None,
    verbose: Verbose = False,
) -> None:
    """Run the conformance suite: every kernel on every case of its op. Exit code 1 if anything fails.

    A kernel that fails smoke cases is on record then: `auto` does not take it on this machine until they pass.
    """
    from kernelmux.conformance import Filter
    from kernelmux.conformance.case_file import read_cases
    from kernelmux.conformance.known import KnownFailures, read_known
    from kernelmux.conformance.outcome import Run
    from kernelmux.conformance.report import make_report
    from kernelmux.contract import registry
    from kernelmux.contract.device import find_device
    from kernelmux.contract.record import Record

    refuse_overwriting("--save", save, **{"known failures": known, "case file": cases})
    refuse_overwriting("--html", html, **{"known failures": known, "case file": cases, "JSON": save})
    refuse_overwriting("--fuzz-cases", fuzz_cases, JSON=save, page=html)
    current, target = registry.current(), find_device(device)
    asked = dict.fromkeys(op or [""])
    if not fuzz and (seed or fuzz_cases):
        raise typer.BadParameter("it is of random cases: ask for some by --fuzz N", param_hint="--seed, --fuzz-cases")
    run = Run(backend, kernel, tuple(asked) if op else (), case, smoke, large, shard, fuzz, seed)
    began = time.monotonic()
    if fuzz:
        unused = {"case": case, "smoke": smoke, "large": large, "cases": cases, "known": known}
        refuse_together("--fuzz", **unused, shard=shard, peer=peer, list=list_cases)
        backends = named_backends(backend, kernel, op or [], current)
        outcomes, ended = run_fuzz(run, backends, device, fuzz_cases or Path(f"fuzz-{seed}.json"), until)
        if not ended:
            outcomes, ended = _repeated(outcomes, until, time.monotonic() - began)
        said = (ended,) if ended else ()
        _write(make_report(outcomes, current.backends, target.device_class, said), json, save, html, verbose)
        if ended:
            raise KeyboardInterrupt
        raise typer.Exit(int(any(outcome.status == "fail" for outcome in outcomes)))
    file = read_cases(cases) if cases else None
    every, notes = find_jobs(backend, kernel, current, device, file)
    wanted = [Filter(one, kernel, case, smoke, large or device != "cpu", huge=large) for one in asked]
    chosen = shared_out((job for each in wanted for job in choose(every, each)), *read_shard(shard))
    chosen = up_to(until, chosen)
    if not chosen:
        typer.echo(f"no case falls to share {shard}", err=True)
    if list_cases:
        refuse_together("--list", html=html, save=save)
        listed = dict.fromkeys((job.case.op, job.name, *sorted(job.case.marks)) for job in chosen)
        if json:
            print_json({"cases": [{"op": op, "name": name, "marks": marks} for op, name, *marks in listed]})
        else:
            for words in listed:
                tell("\t".join(words))
        return
    if peer:
        require_kernel(peer, find_jobs("", peer, current, device, file)[0])
    entries = read_known(known) if known else KnownFailures()
    narrowed = bool(op or kernel or case or until or shard or smoke or cases)
    ran, interrupted = _run(chosen, current, device, peer)
    outcomes = [replace(one, run=run) if one.op else one for one in _judge(ran, entries, every, narrowed)]
    ended = f"interrupted after {len(ran)} of {len(chosen)} cases, in {interrupted}" if interrupted else ""
    if len(chosen) > 1 and not interrupted:
        outcomes, ended = _repeated(outcomes, until, time.monotonic() - began)
    if ended:
        notes["interrupted"] = ended
    if file is None:
        _put_on_record(list(zip(chosen, outcomes, strict=False)), every, Record(current, target), bool(peer))
    taking_part = current.backends if not (backend or kernel) else {job.kernel.partition(":")[0] for job in every}
    broken = [current.backends[name] for name in taking_part if current.backends[name].fault]
    notes |= {found.name: f"backend {found.name!r} is quarantined: {found.fault}" for found in broken}
    report = make_report(outcomes, current.backends, target.device_class, notes.values())
    if verbose:
        for found in broken:
            typer.echo(found.trace, err=True)
    _write(report, json, save, html, verbose)
    if ended:
        raise KeyboardInterrupt
    if report.totals["fail"] or broken:
        raise typer.Exit(1)


def _repeated(outcomes: Sequence[Outcome], until: str, took: float) -> tuple[list[Outcome], str]:
    """Outcomes with what repeats them, where they come of others; and what to say where Ctrl-C ended the finding out.

    Of those up to a case it is known: what was run.
    """
    if until:
        return [replace(one, before="run") if one.status == "fail" and one.op else one for one in outcomes], ""
    return run_alone(outcomes, took)


def _run(chosen: Sequence[Job], registry: Registry, device: str, peer: str) -> tuple[list[Outcome], str]:
    """Each job in turn, under a progress bar on stderr where that is a terminal; and in which Ctrl-C ended it."""
    from kernelmux.conformance.run import under_way

    outcomes: list[Outcome] = []
    before = interrupts()
    with counting(under_way, len(chosen)) as count:
        for job in chosen:
            try:
                outcomes.append(job.run(registry, device, peer))
            except KeyboardInterrupt:
                return outcomes, f"{job.kernel} {job.name}"
            if interrupts() != before:
                return outcomes, f"{job.kernel} {job.name}, which did not let it through"
            count(f"{job.kernel} {job.case.op}")
    return outcomes, ""


def _judge(outcomes: list[Outcome], known: KnownFailures, every: Iterable[Job], narrowed: bool) -> list[Outcome]:
    """Known failures marked. An entry can only be stale in a run of all that it names."""
    from kernelmux.conformance.known import apply_known

    ran = {(outcome.kernel, outcome.case) for outcome in outcomes}
    backends = {job.kernel.partition(":")[0] for job in every}

    def ran_whole(entry: Known) -> bool:
        meant = {(job.kernel, job.name) for job in every if entry.meets(job.kernel, job.name)}
        return meant <= ran and bool(meant or not narrowed) and entry.kernel.partition(":")[0] in backends

    return apply_known(outcomes, known, ran_whole)


def _put_on_record(ran: Sequence[tuple[Job, Outcome]], every: Iterable[Job], record: Record, excused: bool) -> None:
    """Which kernels failed smoke cases; which passed, where all those of an op ran and none was `excused` by a peer."""
    smoke = [(job, outcome) for job, outcome in ran if "smoke" in job.case.marks]
    missing = {id(job): job for job in every if "smoke" in job.case.marks}
    subjects: dict[tuple[str, str], list[Outcome]] = {}
    for job, outcome in smoke:
        missing.pop(id(job), None)
        subjects.setdefault((job.case.op, job.kernel), []).append(outcome)
    partly = {(job.case.op, job.kernel) for job in missing.values()}
    for (op, kernel), outcomes in subjects.items():
        failed = next((outcome.case for outcome in outcomes if outcome.status == "fail"), "")
        whole = (op, kernel) not in partly and any(outcome.passed for outcome in outcomes)
        if failed or (whole and not excused):
            record.note(op, kernel, failed)


def _write(report: Report, json: bool, save: Path | None, html: Path | None, traces: bool) -> None:
    """What was found, to stdout and to files; KernelmuxError, after all of it, where one of those was not written."""
    from kernelmux.conformance.html import to_html
    from kernelmux.conformance.report import print_report, to_json
    from kernelmux.files import write_whole
    from kernelmux.measure.report import save_report

    lost = [
        _lost(html, lambda path: write_whole(path, to_html(report))),
        _lost(save, lambda path: save_report(to_json(report), path)),
    ]
    for note in report.notes:
        typer.echo(f"not checked: {note}", err=True)
    if json:
        print_json(to_json(report))
    else:
        print_report(report, traces, stdout())
    if any(lost):
        raise KernelmuxError("; ".join(filter(None, lost)))


def _lost(path: Path | None, write: Callable[[Path], None]) -> str:
    """Why a file was not written; empty where it was, or was not asked for."""
    try:
        if path is not None:
            write(path)
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    except KernelmuxError as error:
        return str(error)
    return ""

"""`kernelmux check --fuzz`: random cases, and what fails as a file of cases with the command that runs it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kernelmux.cli.ending import interrupts
from kernelmux.cli.progress import counting
from kernelmux.errors import BackendError, GraphError

if TYPE_CHECKING:
    from kernelmux.conformance import Outcome
    from kernelmux.conformance.fuzz import Fuzzed
    from kernelmux.conformance.outcome import Run


def run_fuzz(
    asked: Run, backends: Sequence[str], device: str, place: Path, until: str = ""
) -> tuple[list[Outcome], str]:
    """Each backend on as many random cases as asked; and, where Ctrl-C ended that before, when.

    What fails goes to `place`, and is printed to stderr; but for those up to a case, which their command repeats.
    """
    from kernelmux.conformance import Filter
    from kernelmux.conformance.fuzz import fuzz
    from kernelmux.conformance.run import under_way
    from kernelmux.contract import registry

    _check_place(place)
    outcomes: list[Outcome] = []
    failing: list[Fuzzed] = []
    alike: Counter[tuple[str, ...]] = Counter()
    nothing: list[str] = []
    interrupted = ""
    before = interrupts()
    wanted = [Filter(op, asked.kernel) for op in asked.ops or [""]]
    with counting(under_way) as count_one:
        for backend, each in product(backends, wanted):
            try:
                for found in fuzz(backend, registry.current(), asked.fuzz, asked.seed, device, each, until):
                    outcome = _both(found.outcome, run=asked)
                    count_one(f"{outcome.kernel} {outcome.op}")
                    if found.alike:
                        alike[outcome.kind] += 1
                        continue
                    if outcome.status == "fail" and not until:
                        failing.append(found)
                        # The file holds both.
                        outcome = _both(outcome, cases=str(place))
                    outcomes.append(outcome)
                    if interrupts() != before:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupted = f"interrupted after {len(outcomes) + alike.total()} results, of {backend}"
                break
            except BackendError as error:
                # One that is asked for by name must be there; of all of them some are for other devices.
                if len(backends) == 1:
                    raise
                nothing.append(str(error))
    for said in nothing:
        typer.echo(f"not checked: {said}", err=True)
    if not (until or _save(failing, place)):
        outcomes = [replace(one.as_drawn or one, cases="") for one in outcomes]
    return [_with_alike(one, alike[one.kind]) if one.status == "fail" else one for one in outcomes], interrupted


def _both(outcome: Outcome, **changed: Any) -> Outcome:
    """An outcome with fields changed, and, of a case that was made smaller, those of what it was drawn as."""
    return replace(outcome, **changed, as_drawn=outcome.as_drawn and _both(outcome.as_drawn, **changed))


def _with_alike(outcome: Outcome, more: int) -> Outcome:
    """A failure, with how many more are alike; as it was drawn too, which may be told in its place."""
    told = (f"alike: {more} more of the random cases of {outcome.op} failed so",) if more else ()
    whole = outcome.as_drawn and _with_alike(outcome.as_drawn, more)
    return replace(outcome, failures=(*outcome.failures, *told), alike=more, as_drawn=whole)


def _check_place(place: Path) -> None:
    """An error where no file of cases can be written, or something else would be lost."""
    from kernelmux.conformance.case_file import read_cases

    if place.is_file() and place.stat().st_size:
        try:
            read_cases(place)
        except GraphError as error:
            raise BackendError(f"{place} is there, and is no file of cases: name another by --fuzz-cases") from error


def _save(failing: Sequence[Fuzzed], place: Path) -> bool:
    """Whether what failed is in a file: where it is not, its case is drawn again with those before it."""
    from kernelmux.conformance.case_file import to_entry, write_cases

    if not failing:
        if place.is_file():
            typer.echo(f"nothing failed: {place} is of an earlier run", err=True)
        return True
    smallest = {found.case.name: found.case for found in failing}
    whole = {found.as_drawn.name: found.as_drawn for found in failing if found.as_drawn}
    for case in smallest.values():
        typer.echo(json.dumps(to_entry(case)), err=True)
    try:
        write_cases({**smallest, **whole}.values(), place)
    except OSError as error:
        typer.echo(f"cannot write cases to {place}: {error.strerror or error}", err=True)
        return False
    many = f"{len(smallest)} failing cases" if len(smallest) > 1 else "1 failing case"
    beside = f", and {'each' if len(smallest) > 1 else 'it'} as it was drawn" if whole else ""
    typer.echo(f"{many}, made small{beside}: {place}", err=True)
    return place.is_file()

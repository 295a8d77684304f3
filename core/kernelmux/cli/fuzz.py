"""`kernelmux check --fuzz`: random cases, and what fails as a file of cases with the command that runs it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kernelmux.cli.progress import counting
from kernelmux.errors import BackendError, GraphError, KernelmuxError

if TYPE_CHECKING:
    from kernelmux.conformance import Filter, Outcome
    from kernelmux.graph.ops import Case


def run_fuzz(
    backends: Sequence[str], count: int, seed: int, device: str, wanted: Sequence[Filter], place: Path
) -> tuple[list[Outcome], str]:
    """Each backend on so many random cases of each op wanted; and, where Ctrl-C ended that before, when.

    What fails goes to `place`, and is printed to stderr.
    """
    from kernelmux.conformance.fuzz import first_check, fuzz
    from kernelmux.conformance.run import under_way
    from kernelmux.contract import registry

    _check_place(place)
    outcomes: list[Outcome] = []
    failing: dict[str, Case] = {}
    alike: Counter[tuple[str, str, str]] = Counter()
    nothing: list[str] = []
    interrupted = ""
    with counting(under_way) as count_one:
        for backend, each in product(backends, wanted):
            try:
                for found in fuzz(backend, registry.current(), count, seed, device, each):
                    outcome = found.outcome
                    if found.alike:
                        alike[outcome.kernel, outcome.op, first_check(outcome)] += 1
                        continue
                    if outcome.status == "fail":
                        failing[found.case.name] = found.case
                        outcome = replace(outcome, cases=str(place))
                    outcomes.append(outcome)
                    count_one(f"{outcome.kernel} {outcome.op}")
            except KeyboardInterrupt:
                interrupted = f"interrupted after {len(outcomes)} results, of {backend}"
                typer.echo(interrupted, err=True)
                break
            except BackendError as error:
                # One that is asked for by name must be there; of all of them some are for other devices.
                if len(backends) == 1:
                    raise
                nothing.append(str(error))
    for said in nothing:
        typer.echo(f"not checked: {said}", err=True)
    _save(failing, place)
    for index, one in enumerate(outcomes):
        if one.status == "fail" and (more := alike[one.kernel, one.op, first_check(one)]):
            told = f"alike: {more} more of the random cases of {one.op} failed this check"
            outcomes[index] = replace(one, failures=(*one.failures, told))
    return outcomes, interrupted


def _check_place(place: Path) -> None:
    """An error where no file of cases can be written, or something else would be lost."""
    from kernelmux.conformance.case_file import read_cases

    if place.is_file() and place.stat().st_size:
        try:
            read_cases(place)
        except GraphError as error:
            raise BackendError(f"{place} is there, and is no file of cases: name another by --fuzz-cases") from error


def _save(failing: dict[str, Case], place: Path) -> None:
    from kernelmux.conformance.case_file import to_entry, write_cases

    if not failing:
        return
    try:
        write_cases(failing.values(), place)
    except OSError as error:
        raise KernelmuxError(f"cannot write cases to {place}: {error.strerror}", file=str(place)) from error
    for case in failing.values():
        typer.echo(json.dumps(to_entry(case)), err=True)
    many = f"{len(failing)} failing cases" if len(failing) > 1 else "1 failing case"
    typer.echo(f"{many}, made small: {place}", err=True)

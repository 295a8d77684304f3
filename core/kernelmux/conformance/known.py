"""Failures that a backend knows of: its `known_failures.toml`.

Enters: the file, Outcomes. Leaves: the Outcomes, those that are known marked so, and a failure for each stale entry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kernelmux.conformance.outcome import Outcome, Run
from kernelmux.errors import BackendError
from kernelmux.files import read_whole

KEYS = "each [[failure]] needs case (a name or a pattern), kernel (backend:kernel), reason and link"


class Known(BaseModel):
    """A failure that its backend knows of: the case's name or a pattern, the kernel, the reason, where to read more."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    case: str = Field(min_length=1)
    kernel: str = Field(pattern=r"^[\w.-]+:[\w.-]+$")
    reason: str = Field(min_length=1)
    link: str = Field(min_length=1)

    def meets(self, kernel: str, case: str) -> bool:
        """Whether the entry is about a case, by its name or a pattern."""
        return kernel == self.kernel and (case == self.case or fnmatchcase(case, self.case))


class KnownFailures(BaseModel):
    """The tables of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    failure: list[Known] = []
    _path: Path = Path("known_failures.toml")

    def about(self, kernel: str, case: str) -> KnownFailures:
        """Those of one case of a kernel."""
        return KnownFailures(failure=[entry for entry in self.failure if entry.meets(kernel, case)])

    def stale(self, entry: Known, passes: bool) -> Outcome:
        """The failure that an entry is whose cases pass, or are not there."""
        what = "passes now" if passes else "is no case of this kernel"
        said = f"stale: {self._path.name} names {entry.case}, which {what}"
        return Outcome(entry.case, "", entry.kernel, "", "fail", failures=(said,), run=Run(known=str(self._path)))


def read_known(path: Path) -> KnownFailures:
    """A known_failures.toml; BackendError where it is none, or an entry lacks a key or has another."""
    try:
        found = KnownFailures.model_validate(tomllib.loads(read_whole(path).decode()))
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise BackendError(f"{path}: {_said(error.errors()[0])}; {KEYS}") from error
    except ValueError as error:
        raise BackendError(f"{path}: no TOML in UTF-8: {error}") from error
    found._path = path
    return found


def _said(error: Any) -> str:
    """`failure 2, case: input should be a valid string`."""
    *entry, key = (part + 1 if isinstance(part, int) else part for part in error["loc"])
    where = f"{' '.join(map(str, entry))}, " if entry else ""
    return f"{where}{key}: {error['msg'][0].lower()}{error['msg'][1:]}"


def apply_known(
    outcomes: Iterable[Outcome], known: KnownFailures, ran_whole: Callable[[Known], bool] = lambda entry: True
) -> list[Outcome]:
    """Outcomes with known failures marked `known`; a stale entry, one whose case passes or is not there, fails.

    An entry of which not all that it names has run, by `ran_whole`, is never stale.
    """
    found = list(outcomes)
    judged, stale = list(found), []
    for entry in known.failure:
        mine = [index for index, outcome in enumerate(found) if entry.meets(outcome.kernel, outcome.case)]
        # Of entries that overlap each counts as met, and the first one's reason stands.
        failing = [index for index in mine if found[index].status in ("fail", "known")]
        for index in failing:
            if judged[index].status == "fail":
                judged[index] = replace(judged[index], status="known", reason=f"{entry.reason} ({entry.link})")
        if not failing and ran_whole(entry):
            stale.append(known.stale(entry, passes=bool(mine)))
    return [*judged, *stale]

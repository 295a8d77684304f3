"""Options by which somebody looks at every launch of a command's steps, and what is said of what they saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kernelmux.debug.nan import NotFiniteError
    from kernelmux.run.session import Session

CASE = Path("nan.json")
"""Where the launch goes that made a NaN, in the folder that the command is run in."""
CheckNan = Annotated[
    bool,
    typer.Option("--check-nan", help=f"Stop at the first node that makes a NaN or infinity; {CASE} gets its inputs."),
]


@dataclass(frozen=True)
class Observing:
    """What was asked for."""

    check_nan: bool = False

    @contextmanager
    def over(self, session: Session) -> Iterator[None]:
        """Looks at the session's steps within the block. NotFiniteError where a node makes a NaN, once it is saved."""
        if not self.check_nan:
            yield
            return
        from kernelmux.debug.nan import NanCheck, NotFiniteError

        try:
            with session.watched(NanCheck(session)):
                yield
        except NotFiniteError as error:
            raise error.saved(_saved(error)) from error


def _saved(error: NotFiniteError) -> str:
    """Writes the launch to CASE, and says how to run it again; or why that cannot be."""
    from kernelmux.conformance.case_file import write_kept
    from kernelmux.errors import KernelmuxError

    try:
        write_kept(error.given.node, error.given.tensors, CASE)
    except KernelmuxError as fault:
        return f"its inputs are not saved: {fault}"
    return f"again: kernelmux check --cases {CASE} --kernel {error.kernel}"

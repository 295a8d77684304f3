"""Options by which somebody looks at every launch of a command's steps, and what is said of what they saw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelmux.cli.output import say

if TYPE_CHECKING:
    from kernelmux.debug.nan import NotFiniteError
    from kernelmux.debug.shadow import Shadow
    from kernelmux.run.session import Session
    from kernelmux.run.watch import Observer

CASE = Path("nan.json")
"""Where the launch goes that made a NaN, in the folder of the command; with a number where one lies there."""
CheckNan = Annotated[
    bool,
    typer.Option("--check-nan", help=f"Stop at the first node that makes a NaN or infinity; {CASE} gets its inputs."),
]


Shadowed = Annotated[
    str | None,
    typer.Option(
        "--shadow",
        metavar="BACKEND[:KERNEL][:1/N]",
        help="Make the launches of every N-th step, else the 100th, again by that backend, and compare.",
    ),
]
ShadowBound = Annotated[
    float | None,
    typer.Option("--shadow-bound", min=0.0, metavar="NMSE", help="Warn beyond it, not beyond ten times what both say."),
]
WatchdogSeconds = Annotated[
    float | None,
    typer.Option(
        "--watchdog",
        min=0.01,
        max=1e6,
        metavar="SECONDS",
        help="End with exit code 75 where a launch takes longer, and say which; steps run launch by launch.",
    ),
]
Annotating = Annotated[
    bool, typer.Option("--annotate", help="Name nodes and kernels for nsys (NVTX) and torch's profiler.")
]
SHOWN = 5
"""Nodes beyond their bound, or without a second kernel, that are told one by one."""


@dataclass
class Observing:
    """What was asked for; and, once a session has run, what was seen."""

    check_nan: bool = False
    shadow: str | None = None
    shadow_bound: float | None = None
    watchdog: float | None = None
    annotate: bool = False
    _seen: Shadow | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Errors before anything is opened."""
        if self.shadow is not None:
            from kernelmux.debug.second import Second

            Second.parse(self.shadow)
        elif self.shadow_bound is not None:
            raise typer.BadParameter("it is of a shadow: ask for one by --shadow BACKEND", param_hint="--shadow-bound")

    @property
    def observes(self) -> bool:
        """Whether anything was."""
        return bool(self.check_nan or self.shadow or self.watchdog or self.annotate)

    @contextmanager
    def over(self, session: Session) -> Iterator[None]:
        """Looks at the session's steps within the block. NotFiniteError where a node makes a NaN, once it is saved."""
        if not self.observes:
            yield
            return
        from kernelmux.debug.nan import NotFiniteError
        from kernelmux.debug.together import Together
        from kernelmux.errors import KernelmuxError

        try:
            with ExitStack() as stack:
                observers = list(self._observers(session, stack))
                stack.enter_context(session.watched(Together(observers)))
                yield
        except NotFiniteError as error:
            self.tell()
            raise error.saved(_saved(error)) from error
        except KernelmuxError:
            # The caller tells of it where all went well.
            self.tell()
            raise

    def _observers(self, session: Session, stack: ExitStack) -> Iterator[Observer]:
        if self.annotate:
            from kernelmux.debug.annotate import Annotate

            yield Annotate()
        if self.watchdog is not None:
            from kernelmux.debug.watchdog import Watchdog

            dog = Watchdog(self.watchdog)
            stack.enter_context(dog.watching())
            yield dog
        if self.check_nan:
            from kernelmux.debug.nan import NanCheck

            yield NanCheck(session)
        if self.shadow is not None:
            from kernelmux.debug.second import Second
            from kernelmux.debug.shadow import Shadow

            self._seen = Shadow(session, Second.parse(self.shadow), self.shadow_bound)
            yield self._seen

    def tell(self) -> None:
        """On stderr: what was compared, and in red each node that was beyond its bound."""
        if (seen := self._seen) is None:
            return
        launches = sum(each.launches for each in seen.found)
        line = (
            f"shadow {self.shadow}: {seen.sampled} of {seen.walks} steps, {launches} launches of {len(seen.found)} "
            f"nodes compared, {len(seen.over)} beyond the bound"
        )
        say(f"{line}; the furthest: {seen.found[0]}" if seen.found and not seen.over else line, err=True)
        if not seen.found:
            say("kernelmux: shadow: nothing was compared", err=True, fg="red", bold=True)
        for each in seen.over[:SHOWN]:
            say(f"kernelmux: shadow: {each}", err=True, fg="red", bold=True)
        if len(seen.over) > SHOWN:
            say(f"kernelmux: shadow: {len(seen.over) - SHOWN} nodes more; --json has all", err=True)
        reasons: dict[str, list[str]] = {}
        for node, reason in seen.missing.items():
            reasons.setdefault(reason, []).append(node)
        for reason, nodes in reasons.items():
            named = ", ".join(nodes[:SHOWN]) + (", ..." if len(nodes) > SHOWN else "")
            say(f"shadow: {len(nodes)} nodes not compared ({reason}): {named}", err=True)

    def described(self) -> dict[str, Any]:
        """What was seen, for a script."""
        if (seen := self._seen) is None:
            return {}
        nodes = [{**asdict(each), "worst": _number(each.worst), "mean": _number(each.mean)} for each in seen.found]
        return {"shadow": {"steps": seen.walks, "sampled": seen.sampled, "nodes": nodes, "missing": seen.missing}}


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "infinite"


def _saved(error: NotFiniteError) -> str:
    """Writes the launch to CASE, and says how to run it again; or why that cannot be."""
    from kernelmux.conformance.case_file import write_kept
    from kernelmux.errors import KernelmuxError

    path, number = CASE, 1
    while path.exists() or path.with_suffix(".safetensors").exists():
        number += 1
        path = CASE.with_stem(f"{CASE.stem}-{number}")
    try:
        write_kept(error.given.node, error.given.tensors, path)
    except KernelmuxError as fault:
        return f"its inputs are not saved: {fault}"
    return f"again: kernelmux check --cases {path} --kernel {error.kernel}"

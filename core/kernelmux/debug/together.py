"""Several observers of the same launches, as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kernelmux.contract.kernel import Launch
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer


class Together(Observer):
    """Has each observer see the walks that it wants; the launch is made once, within those that make it themselves."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all, self._here = observers, [*observers]
        self._recorded: dict[tuple[Observer, ...], Together] = {}

    def wants(self, walk: Walk, rehearsal: bool) -> bool:
        self._here = [observer for observer in self._all if observer.wants(walk, rehearsal)]
        return bool(self._here)

    def recorded(self, walk: Walk) -> Observer | None:
        found = [recorded for observer in self._here if (recorded := observer.recorded(walk)) is not None]
        if len(found) < len(self._here):
            return None
        return self._recorded.setdefault(tuple(found), Together(found))

    def before(self, walk: Walk, index: int) -> None:
        for observer in self._here:
            observer.before(walk, index)

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        for observer in self._here:
            call = partial(observer.launch, walk, index, call)
        call()

    def launch_beside(self, walk: Walk, index: int, kernel: str, call: Launch) -> None:
        for observer in self._here:
            call = partial(observer.launch_beside, walk, index, kernel, call)
        call()

    def after(self, walk: Walk, index: int) -> None:
        for observer in self._here:
            observer.after(walk, index)

    def end(self, walk: Walk) -> None:
        for observer in self._here:
            observer.end(walk)

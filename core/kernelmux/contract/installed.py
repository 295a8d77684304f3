"""The backends that installed distributions bring, and which of them to load.

Enters: the entry point group `kernelmux.backends`, and KERNELMUX_BACKENDS. Leaves: entry points by backend and
distribution; nothing is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points

from kernelmux.errors import BackendError, nearest, shown

GROUP = "kernelmux.backends"
ALLOW = "KERNELMUX_BACKENDS"
"""Environment variable: a comma-separated list of the only backends to load; `NAME@DISTRIBUTION` is that one's."""

Owners = Mapping[str, EntryPoint]
"""Of one name: entry points by the distribution that brings them."""


def wanted_backends() -> tuple[Mapping[str, Owners], bool]:
    """Those to load, by name, and whether KERNELMUX_BACKENDS asks for them. BackendError names what is none.

    A name that several bring has all of them, unless it says whose.
    """
    found = _installed()
    asked = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    wanted: dict[str, Owners] = {}
    for name, _, whose in (each.partition("@") for each in asked or sorted(found)):
        if name not in found:
            raise BackendError(f"{ALLOW} names {shown(name)}{nearest(name, found)}")
        owners = found[name]
        if whose and whose not in owners:
            raise BackendError(f"{ALLOW} names {shown(whose)} for {name!r}{nearest(whose, owners)}")
        wanted[name] = {whose: owners[whose]} if whose else owners
    return wanted, bool(asked)


def _installed() -> dict[str, Owners]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, {})[entry.dist.name if entry.dist else entry.value] = entry
    return dict(found)


def ambiguous(name: str, owners: Sequence[str]) -> str:
    """What to do where several distributions bring a backend of one name."""
    others = [other for other in sorted(_installed()) if other != name]
    return (
        f"{' and '.join(owners)} each bring a backend {name!r}: uninstall all but one, or set "
        f"{ALLOW}={','.join([*others, f'{name}@{owners[0]}'])} to take that one's"
    )


def libraries(entry: EntryPoint) -> tuple[str, ...]:
    """The names of the distributions that a backend's own requires, extras' too, and its own."""
    if entry.dist is None:
        return ()
    names = (re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in entry.dist.requires or ())
    return tuple(dict.fromkeys(name for name in names if not name.startswith("kernelmux")))

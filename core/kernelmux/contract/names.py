"""How backends, their kernels and their ops may be called, so that a policy can name them.

Enters: a name. Leaves: nothing, or a line that says the rule. A policy's grammar is made of the same patterns.
"""

from __future__ import annotations

import re

from kernelmux.errors import BackendError, shown

BACKEND, KERNEL, OP = r"[a-z][a-z0-9_-]*", r"[A-Za-z0-9_.-]+", r"[a-z][a-z0-9_]*"
"""Regular expressions of names in full."""
RESERVED = AUTO, PARTS = "auto", "parts"
"""What a policy says in place of a name: whichever kernel is the fastest; a fused op's plain nodes."""


def check_backend_name(name: str) -> None:
    """BackendError for a name that no policy can spell."""
    if name in RESERVED:
        raise BackendError(f"a backend cannot be named {name!r}: a policy says it in place of a name")
    if not re.fullmatch(BACKEND, name):
        raise BackendError(
            f"a backend cannot be named {shown(name)}, which no policy can spell: a lower-case letter comes first, "
            f"then such letters, digits, _ and -{_instead(name)}"
        )


def _instead(name: str) -> str:
    close = re.sub(r"[^a-z0-9_-]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789_")
    return f", as {close!r}" if re.fullmatch(BACKEND, close) and close not in RESERVED and len(close) < 40 else ""


def check_kernel_name(subject: str, name: object) -> None:
    """BackendError for a kernel's name, of what `subject` is, that no policy can spell."""
    if not (isinstance(name, str) and re.fullmatch(KERNEL, name)):
        raise BackendError(
            f"{subject}.name must be a name without its backend, not {shown(name)}: letters, digits, _ . and -"
        )


def check_op_name(name: str) -> None:
    """BackendError for an op that no hook and no policy can name."""
    if not re.fullmatch(OP, name):
        raise BackendError(f"it brings an op named {shown(name)}: a lower-case letter, then such letters, digits and _")

"""What kernelmux raises: one tree, so that a caller may catch all of it or one stage of the flow.

Every message is a small lesson: what was asked, what exists, and what would work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KernelmuxError(Exception):
    """Any error that kernelmux raises on purpose; the command line prints it as one line and exits with 2."""


class ModelError(KernelmuxError):
    """A model file cannot be read, or asks for something that is not built in."""


class GraphError(KernelmuxError):
    """A graph is malformed: order, a dangling input, a shape, a format, an alias."""


class PolicyError(KernelmuxError):
    """A policy file is wrong; the message names file and line."""


class PlanError(KernelmuxError):
    """No plan satisfies graph, policy and device; the message lists every refusal."""


class BackendError(KernelmuxError):
    """A backend is missing, broken, or breaks its contract."""


class LaunchError(KernelmuxError):
    """A bound kernel raised while a plan was walked; the message names node, kernel, shapes and device.

    After a `sticky` one (a fault on the device itself) nothing more can run in this process.
    """

    def __init__(
        self, message: str, node: str, kernel: str, sticky: bool = False, device: str = "", step: int = 0
    ) -> None:
        """`step` is the node's place in the walk, from 1."""
        super().__init__(message)
        self.node = node
        self.kernel = kernel
        self.sticky = sticky
        self.device = device
        self.step = step


def nearest(asked: str, known: Iterable[str]) -> str:
    """The clause for an unknown name: ` (did you mean 'x'?)` where one is close, then all that exist."""
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(asked.lower(), folded, n=1)
    guess = f" (did you mean {folded[close[0]]!r}?)" if close else ""
    return f"{guess}; known: {', '.join(names) or 'none'}"


def where_raised(error: BaseException) -> str:
    """`file.py:123`: the innermost frame of an error that is neither core's nor torch's, else the innermost."""
    return "unknown"

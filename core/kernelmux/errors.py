"""What kernelmux raises: one tree, so that a caller may catch all of it or one stage of the flow.

Every message is a small lesson: what was asked, what exists, and what would work.
"""

from __future__ import annotations

import difflib
import itertools
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import UnionType

LONGEST_MESSAGE = 6000
"""Characters of a message: what is longer loses its middle."""
LONGEST_SHOWN = 80
"""Characters of a string of a file that messages show."""


class KernelmuxError(Exception):
    """Any error that kernelmux raises on purpose; the command line prints it as one line and exits with 2.

    What a program needs of the message are attributes, None where the error is about no such thing.
    """

    def __init__(
        self,
        message: str = "",
        *,
        file: str | None = None,
        line: int | None = None,
        node: str | None = None,
        kernel: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.file = file
        self.line = line
        self.node = node
        self.kernel = kernel
        self.backend = kernel.partition(":")[0] if kernel and backend is None else backend


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

    node: str
    kernel: str

    def __init__(
        self,
        message: str,
        node: str = "",
        kernel: str = "",
        sticky: bool = False,
        device: str = "",
        step: int = 0,
        reason: str = "",
    ) -> None:
        """`step` is the node's place in the walk, from 1; `reason` what the kernel itself said, the message untold."""
        # A compiler's message may have many lines; who prints an error, or a list of them, prints one.
        message, reason = (" ".join(text.split()) for text in (message, reason or message))
        super().__init__(message, node=node, kernel=kernel)
        self.reason = reason
        self.sticky = sticky
        self.device = device
        self.step = step

    def strictly(self) -> LaunchError:
        """The same of a plan that is strict, where the policy would go on."""
        said = f'{self}; the policy goes on without it (on_error = "next"), and strict does not'
        return LaunchError(said, self.node, self.kernel, self.sticky, self.device, self.step, self.reason)


class LogitsError(KernelmuxError):
    """Logits are NaN or infinite, so that no token follows; the message says which, and how to find the node."""


def contained(error: BaseException) -> BaseException:
    """What code of a backend's raised, to be told of: whatever it is, for the process is not a backend's to end.

    Ctrl-C alone is the user's, and goes on.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error


def printable(text: str) -> str:
    """A message as a terminal may have it: what would control that is an escape, as `\\x1b`, and too long a middle cut.

    Lines stay lines.
    """
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} characters more ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text)


def shown(thing: object) -> str:
    """How messages have a string of a file: quoted, its line ends and controls escaped, cut where it is long."""
    if not isinstance(thing, str):
        return _cut(repr(thing))
    return repr(_cut(thing))


def label(text: str) -> str:
    """The same without quotes, where a string of a file is what something is called."""
    return "".join(char if char.isprintable() else _escaped(char) for char in _cut(text))


def check_type(given: object, kinds: type | UnionType | tuple[()], told: str, error: type[KernelmuxError]) -> None:
    """The error where an argument is of no such kind; `told` says of which: `max_tokens is a whole number`."""
    if not isinstance(given, kinds):
        raise error(f"{told}, not {type(given).__name__} ({shown(given)})")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def nearest(asked: str, known: Iterable[str]) -> str:
    """The clause for an unknown name: ` (did you mean 'x'?)` where one is close, then all that exist."""
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    # Of the same letters, in whatever order, is nearer than difflib can tell: matmul is mul_mat.
    alike = [name for name in folded if _letters(name) == _letters(asked.lower())]
    close = alike or difflib.get_close_matches(asked.lower(), folded, n=1)
    guess = f" (did you mean {folded[close[0]]!r}?)" if close else ""
    return f"{guess}; known: {', '.join(names) or 'none'}"


def _letters(name: str) -> list[str]:
    return sorted(filter(str.isalnum, name))


def told(error: BaseException) -> str:
    """What an exception says, of whatever type: a backend's own may raise even when it is asked for its words."""
    try:
        return str(error)
    except BaseException as another:
        return f"({type(contained(another)).__name__} where its words are made)"


def named(error: BaseException) -> str:
    """`TypeError: what it says`."""
    return f"{type(error).__name__}: {told(error)}"


def where_raised(error: BaseException) -> str:
    """`package/file.py:12`: the innermost line of the backend that core called; where it called none, of all.

    The package that core entered is the backend's; what that goes on to call, a library or core itself, is not.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return place(error.filename, error.lineno)
    frames = [
        (str(frame.f_globals.get("__name__")).partition(".")[0], frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if not frames:
        return "an unknown line"
    entered = next((index for index, (package, *_) in enumerate(frames) if package == "kernelmux"), 0)
    theirs = [frame for frame in frames[entered:] if frame[0] not in _BETWEEN] or frames[-1:]
    return [place(file, line) for package, file, line in theirs if package == theirs[0][0]][-1]


def place(file: str, line: int | None) -> str:
    """`package/file.py:12`: a line of a file, which is named from its outermost package on."""
    path = Path(file)
    packages = itertools.takewhile(lambda folder: folder.name and (folder / "__init__.py").is_file(), path.parents)
    return "/".join([*reversed([folder.name for folder in packages]), f"{path.name}:{line}"])


_BETWEEN = {"kernelmux", "torch", *sys.stdlib_module_names}
"""Packages through which core calls a backend."""

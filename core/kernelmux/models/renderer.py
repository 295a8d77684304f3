"""The process that renders chat templates: a program of its own, which imports jinja2 and the standard library alone.

Enters, on stdin: requests, a line of JSON each (`template`, `variables`, and what it may take: `seconds` of processor
time, `memory` in bytes, `characters` of text). Leaves, on stdout: a line for each, with the `text`, or the `error` and
its `line` in the template. A template comes from a file that may not be
trusted: jinja's sandbox keeps it from Python, and the limits of this process bound its time, steps and memory. Who asks
is chat.py.

What templates may rely on is what transformers gives them (`apply_chat_template`).
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: who asks ends the process when it takes too long.
    resource = None  # type: ignore[assignment]


class Generation(Extension):
    """`{% generation %}`: what an assistant says, which transformers can tell apart in training; here it is text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class RefusedError(TemplateError):
    """The template called `raise_exception`."""


def refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def now(layout: str) -> str:
    return datetime.now().strftime(layout)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates are compiled in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=refuse, strftime_now=now)
    return made


def limit(seconds: int, memory: int) -> None:
    """Bounds this process: `seconds` of processor time from now on, `memory` bytes of addresses in all."""
    if resource is not None:
        lower(resource.RLIMIT_AS, memory)
        lower(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)


def lower(kind: int, amount: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if most == resource.RLIM_INFINITY else min(amount, most), most))


def rendered(
    make: Callable[[str], Any], template: str, variables: Mapping[str, Any], characters: int
) -> dict[str, Any]:
    try:
        parts = []
        for part in make(template).generate(variables):
            parts.append(part)
            characters -= len(part)
            if characters < 0:
                return {"error": "writes more text than it may", "line": None}
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": "takes more memory than it may", "line": None}
    except Exception as error:  # a template may raise what any expression may
        kind = "refuses these messages" if isinstance(error, RefusedError) else type(error).__name__
        return {"error": f"{kind}: {str(error)[:2000]}", "line": line(error)}


def line(error: Exception) -> int | None:
    """The line of the template."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def main() -> None:
    make = environment().from_string
    for request in sys.stdin:
        asked = json.loads(request)
        limit(asked["seconds"], asked["memory"])
        answer = rendered(make, asked["template"], asked["variables"], asked["characters"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

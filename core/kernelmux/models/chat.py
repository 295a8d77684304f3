"""Renders the messages of a chat as the one text that a model was trained on.

Enters: the template of a model file (`tokenizer.chat_template`) and messages. Leaves: text, to be encoded with
`add_special=False`. The template comes from a file that may not be trusted, so it runs in jinja's sandbox, which keeps
it from Python but does not bound its time.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kernelmux.errors import ModelError, label


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
) -> str:
    """The text of `messages`, by default with the opening of the answer; ModelError where the template fails.

    Trimming, loop controls and the two functions are what templates written for `apply_chat_template` rely on.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may raise what any expression may
        line = _line(error)
        where = "" if line is None else f", line {line}"
        raise ModelError(f"chat template{where}: {_reason(error)}", line=line) from error


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _line(error: Exception) -> int | None:
    """The line of the template."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _reason(error: Exception) -> str:
    kind = "refuses these messages" if isinstance(error, _RefusedError) else type(error).__name__
    return f"{kind}: {label(' '.join(str(error).split()))}"

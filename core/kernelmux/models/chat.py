"""Renders the messages of a chat as the one text that a model was trained on.

Enters: the template of a model (`tokenizer.chat_template`), messages, tools and documents. Leaves: text, to be encoded
with `add_special=False`. The template comes from a file that may not be trusted, so a process of its own renders it
(renderer.py): jinja's sandbox does not bound what a template takes, and in this process nothing could.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from kernelmux.errors import ModelError, label, shown
from kernelmux.models.quoting import Quoting, unescaped
from kernelmux.models.tokenizer import Tokenizer

SECONDS = 2
"""Of processor time that a template may take: one takes milliseconds."""
PATIENCE = 60.0
"""Seconds until its process is ended, on however busy a machine."""
MEMORY = 1 << 29
"""Bytes of addresses that its process may have."""
LONGEST_TEMPLATE = 1 << 20
LONGEST_TEXT = 1 << 24
"""Characters."""
TOOL_USE = "tool_use"
"""The template of several that is for messages with tools, as transformers chooses."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message may call what the model thought, as transformers reads it."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A template, with the tokens of the model that it is for; its process is kept from one rendering to the next."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        if len(template) > LONGEST_TEMPLATE:
            raise ModelError(f"chat template: {len(template)} characters; up to {LONGEST_TEMPLATE} are read")
        self._template = template
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._renderer: _Renderer | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        quoted: bool = False,
        add_generation_prompt: bool = True,
    ) -> tuple[str, str]:
        """The text of `messages`, by default with the opening of the answer; ModelError where the template fails.

        `quoted` has the control tokens that messages, tools and documents write be text: then the second result is the
        mark for `Tokenizer.encode`, "" where there are none.
        """
        said = _plain({"messages": [_message(message) for message in messages], "tools": tools, "documents": documents})
        marked, mark = self._quoting.quote(said, self._template) if quoted else (said, "")
        variables = {**self._tokens, **marked, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            if self._renderer is None or not self._renderer.usable:
                self._renderer = _Renderer()
            answer = self._renderer.ask(
                template=self._template,
                variables=variables,
                seconds=SECONDS,
                memory=MEMORY,
                characters=LONGEST_TEXT,
            )
        if "text" in answer:
            return unescaped(answer["text"], mark), mark
        where = "" if answer["line"] is None else f", line {answer['line']}"
        reason = answer["error"].replace(mark, "") if mark else answer["error"]
        raise ModelError(f"chat template{where}: {label(' '.join(reason.split()))}", line=answer["line"])

    @cached_property
    def _quoting(self) -> Quoting:
        return Quoting(self._tokenizer.control_tokens)

    @cached_property
    def _tokens(self) -> dict[str, str]:
        """What a template may call the model's tokens; one that a model does not have is no text."""
        vocabulary = self._tokenizer.vocabulary
        ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "unk_token": vocabulary.unk_id}
        return {role: "" if id is None else self._tokenizer.token(id) for role, id in ids.items()}


def stated_template(metadata: Mapping[str, Any], tools: bool) -> str | None:
    """The template that a model's file states, of several the one for tools where there are some; None without one."""
    stated = metadata.get("tokenizer.chat_template")
    if isinstance(stated, list):  # tokenizer_config.json: each has a name
        named = {each.get("name"): each.get("template") for each in stated if isinstance(each, Mapping)}
        stated = (named.get(TOOL_USE) if tools else None) or named.get("default")
    elif tools:
        stated = metadata.get(f"tokenizer.chat_template.{TOOL_USE}", stated)
    if stated is not None and not isinstance(stated, str):
        raise ModelError(f"the file's chat template is {shown(str(stated))}, not text")
    return stated


def _message(message: Message) -> dict[str, Any]:
    """As templates expect one: without keys that say nothing, and thoughts under the names that templates read."""
    said = {key: value for key, value in message.items() if value is not None}
    thought = next((said[name] for name in REASONING if name in said), None)
    return said if thought is None else {"thinking": thought, **said, "reasoning_content": thought}


def _plain(said: dict[str, Any]) -> dict[str, Any]:
    """A copy, of JSON's types alone."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(said))
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"messages, tools and documents are text, numbers, lists and dicts: {error}") from error
    return copy


class _Renderer:
    """The process, from its first request until one fails."""

    def __init__(self) -> None:
        if not sys.executable:
            raise ModelError("chat template: there is no Python to render it with (sys.executable is empty)")
        # Without site, which takes as long as all the rest: the path is this process's.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(Path(__file__).with_name("renderer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C at the terminal is not for it: a chat goes on after one.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"},
        )
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _ended, self._process, self._owner)

    @property
    def usable(self) -> bool:
        """False once it has ended, and in a process that was forked from the one that started it."""
        return self._end.alive and self._owner == os.getpid() and self._process.poll() is None

    def ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        too_long = threading.Timer(PATIENCE, process.kill)
        too_long.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        finally:
            too_long.cancel()
        if answer.endswith(b"\n"):
            found: dict[str, Any] = json.loads(answer)
            return found
        return {"error": self._failure(), "line": None}

    def _failure(self) -> str:
        """Why the process ended, which it now has."""
        process = self._process
        process.kill()
        code = process.wait()
        said = process.stderr.read().decode(errors="replace").strip().splitlines() if process.stderr else []
        self._end()
        if code in _TOO_LONG:
            return f"takes more than {SECONDS} s of processor time"
        if said and "MemoryError" not in said[-1]:
            return f"its process ended: {said[-1]}"
        return f"its process ended ({code}): it takes more than {MEMORY >> 20} MiB of memory, or {PATIENCE:.0f} s"


_TOO_LONG = (-24, 128 + 24)
"""How a process ends that SIGXCPU ended."""


def _ended(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):  # for what was not written any more
                    pipe.close()

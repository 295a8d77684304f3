"""Keeps what users write from being control tokens, when a template puts it between its own.

Enters: messages, and the control tokens of a vocabulary. Leaves: the same messages with a mark within each control
token that is written in them, and at an end where one could be completed by what the template puts there. The mark is a
private-use character that none of them has; after the template is rendered its own control tokens are found, then the
marks are taken out, and what is left is split into words as if they had never been there. Messages' roles are the
template's to make tokens of, and are left alone. A template that changes letters (`lower`) can still make one.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Collection, Mapping
from typing import Any

from kernelmux.errors import ModelError
from kernelmux.models.special import SpecialTokens

MARKS = range(0xE000, 0xF900)


class Quoting:
    """The control tokens of a vocabulary, found in what users write."""

    def __init__(self, tokens: Collection[str]) -> None:
        self._tokens = SpecialTokens(dict.fromkeys(tokens, 0))
        self._begins = sorted(tokens)
        self._ends = sorted(token[::-1] for token in tokens)
        self._longest = max(map(len, tokens), default=0)

    def quote(self, said: Mapping[str, Any], template: str) -> tuple[Mapping[str, Any], str]:
        """What is `said` (messages, and other things of JSON's types) with marks, and the mark; "" without any."""
        if not self._tokens:
            return said, ""
        written = json.dumps([said, template], ensure_ascii=False)
        # A template may write JSON in ASCII, where the mark is an escape: that is to be nobody else's either.
        free = (chr(code) for code in MARKS if chr(code) not in written and f"\\u{code:04x}" not in written.lower())
        mark = next(free, "")
        if not mark:
            raise ModelError("messages: they and the template use every private character from U+E000 to U+F8FF")
        marked = self._marked(said, mark) | {"messages": [self._message(each, mark) for each in said["messages"]]}
        return (marked, mark) if marked != said else (said, "")

    def _message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        return {key: item if key == "role" else self._marked(item, mark, key) for key, item in message.items()}

    def _marked(self, value: Any, mark: str, key: str = "") -> Any:
        if isinstance(value, str):
            # Templates compare types, and put nothing beside them.
            return self._within(value, mark) if key == "type" else self._text(value, mark)
        if isinstance(value, Mapping):
            return {self._within(key, mark): self._marked(item, mark, key) for key, item in value.items()}
        return [self._marked(item, mark) for item in value] if isinstance(value, list) else value

    def _within(self, text: str, mark: str) -> str:
        inside = sorted({start + 1 for start, end in self._tokens.written(text) if end - start > 1}, reverse=True)
        for at in inside:
            text = f"{text[:at]}{mark}{text[at:]}"
        return text

    def _text(self, text: str, mark: str) -> str:
        before = mark if _completes(self._ends, text[: self._longest - 1][::-1]) else ""
        after = mark if _completes(self._begins, text[1 - self._longest :]) else ""
        return f"{before}{self._within(text, mark)}{after}"


def _completes(tokens: list[str], end: str) -> bool:
    """Whether what `end` ends with is how one of the tokens, which are sorted, begins."""
    for start in range(len(end)):
        part = end[start:]
        at = bisect.bisect_left(tokens, part)
        if at < len(tokens) and tokens[at].startswith(part):
            return True
    return False


def unescaped(text: str, mark: str) -> str:
    """A rendered text whose marks are characters, wherever it has JSON in ASCII."""
    return text.replace(f"\\u{ord(mark):04x}", mark) if mark else text


def after(text: str, mark: str, characters: int) -> str:
    """What follows the first `characters` of a text, in which marks do not count."""
    if not mark:
        return text[characters:]
    parts = text.split(mark)
    for place, part in enumerate(parts):
        if len(part) >= characters:
            return mark.join([part[characters:], *parts[place + 1 :]])
        characters -= len(part)
    return ""

"""Rules as the text of a policy file, before all that another file has.

Enters: rules, and a policy file's text. Leaves: text that `parse_policy` reads as those rules, then the file's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kernelmux.policy.grammar import Rule


def with_rules(rules: Iterable[Rule], text: str) -> str:
    """A policy's text with rules before all of its own; keys of the document stay before all tables."""
    first = re.search(r"^[ \t]*\[", text, re.MULTILINE)
    head, tables = (text[: first.start()], text[first.start() :]) if first else (text, "")
    parts = [head.strip("\n"), *map(rule_text, rules), tables.strip("\n")]
    return "\n\n".join(part for part in parts if part) + "\n"


def rule_text(rule: Rule) -> str:
    """A rule as TOML."""
    given = rule.model_dump(exclude_none=True, mode="json")
    return "\n".join(["[[rule]]", *(f"{key} = {_value(value)}" for key, value in given.items())])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    # TOML's strings, numbers and lists of them are JSON's, but that it takes no DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

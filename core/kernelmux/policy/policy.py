"""The policy file: which kernel runs which op, as data.

Enters: TOML, and `--use` options. Leaves: a frozen Policy, or a PolicyError that names file, line, what was asked, what
exists and the nearest spelling. Rules stand in order and the first that matches a node wins; `defaults` come last.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kernelmux.contract.device import Device
from kernelmux.errors import PolicyError, nearest
from kernelmux.graph.graph import TensorNode
from kernelmux.policy.grammar import TABLES, Document, Rule


@dataclass(frozen=True)
class Policy:
    """A checked policy: the document, where it came from, and the line of each rule and requirement."""

    document: Document
    source: str
    lines: tuple[int, ...]
    """The line of each rule; 0 for a rule from `--use`."""
    require_lines: tuple[int, ...] = ()
    defaults_line: int = 0
    """0 where the file leaves them out."""
    forbid_line: int = 0

    @cached_property
    def row_bounds(self) -> frozenset[int]:
        """Row counts after which a rule or requirement may begin or cease to match."""
        tables = (*self.document.rule, *self.document.require)
        ranges = [table.m for table in tables if table.m is not None]
        bounds = {r.low - 1 for r in ranges} | {r.high for r in ranges if r.high is not None}
        return frozenset(bound for bound in bounds if bound > 0)

    def telling_rows(self, low: int, high: int) -> list[int]:
        """Row counts in low..high that stand for all of them: rules match alike between two."""
        edges = {low, *(bound + step for bound in self.row_bounds for step in (0, 1))}
        return sorted(rows for rows in edges if low <= rows <= high)

    def match(self, node: TensorNode, rows: int, device: Device) -> int | None:
        """The index of the first rule that matches, or None where the defaults hold."""
        for index, rule in enumerate(self.document.rule):
            if rule.matches(node, rows, device):
                return index
        return None

    def max_error(self, rule: int | None) -> float | None:
        """The error budget (NMSE) of nodes under a rule."""
        own = None if rule is None else self.document.rule[rule].max_error
        return self.document.defaults.max_error if own is None else own

    def on_error(self, rule: int | None) -> str:
        """What a raising kernel means for nodes under a rule: `next` or `error`."""
        own = None if rule is None else self.document.rule[rule].on_error
        return self.document.defaults.on_error if own is None else own

    def line(self, index: int | None) -> int | None:
        """The line of a rule, or of the defaults; None where the file has none."""
        return (self.defaults_line if index is None else self.lines[index]) or None

    def where(self, index: int | None) -> str:
        """How messages name a rule: `rule 2 (policy.toml:14)`, `--use mul_mat=torch:f32`, or the defaults."""
        if index is None:
            return (
                f"defaults ({self.source}:{self.defaults_line})" if self.defaults_line else f"defaults ({self.source})"
            )
        if line := self.lines[index]:
            return f"rule {index - self.lines.count(0) + 1} ({self.source}:{line})"
        rule = self.document.rule[index]
        return f"--use {','.join(rule.op or ('*',))}={','.join(rule.use)}"

    def with_use(self, options: Iterable[str]) -> Policy:
        """The policy outranked by `OP=KERNEL` options, the last one first; OP `*` is every op, KERNEL may be a list."""
        rules = [_parse_use(option) for option in options][::-1]
        document = self.document.model_copy(update={"rule": (*rules, *self.document.rule)})
        return replace(self, document=document, lines=(*(0 for _ in rules), *self.lines))


def _parse_use(option: str) -> Rule:
    op, equals, kernels = option.partition("=")
    if not (op and equals and kernels):
        raise PolicyError(f"--use {option}: write OP=KERNEL, as mul_mat=torch:int4")
    fields: dict[str, Any] = {"use": kernels.split(",")}
    if op != "*":
        fields["op"] = op
    try:
        return Rule.model_validate(fields)
    except ValidationError as error:
        raise PolicyError(f"--use {option}: {_message(error.errors()[0], Rule)}") from None


def default_policy() -> Policy:
    """The policy that holds where no file is given; it is a file of this package."""
    text = resources.files("kernelmux.policy").joinpath("default.toml").read_text("utf-8")
    return parse_policy(text, "default.toml")


def read_policy(path: str | Path) -> Policy:
    """Reads a policy file; PolicyError names file, line, and what would work."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PolicyError(f"{path}: the policy file cannot be read: {reason}", file=str(path)) from error
    return parse_policy(text, str(path))


def parse_policy(text: str, source: str) -> Policy:
    """Checks a policy's text; `source` is how messages call it."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else _line_of_fault(text, error)
        raise PolicyError(f"{source}:{line}: not TOML: {error}", file=source, line=line) from error
    lines = _line_numbers(text)
    try:
        document = Document.model_validate(data)
    except ValidationError as error:
        # A misspelt key comes before the key that is then missing.
        first = min(error.errors(), key=lambda fault: fault["type"] == "missing")
        line = _line_of(lines, first["loc"])
        raise PolicyError(f"{source}:{line}: {_message(first, Document)}", file=source, line=line) from None
    rules = tuple(_line_of(lines, ("rule", index)) for index in range(len(document.rule)))
    requires = tuple(_line_of(lines, ("require", index)) for index in range(len(document.require)))
    defaults, forbid = lines.get(("defaults",), 0), lines.get(("forbid",), 0)
    return Policy(document, source, rules, requires, defaults, forbid)


def _line_of_fault(text: str, error: Exception) -> int:
    """The line of a fault for which tomllib names none: the document's end, or a number too long to read."""
    if "end of document" in str(error):
        return text.count("\n") + 1
    number = re.search(r"\d{4300}", text)
    return text.count("\n", 0, number.start()) + 1 if number else 1


_HEADER = re.compile(r"""\s*(\[\[?)\s*([\w"'.-]+)\s*\]\]?""")
_KEY = re.compile(r"""\s*(["']?)([\w-]+)\1\s*[=.]""")


def _line_numbers(text: str) -> Mapping[tuple[int | str, ...], int]:
    """The line of every table and key, for messages (tomllib tells no positions)."""
    lines: dict[tuple[int | str, ...], int] = {}
    table: tuple[int | str, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            name = header[2]
            table = (name,)
            if header[1] == "[[":
                counts[name] = counts.get(name, -1) + 1
                table = (name, counts[name])
            lines.setdefault(table, number)
            lines.setdefault((name,), number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, key[2]), number)
    return lines


def _line_of(lines: Mapping[tuple[int | str, ...], int], path: Sequence[int | str]) -> int:
    """The line of the longest known part of `path`."""
    for length in range(len(path), 0, -1):
        if tuple(path[:length]) in lines:
            return lines[tuple(path[:length])]
    return 1


def _message(error: Any, table: type[BaseModel]) -> str:
    """One line for a pydantic error, with the keys that exist where one is unknown."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    key = names[-1] if names else "the file"
    outer = TABLES.get(names[0], table) if len(names) > 1 else table
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, outer.model_fields)}"
    if error["type"] == "missing":
        return f"{'.'.join(names[:-1]) or 'it'} lacks the key {key!r}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg']}, not {str(error['input'])[:60]!r}"

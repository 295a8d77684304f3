"""The policy file: which kernel runs which op, as data.

Enters: TOML, and `--use` options. Leaves: a frozen Policy, or a PolicyError that names file, line, what was asked, what
exists and the nearest spelling. Rules stand in order and the first that matches a node wins; `defaults` come last.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kernelmux.contract.device import Device
from kernelmux.errors import PolicyError, check_type, nearest
from kernelmux.files import read_whole
from kernelmux.graph.graph import TensorNode
from kernelmux.policy.grammar import AUTO, TABLES, Document, Rule

DEFAULT = "default"
"""What the default policy is called where a file is asked for."""
EXACT = "exact"
"""What the policy that gives float32's tokens is called."""
SHIPPED = (DEFAULT, EXACT)
"""The policies of this package, which a file may extend."""
USE = "`use` is OP=KERNEL, as 'mul_mat=torch:int4', or a list of such"


@dataclass(frozen=True)
class Policy:
    """A checked policy: the document, where it came from, and the lines of its tables and keys."""

    document: Document
    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    """By path, as `defaults` or `rule.0.use`, of what the file has."""
    options: tuple[str, ...] = ()
    """The `--use` options whose rules stand before the file's."""
    shipped: bool = False
    """Whether nobody asked for it by name: the default policy."""

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

    def match(self, node: TensorNode, rows: int, device: Device, start: int = 0) -> int | None:
        """The index of the first rule from `start` on that matches, or None where the defaults hold."""
        for index, rule in enumerate(self.document.rule[start:], start):
            if rule.matches(node, rows, device):
                return index
        return None

    def max_error(self, rule: int | None) -> float | None:
        """The error budget (NMSE) of nodes under a rule."""
        own = None if rule is None else self.document.rule[rule].max_error
        return self.document.defaults.max_error if own is None else own

    def cache_format(self, device: Device) -> str:
        """How keys and values are stored; `auto` is what activations are stored as on the device."""
        asked = self.document.kv.format
        return device.platform.activations if asked == AUTO else asked

    def on_error(self, rule: int | None) -> str:
        """What a raising kernel means for nodes under a rule: `next` or `error`."""
        own = None if rule is None else self.document.rule[rule].on_error
        return self.document.defaults.on_error if own is None else own

    def line(self, *path: int | str) -> int | None:
        """The line of a table or a key, as `line("rule", 0, "use")`; of the table where the file lacks the key.

        None where it lacks the table, or where the rule is an option's.
        """
        if path[0] == "rule":
            number = int(path[1]) - len(self.options)
            return _line_of(self.lines, ("rule", number, *path[2:])) if number >= 0 else None
        return _line_of(self.lines, path)

    def is_asked_for(self, rule: int | None) -> bool:
        """Whether somebody wrote a rule, or the defaults: in an option or a file.

        Nobody did what the default policy has, nor what a file has because it extends another.
        """
        if rule is not None and rule < len(self.options):
            return True
        written = "defaults.use" in self.lines if rule is None else self.line("rule", rule) is not None
        return written and not self.shipped

    def where(self, index: int | None) -> str:
        """How messages name a rule: `rule 2 (policy.toml:14)`, `--use mul_mat=torch:f32`, or the defaults."""
        if index is None:
            line = self.line("defaults")
            return f"defaults ({self.source}:{line})" if line else f"defaults ({self.source})"
        if index < len(self.options):
            return f"--use {self.options[index]}"
        line = self.line("rule", index)
        # A policy that extends the default has its rules, of which no line is the file's.
        return f"rule {index - len(self.options) + 1} ({f'{self.source}:{line}' if line else 'of the default'})"

    def with_use(self, options: str | Iterable[str]) -> Policy:
        """The policy outranked by `OP=KERNEL` options, the last one first; OP `*` is every op, KERNEL may be a list."""
        check_type(options, Iterable, USE, PolicyError)
        options = (options,) if isinstance(options, str) else tuple(options)[::-1]
        rules = [_parse_use(option) for option in options]
        document = self.document.model_copy(update={"rule": (*rules, *self.document.rule)})
        return replace(self, document=document, options=(*options, *self.options))


def _parse_use(option: str) -> Rule:
    check_type(option, str, USE, PolicyError)
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


def _extended(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file's data over that of the policy which it extends: tables key by key, lists one behind the other."""
    extended = data.get("extends")
    if extended not in SHIPPED:
        return data
    merged = dict(tomllib.loads(_shipped_text(extended)))
    for key, own in data.items():
        base = merged.get(key)
        if isinstance(own, dict) and isinstance(base, dict):
            merged[key] = {**base, **own}
        else:
            merged[key] = [*own, *base] if isinstance(own, list) and isinstance(base, list) else own
    return merged


def default_policy() -> Policy:
    """The policy that holds where no file is given; it is a file of this package."""
    return replace(shipped_policy(DEFAULT), shipped=True)


def shipped_policy(name: str) -> Policy:
    """A policy of this package, as `exact`."""
    return parse_policy(_shipped_text(name), f"{name}.toml")


def _shipped_text(name: str) -> str:
    return resources.files("kernelmux.policy").joinpath(f"{name}.toml").read_text("utf-8")


def read_policy(path: str | Path, written: bytes | None = None) -> Policy:
    """Reads a policy file, or one of this package, as `exact`; PolicyError names file, line, and what would work.

    `written` is what the file has, where it was read already: a pipe can be read once.
    """
    if str(path) == DEFAULT and _is_shipped(path):
        return default_policy()
    return shipped_policy(str(path)) if _is_shipped(path) else parse_policy(policy_text(path, written), str(path))


def _is_shipped(path: str | Path) -> bool:
    return str(path) in SHIPPED and not Path(path).exists()


def policy_text(path: str | Path, written: bytes | None = None) -> str:
    """The text of a policy file, or of one of this package; PolicyError, with a line where it is read and is none."""
    if _is_shipped(path):
        return _shipped_text(str(path))
    try:
        written = read_whole(path) if written is None else written
        text = written.decode("utf-8-sig")
    except OSError as error:
        message = f"{path}: the policy file cannot be read: {error.strerror}"
        raise PolicyError(message, file=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte {error.object[error.start]:#04x}): save it as UTF-8"
        raise _mistake(str(path), line, message) from error
    if text.lstrip().startswith("{"):
        message = "JSON, as a plan's lock file is: run it with --plan, compare it with plan --diff"
        raise _mistake(str(path), 1, message)
    return text


def parse_policy(text: str, source: str) -> Policy:
    """Checks a policy's text; `source` is how messages call it. PolicyError for its first mistake counts the others."""
    found = check_text(text, source)
    if isinstance(found, Policy):
        return found
    first, *others = found
    if others:
        more = f"{first}; and {len(others)} more: kernelmux policy check {source}"
        first = PolicyError(more, file=first.file, line=first.line)
    raise first


def check_text(text: str, source: str) -> Policy | list[PolicyError]:
    """The policy of a text, or all of its mistakes, by line."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else _line_of_fault(text, error)
        said = "tables or lists are nested too deeply" if isinstance(error, RecursionError) else error
        mistake = _mistake(source, line, f"not TOML: {said}")
        mistake.__cause__ = error
        return [mistake]
    lines = _line_numbers(text)
    try:
        document = Document.model_validate(_extended(data))
        return Policy(document, source, {path: line for path, line in lines.items() if _TOLD.fullmatch(path)})
    except ValidationError as error:
        faults = error.errors()
    # A key that is missing because it is misspelt is told of once.
    misspelt = {fault["loc"][:-1] for fault in faults if fault["type"] == "extra_forbidden"}
    told = [fault for fault in faults if fault["type"] != "missing" or fault["loc"][:-1] not in misspelt]
    mistakes = [(_line_of(lines, fault["loc"]) or 1, _message(fault, Document)) for fault in told]
    return [_mistake(source, line, message) for line, message in sorted(mistakes)]


def _mistake(source: str, line: int, message: str) -> PolicyError:
    return PolicyError(f"{source}:{line}: {message}", file=source, line=line)


def _line_of_fault(text: str, error: Exception) -> int:
    """The line of a fault for which tomllib names none: the document's end, or a number too long to read."""
    if "end of document" in str(error):
        return text.count("\n") + 1
    number = re.search(r"\d{4300}", text)
    return text.count("\n", 0, number.start()) + 1 if number else 1


_TOLD = re.compile(r"((rule|require)\.\d+|defaults)(\.use|\.kernel)?|forbid|tuned_for")
"""The paths whose lines a policy's messages tell."""
_HEADER = re.compile(r"""\s*(\[\[?)\s*([\w"'.-]+)\s*\]\]?""")
_KEY = re.compile(r"""\s*(["']?)([\w-]+)\1\s*[=.]""")


def _line_numbers(text: str) -> Mapping[str, int]:
    """The line of every table and key by its path, for messages (tomllib tells no positions)."""
    lines: dict[str, int] = {}
    counts: Counter[str] = Counter()
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            name = table = header[2]
            if header[1] == "[[":
                table = f"{name}.{counts[name]}"
                counts[name] += 1
            lines.setdefault(table, number)
            lines.setdefault(name, number)
        elif key := _KEY.match(line):
            lines.setdefault(f"{table}.{key[2]}" if table else key[2], number)
    return lines


def _line_of(lines: Mapping[str, int], path: Sequence[int | str]) -> int | None:
    """The line of the longest part of `path` that has one."""
    starts = (".".join(map(str, path[:length])) for length in range(len(path), 0, -1))
    return next((lines[start] for start in starts if start in lines), None)


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
    if error["type"] == "tuple_type" and isinstance(error["input"], dict):
        return f"{key}: [{key}] is one table: write [[{key}]], of which there may be many"
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}: it is a table: write [{key}] and its keys below"
    said = str(error["input"])[:60]
    return f"{key}: {error['msg']}, not {said if isinstance(error['input'], (int, float)) else repr(said)}"

"""The policy file: which kernel runs which op, as data.

Enters: TOML, and `--use` options. Leaves: a frozen Policy, or a PolicyError that names file, line, what was asked, what
exists and the nearest spelling. Rules stand in order and the first that matches a node wins; `defaults` come last.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from kernelmux.device import Device
from kernelmux.errors import GraphError, PolicyError, nearest
from kernelmux.formats import lookup
from kernelmux.graph import TensorNode
from kernelmux.ops import OPS

KERNEL_NAME = re.compile(r"[a-z][a-z0-9_]*(:[A-Za-z0-9_.]+)?")


@dataclass(frozen=True)
class Range:
    """Whole numbers from `low` to `high`, both included; an open end has None."""

    low: int = 0
    high: int | None = None

    def __contains__(self, number: int) -> bool:
        return self.low <= number and (self.high is None or number <= self.high)


def _parse_range(value: Any) -> Range:
    """`5`, `"5"`, `"1..16"`, `"17.."` or `"..16"`."""
    if isinstance(value, Range):
        return value
    match = re.fullmatch(r"(\d*)(\.\.)?(\d*)", str(value)) if isinstance(value, int | str) else None
    if match is None or isinstance(value, bool) or not (match[1] or match[3]):
        raise ValueError(f"{value!r} is no range: write 5, '1..16', '17..' or '..16'")
    low = int(match[1] or 0)
    high = low if not match[2] else int(match[3]) if match[3] else None
    if high is not None and high < low:
        raise ValueError(f"{value!r} is empty: its end is below its start")
    return Range(low, high)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _op_names(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}{nearest(name, OPS)}")
    return tuple(names)


def _format_names(names: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(lookup(name).name for name in names)
    except GraphError as error:
        raise ValueError(str(error)) from None


def _kernel_names(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if not KERNEL_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no kernel: write 'backend' or 'backend:kernel', as 'torch:int4'")
    return tuple(names)


def _capability(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", str(value))
    if match is None:
        raise ValueError(f"{value!r} is no compute capability: write it as '9.0'")
    return int(match[1]), int(match[2])


# A selector or a list of names may be written as one string.
_Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
_RangeField = Annotated[Range, BeforeValidator(_parse_range), WithJsonSchema({"type": ["integer", "string"]})]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Table):
    """Selectors that must all hold, and what to use where they do."""

    op: Annotated[_Names, BeforeValidator(lambda v: _op_names(_as_tuple(v)))] | None = Field(
        None, description="Names of ops."
    )
    node: _Names | None = Field(None, description="Shell patterns for node names, as `blk.*.attn_q`.")
    layer: _RangeField | None = Field(None, description="Layers, as `0..3`; nodes outside layers do not match.")
    m: _RangeField | None = Field(None, description="Rows of the node in one step: `1` is decode of one sequence.")
    weight: Annotated[_Names, BeforeValidator(lambda v: _format_names(_as_tuple(v)))] | None = Field(
        None, description="Storage formats of the node's weight, as `Q4_K`."
    )
    device: Literal["cpu", "cuda"] | None = Field(None, description="Kind of device.")
    capability: Annotated[tuple[int, int] | None, BeforeValidator(_capability), WithJsonSchema({"type": "string"})] = (
        Field(None, description="Least compute capability of a CUDA device, as `9.0`.")
    )
    use: Annotated[_Names, BeforeValidator(lambda v: _kernel_names(_as_tuple(v)))] = Field(
        description="Kernels, or backends for all of theirs, in order of preference."
    )
    max_error: float | None = Field(
        None, gt=0, description="Error budget: only kernels whose declared bound (NMSE) is within it."
    )
    on_unsupported: Literal["next", "error"] | None = Field(
        None,
        description="Where none of `use` takes the node: `next` goes on to the defaults, `error` stops. Unset, a "
        "kernel that declines means `next`, and a backend that is not installed is an error.",
    )

    def matches(self, node: TensorNode, rows: int, device: Device) -> bool:
        """Whether every selector holds for a node at `rows` rows on `device`."""
        return (
            (self.op is None or node.op in self.op)
            and (self.m is None or rows in self.m)
            and (self.layer is None or (node.layer is not None and node.layer in self.layer))
            and (self.device is None or device.kind == self.device)
            and (self.capability is None or (device.capability or (0, 0)) >= self.capability)
            and (self.weight is None or (bool(node.weight) and all(w.format in self.weight for w in node.weight)))
            and (self.node is None or any(fnmatchcase(node.name, pattern) for pattern in self.node))
        )


class Defaults(_Table):
    """What runs where no rule matches, and after a rule whose kernels all decline."""

    use: Annotated[_Names, BeforeValidator(lambda v: _kernel_names(_as_tuple(v)))] = Field(
        (), description="Backends or kernels in order; installed backends that are not named follow by name."
    )
    max_error: float | None = Field(None, gt=0, description="Error budget (NMSE) of every node without its own.")


class Document(_Table):
    """A policy file."""

    rule: tuple[Rule, ...] = Field((), description="Rules, in order; the first that matches a node wins.")
    forbid: Annotated[_Names, BeforeValidator(lambda v: _kernel_names(_as_tuple(v)))] = Field(
        (), description="Kernels or backends that no node may get."
    )
    defaults: Defaults = Field(Defaults(), description="What holds where no rule does.")


@dataclass(frozen=True)
class Policy:
    """A checked policy: the document, where it came from, and the line of each rule."""

    document: Document
    source: str
    lines: tuple[int, ...]
    """The line of each rule; 0 for a rule from `--use`."""

    @cached_property
    def row_bounds(self) -> frozenset[int]:
        """Row counts after which a rule may begin or cease to match."""
        ranges = [rule.m for rule in self.document.rule if rule.m is not None]
        bounds = {r.low - 1 for r in ranges} | {r.high for r in ranges if r.high is not None}
        return frozenset(bound for bound in bounds if bound > 0)

    def match(self, node: TensorNode, rows: int, device: Device) -> int | None:
        """The index of the first rule that matches, or None where the defaults hold."""
        for index, rule in enumerate(self.document.rule):
            if rule.matches(node, rows, device):
                return index
        return None

    def where(self, index: int | None) -> str:
        """How messages name a rule: `rule 2 (policy.toml:14)`."""
        if index is None:
            return f"defaults ({self.source})"
        line = self.lines[index]
        return f"rule {index + 1} ({self.source}:{line})" if line else f"--use {self.source_of_use(index)}"

    def source_of_use(self, index: int) -> str:
        rule = self.document.rule[index]
        return f"{','.join(rule.op or ('*',))}={','.join(rule.use)}"

    def with_use(self, options: Iterable[str]) -> Policy:
        """The policy outranked by `OP=KERNEL` options, the last one first; OP `*` is every op, KERNEL may be a list."""
        rules = [_parse_use(option) for option in options][::-1]
        document = self.document.model_copy(update={"rule": (*rules, *self.document.rule)})
        return Policy(document, self.source, (*(0 for _ in rules), *self.lines))


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
    text = resources.files("kernelmux").joinpath("default_policy.toml").read_text("utf-8")
    return parse_policy(text, "default_policy.toml")


def read_policy(path: str | Path) -> Policy:
    """Reads a policy file; PolicyError names file, line, and what would work."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PolicyError(f"{path}: the policy file cannot be read: {reason}") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, source: str) -> Policy:
    """Checks a policy's text; `source` is how messages call it."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        line = re.search(r"at line (\d+)", str(error))
        raise PolicyError(f"{source}:{line[1] if line else 1}: not TOML: {error}") from error
    lines = _line_numbers(text)
    try:
        document = Document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = first["loc"]
        raise PolicyError(f"{source}:{_line_of(lines, path)}: {_message(first, Document)}") from None
    rules = tuple(_line_of(lines, ("rule", index)) for index in range(len(document.rule)))
    return Policy(document, source, rules)


_HEADER = re.compile(r"""\s*(\[\[?)\s*([\w"'.-]+)\s*\]\]?""")
_KEY = re.compile(r"""\s*(["']?)([\w-]+)\1\s*[=.]""")


def _line_numbers(text: str) -> Mapping[tuple[int | str, ...], int]:
    """The line of every table and key, for messages (tomllib tells no positions)."""
    lines: dict[tuple[int | str, ...], int] = {}
    table: tuple[int | str, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
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


_TABLES: Mapping[str, type[BaseModel]] = {"rule": Rule, "defaults": Defaults}


def _message(error: Any, table: type[BaseModel]) -> str:
    """One line for a pydantic error, with the keys that exist where one is unknown."""
    path: tuple[int | str, ...] = error["loc"]
    *outer, key = [part for part in path if isinstance(part, str)] or [""]
    if error["type"] == "extra_forbidden":
        known = _TABLES.get(outer[0] if outer else "", table)
        return f"unknown key {key!r}{nearest(key, known.model_fields)}"
    if error["type"] == "missing":
        return f"{'.'.join(outer) or 'it'} lacks the key {key!r}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg']}, not {str(error['input'])[:60]!r}"

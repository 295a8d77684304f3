"""The grammar of a policy file: its tables, their keys, and what each may hold.

One source for three things: checking a file, the JSON Schema that editors use, and docs/policy.md.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from kernelmux.contract import names, registry
from kernelmux.contract.device import PLATFORMS, Device, described_device, known_kinds
from kernelmux.errors import GraphError, PlanError, nearest
from kernelmux.graph.domain import Range, admits, parse_range
from kernelmux.graph.formats import CACHE_FORMATS, FORMATS, lookup
from kernelmux.graph.graph import TensorNode, case_node
from kernelmux.graph.ops import OPS, Op, fused_ops

AUTO, PARTS = names.RESERVED
"""In place of a kernel's name: whichever is predicted to take the least time; in place of a fused op's kernel: none,
the plain nodes that it would stand for run instead."""
_KERNEL_NAME = re.compile(f"{names.BACKEND}(:{names.KERNEL})?")


def _each(check: Any) -> Any:
    """A validator of one string or a list of them, each through `check`."""

    def validate(value: Any) -> Any:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"a string or a list of strings is needed, not {str(value)[:40]!r}")
        if not items:
            raise ValueError("the list is empty: name at least one, or leave the key out")
        return tuple(check(item) for item in items)

    return validate


def _one_of(kind: str, known: Callable[[], Collection[str]]) -> Callable[[Any], str]:
    """A validator of one name among those known, some of which may be a backend's own."""

    def check(name: Any) -> str:
        registry.current()
        if name not in list(known()):
            raise ValueError(f"unknown {kind} {name!r:.40}{nearest(str(name), known())}")
        return str(name)

    return check


def _format_name(name: str) -> str:
    registry.current()
    try:
        return lookup(name).name
    except GraphError as error:
        raise ValueError(str(error)) from None


def _kernel_name(name: str) -> str:
    if not _KERNEL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no kernel: write 'backend' or 'backend:kernel', as 'torch:int4'")
    return name


def _arguments(value: Any) -> Any:
    """Names of what hooks are told, and what each may be: a range, a value, or a list of values."""
    registry.current()
    known = sorted({name for op in OPS.values() for name in op.told} - {"m"})
    if isinstance(value, dict) and "m" in value:
        # A plan is made by ranges of rows, which the selector bounds; what else a hook is told holds at any row count.
        raise ValueError(f"m is a selector of its own: write m beside where, as m = {value['m']!r:.40}")
    if not isinstance(value, dict) or not value:
        raise ValueError(f"a table of arguments is needed, as {{ head_dim = 128 }}; known: {', '.join(known)}")
    if odd := sorted(set(value) - set(known)):
        raise ValueError(f"no op is told {odd[0]!r}{nearest(odd[0], known)}")
    return {name: _allowed(name, allowed) for name, allowed in value.items()}


def _allowed(name: str, value: Any) -> Any:
    """What hooks may be told under a name; ValueError for what they never are."""
    told = _told(name, tuple(OPS.values()))
    if isinstance(value, Range) or (isinstance(value, str) and ".." in value):
        allowed = parse_range(value)
        _check_told(name, told, max(allowed.low, 1) if allowed.high is None else allowed.high)
        return allowed
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(each, str | int | float) for each in values):
        raise ValueError(f"{value!r:.40} is neither a range nor a value nor a list of values")
    if told and all(each in FORMATS for each in told):
        values = tuple(_format_name(str(each)) for each in values)
    for each in values:
        _check_told(name, told, each)
    return values


@cache
def _told(name: str, ops: Sequence[Op]) -> list[Any]:
    """What hooks are told under a name in all cases of these ops."""
    found = [op.told[name](case_node(case)) for op in ops if name in op.told for case in op.cases()]
    parts = itertools.chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in found)
    # A node outside layers has None.
    return [0 if each is None else each for each in parts]


def _check_told(name: str, told: Sequence[Any], value: Any) -> None:
    """ValueError for a value of a type that hooks are never told under a name, or that is too small to be one."""
    types = {type(each) for each in told}
    least = min([1, *(each for each in told if type(each) is int)])
    if type(value) is int and float in types:
        return
    if type(value) not in types or (type(value) is int and value < least):
        meant = [words.format(least) for kind, words in _KINDS.items() if kind in types]
        raise ValueError(f"{name} is never {value!r:.40}: it is {' or '.join(meant) or 'nothing that can be written'}")


_KINDS = {bool: "true or false", int: "a whole number from {}", float: "a number", str: "a name"}


def _written(where: Mapping[str, object]) -> dict[str, Any]:
    return {name: str(allowed) if isinstance(allowed, Range) else allowed for name, allowed in where.items()}


def _capability(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", str(value))
    if match is None:
        raise ValueError(f"{str(value)[:40]!r} is no compute capability: write it as '9.0'")
    return int(match[1]), int(match[2])


def _device_class(value: Any) -> str:
    registry.current()
    if not isinstance(value, str):
        raise ValueError(f"a class of devices is needed, as 'cuda sm_90 NVIDIA H200', not {str(value)[:40]!r}")
    try:
        return described_device(value).device_class
    except PlanError as error:
        raise ValueError(str(error)) from None


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


_Ops = Annotated[tuple[str, ...], BeforeValidator(_each(_one_of("op", lambda: OPS))), WithJsonSchema(_STRINGS)]
_Formats = Annotated[tuple[str, ...], BeforeValidator(_each(_format_name)), WithJsonSchema(_STRINGS)]
_Kernels = Annotated[tuple[str, ...], BeforeValidator(_each(_kernel_name)), WithJsonSchema(_STRINGS)]
_Patterns = Annotated[tuple[str, ...], BeforeValidator(_each(str)), WithJsonSchema(_STRINGS)]
_Range = Annotated[
    Range, BeforeValidator(parse_range), PlainSerializer(str), WithJsonSchema({"type": ["integer", "string"]})
]
_Capability = Annotated[
    tuple[int, int],
    BeforeValidator(_capability),
    PlainSerializer(lambda capability: ".".join(map(str, capability))),
    WithJsonSchema({"type": "string"}),
]
_DeviceKind = Annotated[
    str, BeforeValidator(_one_of("kind of device", known_kinds)), WithJsonSchema({"enum": list(PLATFORMS)})
]
_DeviceClass = Annotated[str, BeforeValidator(_device_class), WithJsonSchema({"type": "string"})]
_Where = Annotated[
    Mapping[str, Range | tuple[str | float | bool | int, ...]],
    BeforeValidator(_arguments),
    PlainSerializer(_written),
    WithJsonSchema({"type": "object"}),
]
_CacheFormat = Annotated[
    str, BeforeValidator(_one_of("cache format", lambda: (*CACHE_FORMATS, AUTO))), WithJsonSchema({"type": "string"})
]


class Table(BaseModel):
    """A table of the file: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Selectors(Table):
    """Which nodes are meant: those for which every given selector holds."""

    op: _Ops | None = Field(None, description="Names of ops.")
    node: _Patterns | None = Field(None, description="Shell patterns for node names, as `blk.*.attn_q`.")
    layer: _Range | None = Field(None, description="Layers, as `0..3`; nodes outside layers do not match.")
    m: _Range | None = Field(
        None, description="Rows of the node in one step, as `1..8`; decode of one sequence is `1`."
    )
    weight: _Formats | None = Field(None, description="Storage formats of all of the node's weights, as `Q4_K`.")
    dtype: _Formats | None = Field(None, description="Format of the node's first output in the graph, as `f32`.")
    device: _DeviceKind | None = Field(None, description="Kind of device: `cpu`, `cuda`, `rocm` or another.")
    capability: _Capability | None = Field(None, description="Least compute capability of a CUDA device, as `9.0`.")
    where: _Where | None = Field(
        None,
        description="What the hook of the node's op is told, by name (docs/ops.md has them), and what it must be: "
        'a range, a value or a list, as `{ n = "4096..", head_dim = [64, 128] }`. An op that is told no such thing '
        "does not match. Rows are not among them: `m` is a selector of its own.",
    )

    def matches(self, node: TensorNode, rows: int, device: Device) -> bool:
        """Whether every selector holds for a node at `rows` rows on `device`."""
        return (
            (self.op is None or node.op in self.op)
            and (self.m is None or rows in self.m)
            and self.is_for(device)
            and (self.weight is None or (bool(node.weight) and all(w.format in self.weight for w in node.weight)))
            and (self.dtype is None or node.outputs[0].format in self.dtype)
            and self.is_at(node)
            and (self.where is None or self._fits(node))
        )

    def is_at(self, node: TensorNode) -> bool:
        """Whether a node has the name and the layer that are asked for."""
        return (self.layer is None or (node.layer is not None and node.layer in self.layer)) and (
            self.node is None or any(fnmatchcase(node.name, pattern) for pattern in self.node)
        )

    def is_for(self, device: Device) -> bool:
        """Whether nodes on a device may be meant."""
        return (self.device is None or device.kind == self.device) and (
            self.capability is None or (device.capability or (0, 0)) >= self.capability
        )

    def _fits(self, node: TensorNode) -> bool:
        """Whether the node's op is told all that `where` names, and each is as it asks."""
        told = node.contract.arguments(node)
        return all(name in told and admits(allowed, told[name]) for name, allowed in (self.where or {}).items())

    def covers(self, other: Selectors) -> bool:
        """Whether every node that `other` matches is sure to be matched by this too."""
        return (
            _set_covers(self.op, other.op)
            and _set_covers(self.weight, other.weight)
            and _set_covers(self.dtype, other.dtype)
            and (self.layer is None or (other.layer is not None and self.layer.covers(other.layer)))
            and (self.m is None or (other.m is not None and self.m.covers(other.m)))
            and (self.device is None or self.device == other.device)
            and (self.capability is None or (other.capability is not None and self.capability <= other.capability))
            and (self.node is None or (other.node is not None and all(self._names(name) for name in other.node)))
            and (self.where is None or self.where == other.where)
        )

    def _names(self, pattern: str) -> bool:
        """Whether all that `pattern` matches is ours: it is one of our patterns, or a plain name that one matches."""
        literal = not any(sign in pattern for sign in "*?[")
        ours = self.node or ()
        return pattern in ours or "*" in ours or (literal and any(fnmatchcase(pattern, own) for own in ours))


def _set_covers(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> bool:
    return ours is None or (theirs is not None and set(theirs) <= set(ours))


OnError = Literal["next", "error"]


class Rule(Selectors):
    """Selectors, and what to use where they all hold."""

    use: _Kernels = Field(
        description="Kernels (`torch:int4`), or backends for all of theirs, in order of preference; `auto`; and, last "
        "in a rule of fused ops, `parts`: the plain nodes that the fused one would stand for run, each by its own rule."
    )
    max_error: float | None = Field(
        None, gt=0, strict=True, description="Error budget: only kernels whose declared bound (NMSE) is within it."
    )
    on_unsupported: Literal["next", "error"] | None = Field(
        None,
        description="Where none of `use` takes the node: `next` goes on to the defaults, `error` stops. Unset, a "
        "kernel that declines means `next`, and a backend that nobody has heard of is an error.",
    )
    on_error: OnError | None = Field(
        None,
        description="Where the kernel raises in a walk: `error` stops, `next` takes the next kernel and runs "
        "the step again.",
    )

    @field_validator("use")
    @classmethod
    def _parts_are_of_fused_ops(cls, use: tuple[str, ...], told: ValidationInfo) -> tuple[str, ...]:
        # An op that is wrong itself is told of already.
        if PARTS in use and "op" in told.data:
            fused = [op.name for op in fused_ops()]
            plain = [op for op in told.data["op"] or () if op not in fused]
            if plain or told.data["op"] is None:
                asked = f"not {plain[0]}" if plain else "which this rule does not name"
                raise ValueError(f"{PARTS!r} is for rules of fused ops alone ({', '.join(fused)}), {asked}")
            if use[-1] != PARTS or use.count(PARTS) > 1:
                raise ValueError(f"{PARTS!r} comes last: after it nobody is asked any more")
        return use


class Require(Selectors):
    """An assertion: every node that matches must have got one of these kernels, or there is no plan."""

    kernel: _Kernels = Field(description="Kernels or backends, any of which will do.")


class Defaults(Table):
    """What holds where no rule matches, and after a rule whose kernels all decline."""

    use: _Kernels = Field(
        (),
        description="Backends or kernels in order; those that are not named follow by name, the reference last.",
    )
    max_error: float | None = Field(
        None, gt=0, strict=True, description="Error budget (NMSE) of every node without its own."
    )
    on_error: OnError = Field("error", description="As in a rule.")

    @field_validator("use")
    @classmethod
    def _no_parts(cls, use: tuple[str, ...]) -> tuple[str, ...]:
        if PARTS in use:
            raise ValueError(f"{PARTS!r} is for rules of fused ops alone: write a [[rule]] that names them in op")
        return use


class Kv(Table):
    """The paged cache of keys and values."""

    format: _CacheFormat = Field(
        "f32",
        description="How it is stored: `f32`, `bf16`, `f16`, `fp8_row` (e4m3, a scale for each position and head), or "
        "`auto`: `bf16` on CUDA, `f32` on the CPU.",
    )


class Weights(Table):
    """What packed weights may cost."""

    copies: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="Packed forms of one weight at most. Kernels that need one more are passed over; small row counts "
        "choose first.",
    )


class Document(Table):
    """A policy file."""

    extends: Literal["default", "exact"] | None = Field(
        None,
        description="`default`: what this file leaves out is as in the policy that holds without one; its rules come "
        "after this file's. `exact`: likewise, of the policy that gives float32's tokens.",
    )
    tuned_for: _DeviceClass | None = Field(
        None,
        description="The class of devices that this file was measured on, as `kernelmux plan` names it: "
        "`cuda sm_90 NVIDIA H200`. A plan for any other says so; with `--strict` there is none.",
    )
    rule: tuple[Rule, ...] = Field((), description="Rules, in order; the first that matches a node wins.")
    require: tuple[Require, ...] = Field((), description="Assertions about the finished plan.")
    forbid: _Kernels = Field((), description="Kernels or backends that no node may get.")
    fuse: bool = Field(
        True,
        strict=True,
        description="Whether fused ops may stand in for plain ones, where a chosen kernel takes them.",
    )
    defaults: Defaults = Field(Defaults(), description="What holds where no rule does: a table, see below.")
    kv: Kv = Field(Kv(), description="The cache: a table, see below.")
    weights: Weights = Field(Weights(), description="What packed weights may cost: a table, see below.")


TABLES: dict[str, type[Table]] = {
    "rule": Rule,
    "require": Require,
    "defaults": Defaults,
    "kv": Kv,
    "weights": Weights,
}
"""The tables of a file by their headings."""

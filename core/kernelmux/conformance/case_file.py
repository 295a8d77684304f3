"""Cases in a file: the distinct shapes of a real run, written down, and read back as cases of the suite.

Enters: a Session about to run. Leaves: JSON, one case a line, and Cases from it. Each line is a graph of one op, in the
graph's own JSON, named as the case; `values` beside it holds the step state as it was (positions, slots, lengths, block
tables), a range to draw from, or how the numbers are spread. A captured file holds no weights, no activations and no
token ids; one of drawn cases holds ids, which are nobody's. `numbers` in place of `values` names a safetensors file
beside this one with all numbers as they were: of a node that somebody wants to look at, weights and all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.numbers import ENDING, read_numbers, write_numbers
from kernelmux.errors import GraphError, KernelmuxError, LaunchError, nearest, shown
from kernelmux.files import read_whole, replacing, write_whole
from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.graph import LEAF, Graph, TensorNode, case_node
from kernelmux.graph.ops import Case
from kernelmux.graph.ops.blocks import TinyBlocks
from kernelmux.graph.ops.cases import marks
from kernelmux.graph.ops.op import elements
from kernelmux.graph.ops.spreads import Between, Draw, Kept, Like, Listed, spreads
from kernelmux.run.walk import Walk
from kernelmux.run.walker import Walker

if TYPE_CHECKING:
    from kernelmux.run.capture import CapturedWalk
    from kernelmux.run.session import Session

SCHEMA = 1
"""Of the file; another number is another form."""
TINY_BLOCKS = "tiny-blocks"
"""How `values` calls a weight whose scales are next to nothing."""


@dataclass(frozen=True)
class CaseFile:
    """The cases of a file, and its path as it was given."""

    path: str
    cases: tuple[Case, ...]


# Writing.


class RecordingWalker(Walker):
    """Over another walker's memory: notes each walk, with the step state that it was last bound to."""

    def __init__(self, walker: Walker, noted: dict[Walk, Mapping[str, torch.Tensor]]) -> None:
        vars(self).update(vars(walker))
        self._noted = noted

    def bind(self, **dims: int) -> Walk:
        walk = super().bind(**dims)
        self._noted[walk] = self._state()
        return walk

    def capture(self, tail: Callable[[Walk], object], **dims: int) -> CapturedWalk:
        state = self._state()
        captured = super().capture(tail, **dims)
        self._noted[captured.walk] = state
        return captured

    def without(self, error: LaunchError) -> Walker:
        return RecordingWalker(super().without(error), self._noted)

    def _state(self) -> Mapping[str, torch.Tensor]:
        state = (leaf.outputs[0] for leaf in self.plan.graph.leaves if leaf.role == "state")
        return {value.name: self.placement.leaves[value.name].clone() for value in state if value.format == "i32"}


@contextmanager
def capture_cases(
    session: Session, path: Path, wanted: Callable[[int, TensorNode], bool] = lambda rows, node: True
) -> Iterator[None]:
    """Writes what the session runs within the block to `path`, even where it raises. KernelmuxError if it cannot.

    Of all nodes, or of those that are `wanted`, given the rows of a walk.
    Nodes that differ only in name and layer are one case, and its step state is that of the last such step; of those
    that a graph replays, that of the capture. A fused node is a case of the fused op; a policy with `fuse = false`
    gives the plain ones.
    """
    noted: dict[Walk, Mapping[str, torch.Tensor]] = {}
    raised: BaseException | None = None
    try:
        # Opened at once: nobody should wait for a run whose cases have no place.
        with replacing(path) as file:
            session.walker = RecordingWalker(session.walker, noted)
            try:
                yield
            except BaseException as error:
                raised = error
            file.write(_to_json(noted, wanted).encode())
    except OSError as error:
        raise KernelmuxError(f"cannot write cases to {path}: {error.strerror}", file=str(path)) from error
    if raised is not None:
        raise raised


def _to_json(noted: Mapping[Walk, Mapping[str, torch.Tensor]], wanted: Callable[[int, TensorNode], bool]) -> str:
    found: dict[Graph, Mapping[str, Any]] = {}
    for walk, state in noted.items():
        for step in walk.steps:
            if wanted(walk.steps[0].node.rows, step.node):
                found[_alone(step.node)] = _values(step.node, state)
    taken: Counter[str] = Counter()
    lines = []
    for graph, values in found.items():
        taken[graph.name] += 1
        count = taken[graph.name]
        named = replace(graph, name=f"{graph.name}-{count}") if count > 1 else graph
        lines.append(json.dumps({**json.loads(named.to_json()), **({"values": values} if values else {})}))
    return _document(lines)


def _document(lines: Iterable[str]) -> str:
    """The file of cases, a line each."""
    return f'{{"schema": {SCHEMA}, "cases": [\n' + ",\n".join(lines) + "\n]}\n"


def _alone(node: TensorNode) -> Graph:
    """A node as a graph of its own: without its layer, and its values named by the op's ports."""
    ports = zip(node.contract.inputs, node.inputs, strict=False)
    groups: dict[str, Any] = {key: _numbered(key, getattr(node, key)) for key in ("weight", "bias", "gamma")}
    inputs = tuple(replace(value, name=port) for port, value in ports)
    alone = replace(node, name=node.op, layer=None, inputs=inputs, **groups)
    inferred = zip(alone.contract.infer(alone, "f32"), node.outputs, strict=True)
    outputs = tuple(replace(named, format=value.format) for named, value in inferred)
    leaves = [TensorNode(name=v.name, op=LEAF, outputs=(v,), role="state") for v in alone.inputs]
    leaves += [TensorNode(name=v.name, op=LEAF, outputs=(v,), role="weight") for v in alone.weights]
    nodes = (*leaves, replace(alone, outputs=outputs))
    return Graph(_case_name(alone), nodes, tuple(value.name for value in outputs))


def _numbered(field: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(replace(value, name=f"{field}{index or ''}") for index, value in enumerate(values))


def _case_name(node: TensorNode) -> str:
    """`captured/mul_mat-m1-n576-k576-Q4_1`: the op and what its hook is told, but for what has no short form."""
    parts = [f"captured/{node.op}"]
    for key, told in node.contract.arguments(node).items():
        several = told if isinstance(told, tuple | list) else (told,)
        if told is True:
            parts.append(key)
        elif told is not False and several and all(isinstance(item, int | str) for item in several):
            parts.append(("" if isinstance(several[0], str) else key) + "+".join(map(str, several)))
    return "-".join(parts)


def _values(node: TensorNode, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What cannot be plain noise: a nested list as it was, or the range `[low, high]` as `{"from": ..., "to": ...}`."""
    values: dict[str, Any] = {}
    for port, value in zip(node.contract.inputs, node.inputs, strict=False):
        if port == "ids":
            # Which rows are looked up, and which experts are chosen, says what was asked.
            values[port] = {"from": 0, "to": node.contract.ids_below(node) - 1}
        elif value.format == "i32":
            values[port] = state[value.name][tuple(map(slice, value.extents))].tolist()
    for value in _numbered("weight", node.weight):
        if node.rotation and len(value.shape) == 1:  # A rope's divisors: noise about zero would turn by huge angles.
            values[value.name] = {"from": 1.0, "to": 8.0}
    return values


def write_cases(cases: Iterable[Case], path: Path) -> None:
    """Writes cases of which all that is no plain noise is named or listed, as those drawn from domains are."""
    lines = [json.dumps(to_entry(case)) for case in cases]
    write_whole(path, _document(lines))


def write_kept(node: TensorNode, tensors: Sequence[tuple[torch.Tensor, ...]], path: Path) -> str:
    """Writes a node with the planes of its inputs and weights, in their order, as the one case of a file; its name.

    The numbers go beside it, under its name with another ending. KernelmuxError where either cannot be written.
    """
    numbers, alone = path.with_suffix(ENDING), _alone(node)
    (named,) = alone.ops
    try:
        write_numbers(dict(zip((*named.inputs, *named.weights), tensors, strict=True)), numbers)
        write_whole(path, _document([json.dumps({**json.loads(alone.to_json()), "numbers": numbers.name})]))
    except OSError as error:
        raise KernelmuxError(f"cannot write a case to {path}: {error.strerror}", file=str(path)) from error
    return alone.name


def to_entry(case: Case) -> dict[str, Any]:
    """A case as a line of the file. GraphError where numbers of it have no name there."""
    node = case_node(case)
    graph = replace(_alone(node), name=case.name)
    (alone,) = graph.ops
    called = zip((*node.inputs, *node.weights), (*alone.inputs, *alone.weights), strict=True)
    drawn = draw_case(case).inputs if any(value.format == "i32" for value in case.inputs) else {}
    values: dict[str, Any] = {}
    for value, named in called:
        draw = case.draw.get(value.name)
        if value.format == "i32":
            values[named.name] = drawn[value.name][0].tolist()
        elif isinstance(draw, Like) and draw.spread != "noise":
            values[named.name] = {"like": draw.spread}
        elif isinstance(draw, TinyBlocks):
            values[named.name] = {"like": TINY_BLOCKS}
        elif isinstance(draw, Between):
            values[named.name] = {"from": draw.low, "to": draw.high}
        else:
            _require(
                draw is None or isinstance(draw, Like), f"{case.name}: a file has no name for how {value.name} is drawn"
            )
    return {**json.loads(graph.to_json()), **({"values": values} if values else {})}


def reread(case: Case) -> Case:
    """The case as it comes back from a file: the same numbers in any process that reads it."""
    return _case(to_entry(case), Path())


# Reading.


def read_cases(path: str | Path) -> CaseFile:
    """The cases of a file that `capture_cases` wrote; GraphError says which file and case is wrong, and how."""
    try:
        document = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        raise GraphError(f"{path}: no file of cases: {error}", file=str(path)) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        found = f"schema {SCHEMA} is wanted, not {schema!r}; run --capture-cases writes such a file"
        raise GraphError(f"{path}: {found}", file=str(path))
    entries = document.get("cases")
    if not isinstance(entries, list) or not entries:
        raise GraphError(f"{path}: it holds no cases", file=str(path))
    cases: dict[str, Case] = {}
    for number, entry in enumerate(entries, 1):
        try:
            case = _case(entry, Path(path).parent)
            _require(case.name not in cases, f"another is named {case.name!r} too")
        except (KernelmuxError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise GraphError(f"{path}: case {number} of {len(entries)}: {error}", file=str(path)) from error
        cases[case.name] = case
    return CaseFile(str(path), tuple(cases.values()))


def _case(entry: Mapping[str, Any], folder: Path) -> Case:
    graph = Graph.from_json(json.dumps(entry))
    _require(len(graph.ops) == 1, f"a case is a graph of one op, this one has {len(graph.ops)}")
    named = isinstance(graph.name, str) and graph.name.isprintable() and graph.name != ""
    _require(named, f"a case is named by `graph`, not by {shown(graph.name)}")
    (node,) = graph.ops
    for value in (*node.inputs, *node.weights):
        _require(0 not in value.shape, f"{value.name} is {list(value.shape)}: a case has numbers")
    op = node.contract
    updated = {target for _, target in op.updates}
    outputs = [value.format for index, value in enumerate(node.outputs) if index not in updated]
    # Ids have a format of their own.
    formats = [format for format in outputs if format != "i32"]
    weights = max((elements(value) for value in node.weights), default=0)
    return Case(
        graph.name,
        op.name,
        node.inputs,
        {key: given for key in (*op.fields, *op.optional) if (given := getattr(node, key))},
        _kept(node, entry["numbers"], folder) if "numbers" in entry else _draws(node, entry.get("values", {})),
        formats[0] if formats else "f32",
        marks(node.inputs[0].extents[0], weights),
    )


def _kept(node: TensorNode, stated: Any, folder: Path) -> Mapping[str, Kept]:
    """All numbers from the file that `numbers` states; every index must stay within what it points into."""
    kept = read_numbers(node, stated, folder)
    for name, (low, high) in _limits(node).items():
        (part,) = kept[name].planes
        _require(low <= int(part.min()) and int(part.max()) <= high, f"{name} must be from {low} to {high}")
    return kept


def _draws(node: TensorNode, values: Mapping[str, Any]) -> dict[str, Draw]:
    """How to draw what `values` states; every index must stay within what it points into."""
    _require(isinstance(values, dict), "`values` maps the names of tensors to lists, ranges or spreads")
    operands = {value.name: value for value in (*node.inputs, *node.weights)}
    limits = _limits(node)
    draws: dict[str, Draw] = {}
    for name, stated in values.items():
        _require(name in operands, f"`values` names {name!r}; {node.op} has {', '.join(operands)}")
        if isinstance(stated, dict) and set(stated) == {"like"}:
            draws[name] = _like(operands[name], stated["like"], operands[name] in node.inputs)
            continue
        given = _ends(operands[name], stated) if isinstance(stated, dict) else _listed(operands[name], stated)
        low, high = limits.get(name, (-(2**31), 2**31 - 1))
        _require(low <= float(given.min()) and float(given.max()) <= high, f"{name} must be from {low} to {high}")
        shape, numbers = operands[name].extents, given.tolist()
        draws[name] = Between(numbers[0], numbers[1], shape) if isinstance(stated, dict) else Listed(numbers)
    for value in node.inputs:
        _require(value.format != "i32" or value.name in draws, f"{value.name} is i32: `values` must state it")
    return draws


def _listed(value: Value, stated: Any) -> torch.Tensor:
    given = _tensor(stated)
    fits = value.format == "i32" and given.dtype == torch.int64 and tuple(given.shape) == value.extents
    _require(fits, f"`values` must give {value.name} as integers {list(value.extents)}, or as a range")
    return given


def _like(value: Value, spread: Any, activation: bool) -> Draw:
    """As that spread: an activation is stored in its format, a weight of blocks is drawn as blocks."""
    format = lookup(value.format)
    known = set(spreads()) if format.plain or activation else {TINY_BLOCKS} if format.gguf is not None else set()
    known = set() if value.format == "i32" else known
    _require(
        spread in known, f"{value.name} is {value.format}: {spread!r} is no spread of it{nearest(str(spread), known)}"
    )
    return TinyBlocks(value) if spread == TINY_BLOCKS else Like(spread, value.extents)


def _ends(value: Value, stated: Mapping[str, Any]) -> torch.Tensor:
    ends = _tensor([stated.get("from"), stated.get("to")])
    fits = ends.dtype == torch.int64 or (value.format != "i32" and ends.dtype == torch.float32)
    fits = fits and lookup(value.format).plain and bool(ends[0] <= ends[1])
    _require(fits, f"{value.name} is {value.format}: {dict(stated)} is no range of it")
    return ends


def _tensor(stated: Any) -> torch.Tensor:
    """A nested list as a tensor; one of bool, which fits nothing, where it is none."""
    try:
        return torch.tensor(stated)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0, dtype=torch.bool)


def _limits(node: TensorNode) -> Mapping[str, tuple[int, int]]:
    """The least and the greatest value of what points into another tensor: beyond, a kernel reads foreign memory."""
    extents = {value.name: value.extents for value in node.inputs}
    if below := node.contract.ids_below(node):
        return {"ids": (0, below - 1)}
    if "k_cache" not in extents:
        return {}
    pages, page_size, *_ = extents["k_cache"]
    width = extents.get("block_table", (0, 0))[1]
    return {
        "slots": (-1, pages * page_size - 1),
        "block_table": (0, pages - 1),
        "kv_len": (0, width * page_size),
        "query_start": (0, node.inputs[0].extents[0]),
    }


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise GraphError(message)

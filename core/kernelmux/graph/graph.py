"""The compute graph of a model: nodes in the order in which they run, each an op with named fields.

Enters: an architecture's calls of `Builder`, or JSON. Leaves: a frozen, validated Graph. It says what is computed,
never by which kernel. Extents may be symbols (`m`, `outs`, `seqs`, `seqs+1`, `pages`), set anew at each step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from kernelmux.errors import GraphError, named, nearest
from kernelmux.graph.formats import Dim, Value, lookup
from kernelmux.graph.ops import OPS, Case, Op, Rotation

LEAF = "leaf"

PAGE_SIZE = 64
"""Tokens a page of a session's cache: a tile of keys, which copy engines take whole."""

Role = Literal["weight", "state", "cache"]
Scalar = int | float | str | bool


@dataclass(frozen=True, kw_only=True)
class TensorNode:
    """One node: an op, what it reads and writes, and its scalars by name. A leaf has no op: it only holds a tensor.

    A field at its zero value is not set; each op lists the fields that it needs and the ones that it may take.
    """

    name: str
    op: str
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    weight: tuple[Value, ...] = ()
    bias: tuple[Value, ...] = ()
    gamma: tuple[Value, ...] = ()
    layer: int | None = None
    epsilon: float = 0.0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    rotation: Rotation | None = None
    scale: float = 0.0
    window: int = 0
    chunk: int = 0
    soft_cap: float = 0.0
    limit: float = 0.0
    alpha: float = 0.0
    experts: int = 0
    top_k: int = 0
    renormalize: bool = False
    sigmoid: bool = False
    span: int = 0
    role: Role | None = None
    """Of a leaf: a weight of the model file, a buffer of step state, or a layer's cache."""
    attributes: tuple[tuple[str, Scalar], ...] = ()
    """Fields of an op that a backend brings, by name: `node.alpha` reads them too."""

    def __getattr__(self, name: str) -> Any:
        for key, value in self.__dict__.get("attributes", ()):
            if key == name:
                return value
        raise AttributeError(f"a {self.__dict__.get('op', 'node')} has no field {name!r}")

    @property
    def weights(self) -> tuple[Value, ...]:
        """All weight leaves that the node reads: weight, bias, gamma, in this order."""
        return (*self.weight, *self.bias, *self.gamma)

    @property
    def contract(self) -> Op:
        return OPS[self.op]

    @property
    def rows(self) -> int:
        """The first extent of its first input, which is known."""
        rows = self.inputs[0].shape[0]
        assert isinstance(rows, int), f"{self.name} has {rows} rows, a symbol"
        return rows

    def rows_in(self, dims: Mapping[str, int]) -> int:
        """Its rows where symbols have these extents."""
        rows = self.inputs[0].shape[0]
        return dims.get(rows, 1) if isinstance(rows, str) else rows

    def rows_at(self, rows: int) -> int:
        """Its rows where there are so many of tokens and of logits: so many, unless the graph fixes them."""
        return self.rows_in({"m": rows, "outs": rows})

    def at(self, rows: int) -> TensorNode:
        """The node at a row count, of tokens or of logits."""
        return self.resolve({"m": rows, "outs": rows})

    def resolve(self, dims: Mapping[str, int]) -> TensorNode:
        """The node with its symbols replaced by extents."""
        inputs = tuple([value.resolve(dims) for value in self.inputs])
        return self.on(inputs, tuple([value.resolve(dims) for value in self.outputs]))

    def on(self, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> TensorNode:
        """The same node on other values: what `replace` makes, at a tenth of its cost, for a plan makes thousands."""
        node = object.__new__(TensorNode)
        vars(node).update(vars(self), inputs=inputs, outputs=outputs)
        return node


_VALUE_FIELDS = ("inputs", "outputs", "weight", "bias", "gamma")
_NO_SCALARS = (*_VALUE_FIELDS, "name", "op", "layer", "role", "attributes")
SCALARS = tuple(f.name for f in fields(TensorNode) if f.name not in _NO_SCALARS)
"""The fields that say how an op is done."""
_FIELDS = frozenset(f.name for f in fields(TensorNode))


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order, leaves among them, and the names of the values that a step hands back."""

    name: str
    nodes: tuple[TensorNode, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        _validate(self)

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value by name."""
        return {value.name: value for node in self.nodes for value in node.outputs}

    @property
    def leaves(self) -> tuple[TensorNode, ...]:
        return tuple(node for node in self.nodes if node.op == LEAF)

    @property
    def ops(self) -> tuple[TensorNode, ...]:
        """The nodes that compute: all but the leaves."""
        return tuple(node for node in self.nodes if node.op != LEAF)

    @cached_property
    def answers(self) -> frozenset[str]:
        """What a step hands back, and what that is before it is scaled or capped: logits, which nobody may round."""
        found = set(self.outputs)
        for node in reversed(self.ops):
            if node.op in ("scale", "soft_cap") and node.outputs[0].name in found:
                found.add(node.inputs[0].name)
        return frozenset(found)

    def with_cache_format(self, format: str) -> Graph:
        """The graph with its caches, and what updates them, stored as `format`."""
        caches = {leaf.outputs[0].name for leaf in self.leaves if leaf.role == "cache"}
        if all(self.values[name].format == format for name in caches):
            return self

        def restored(values: tuple[Value, ...]) -> tuple[Value, ...]:
            return tuple(v.stored(format) if v.name in caches else v for v in values)

        nodes = []
        for node in self.nodes:
            if node.op != LEAF:
                caches |= {node.outputs[t].name for s, t in node.contract.updates if node.inputs[s].name in caches}
            nodes.append(node.on(restored(node.inputs), restored(node.outputs)))
        return Graph(self.name, tuple(nodes), self.outputs)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that tell graphs apart."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The graph as JSON: values are declared where they are produced and named where they are read."""
        document = {"graph": self.name, "outputs": self.outputs, "nodes": [_node_to_dict(node) for node in self.nodes]}
        return json.dumps(document, indent=1)

    @staticmethod
    def from_json(text: str) -> Graph:
        """The inverse of `to_json`; GraphError where the text is not a graph."""
        try:
            document = json.loads(text)
            known: dict[str, Value] = {}
            nodes = tuple(_node_from_dict(entry, known) for entry in document["nodes"])
            return Graph(document["graph"], nodes, tuple(document["outputs"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise GraphError(f"not a graph's JSON: {named(error)}") from error


def _node_to_dict(node: TensorNode) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    entry["outputs"] = [asdict(value) for value in node.outputs]
    for key in ("inputs", "weight", "bias", "gamma"):
        if names := [value.name for value in getattr(node, key)]:
            entry[key] = names
    for key in ("layer", *SCALARS, "role"):
        value = getattr(node, key)
        if value is not None and (value or key == "layer"):
            entry[key] = asdict(value) if isinstance(value, Rotation) else value
    return {**entry, **dict(node.attributes)}


def _node_from_dict(entry: Mapping[str, Any], known: dict[str, Value]) -> TensorNode:
    rest = dict(entry)
    outputs = tuple(Value(v["name"], tuple(v["shape"]), v["format"]) for v in rest.pop("outputs"))
    for key in ("inputs", "weight", "bias", "gamma"):
        rest[key] = tuple(_known(known, name, rest["name"]) for name in rest.get(key, ()))
    if rest.get("rotation"):
        rest["rotation"] = Rotation(**rest["rotation"])
    known.update((value.name, value) for value in outputs)
    return bare_node(outputs=outputs, **rest)


def bare_node(**given: Any) -> TensorNode:
    """A node of these fields, unchecked; those that TensorNode has not are its `attributes`."""
    own: dict[str, Any] = {key: value for key, value in given.items() if key in _FIELDS}
    if others := tuple((key, value) for key, value in given.items() if key not in _FIELDS):
        own["attributes"] = others
    return TensorNode(**own)


def _known(known: Mapping[str, Value], name: str, reader: str) -> Value:
    if name not in known:
        raise GraphError(f"{reader} reads {name!r}, which no node before it produces", node=reader)
    return known[name]


def _validate(graph: Graph) -> None:
    """GraphError at the first fault: order, dangling or repeated names, an input that differs from what is produced."""
    known: dict[str, Value] = {}
    later = {value.name for node in graph.nodes for value in node.outputs}
    superseded: dict[str, str] = {}
    names: set[str] = set()
    weights = {leaf.name for leaf in graph.leaves if leaf.role == "weight"}
    for node in graph.nodes:
        if node.name in names:
            raise GraphError(f"two nodes are named {node.name!r}; each needs a name of its own", node=node.name)
        names.add(node.name)
        if fed := [value.name for value in node.inputs if value.name in weights]:
            raise _fault(node, f" reads the weight {fed[0]!r} as an input; weights go into `weight`")
        for value in (*node.inputs, *node.weights):
            if value.name not in known:
                fault = "is produced only later: nodes must stand in topological order"
                raise _fault(
                    node, f" reads {value.name!r}, which {fault if value.name in later else 'no node produces'}"
                )
            if known[value.name] != value:
                raise _fault(node, f" reads {value}, but it is produced as {known[value.name]}")
            if value.name in superseded:
                raise _fault(node, f" reads {value.name!r} after {superseded[value.name]} has updated its memory")
        if node.op == LEAF:
            _validate_leaf(node)
        else:
            _validate_op(node)
            for source, _ in node.contract.updates:
                superseded[node.inputs[source].name] = node.name
        for value in node.outputs:
            if value.name in known:
                raise _fault(node, f" produces {value.name!r}, which another node has produced")
            lookup(value.format)
            known[value.name] = value
    for name in graph.outputs:
        if name not in known:
            raise GraphError(f"the graph's output {name!r} is produced by no node{nearest(name, known)}")


def _fault(node: TensorNode, says: str) -> GraphError:
    """What is wrong with a node, which is named first."""
    return GraphError(f"{node.name}{says}", node=node.name)


def _validate_leaf(node: TensorNode) -> None:
    if node.inputs or node.weights or len(node.outputs) != 1 or node.role is None:
        raise _fault(node, ": a leaf reads nothing, holds one value and has a role")
    for extent in node.outputs[0].shape:
        if isinstance(extent, bool) or not isinstance(extent, int | str) or (isinstance(extent, int) and extent < 0):
            raise _fault(node, f": {extent!r} is no extent; extents are counts or symbols")


def _validate_op(node: TensorNode) -> None:
    """GraphError unless fields and shapes keep the op's contract, and the outputs are the ones that it infers."""
    _check_fields(node)
    for expected, found in zip(node.contract.infer(node, "f32"), node.outputs, strict=False):
        if expected.shape != found.shape:
            raise _fault(node, f" ({node.op}): output {found.name} is {found.shape}, not {expected.shape}")
    if len(node.outputs) != len(node.contract.outputs):
        raise _fault(node, f" ({node.op}) needs outputs {', '.join(node.contract.outputs)}")
    for source, target in node.contract.updates:
        if node.inputs[source].format != node.outputs[target].format:
            raise _fault(node, f" ({node.op}): {node.outputs[target].name} must keep its input's format")


def _check_fields(node: TensorNode) -> None:
    if node.op not in OPS:
        raise _fault(node, f": unknown op {node.op!r}{nearest(node.op, OPS)}")
    op = node.contract
    if not len(op.inputs) - op.optional_inputs <= len(node.inputs) <= len(op.inputs):
        raise _fault(node, f" ({node.op}) takes {', '.join(op.inputs)}; {len(node.inputs)} inputs were given")
    for key in op.fields:
        if not getattr(node, key, None):
            raise _fault(node, f" ({node.op}) needs the field {key!r}")
    for key in (*SCALARS, "weight", "bias", "gamma", *dict(node.attributes)):
        if getattr(node, key) and key not in (*op.fields, *op.optional):
            raise _fault(node, f" ({node.op}) takes no field {key!r}; it takes {(*op.fields, *op.optional)}")


class Builder:
    """Builds a graph node by node, inferring every shape; the order of the calls is the order of the walk."""

    def __init__(self, name: str, format: str = "f32") -> None:
        self._name = name
        self._format = format
        self._nodes: list[TensorNode] = []

    def leaf(self, name: str, shape: Iterable[Dim], format: str = "f32", role: Role = "weight") -> Value:
        """A tensor that the walk is given: a weight, a buffer of step state, or a cache."""
        value = Value(name, tuple(shape), format)
        self._nodes.append(TensorNode(name=name, op=LEAF, outputs=(value,), role=role))
        return value

    def node(self, op: str, name: str, *inputs: Value, format: str | None = None, **fields: Any) -> tuple[Value, ...]:
        """Adds a node and returns its outputs; `fields` are TensorNode's. GraphError where the contract is broken."""
        self._nodes.append(make_node(op, name, *inputs, format=format or self._format, **fields))
        return self._nodes[-1].outputs

    def value(self, op: str, name: str, *inputs: Value, format: str | None = None, **fields: Any) -> Value:
        """`node` for an op with one output: that output."""
        (output,) = self.node(op, name, *inputs, format=format, **fields)
        return output

    def build(self, *outputs: Value) -> Graph:
        return Graph(self._name, tuple(self._nodes), tuple(value.name for value in outputs))


def make_node(op: str, name: str, *inputs: Value, format: str = "f32", **fields: Any) -> TensorNode:
    """A node with inferred outputs; `fields` are TensorNode's. GraphError where the contract is broken."""
    node = bare_node(name=name, op=op, inputs=inputs, **fields)
    _check_fields(node)
    return replace(node, outputs=node.contract.infer(node, format))


def case_node(case: Case) -> TensorNode:
    """The node of a conformance case."""
    return make_node(case.op, case.op, *case.inputs, format=case.format, **case.fields)


def nameless(node: TensorNode) -> TensorNode:
    """What two nodes have in common that are alike but for name and layer."""
    bare: dict[str, Any] = {
        key: tuple(Value("", value.shape, value.format) for value in getattr(node, key)) for key in _VALUE_FIELDS
    }
    return replace(node, name="", layer=None, **bare)

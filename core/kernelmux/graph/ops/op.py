"""What an op is: contract, float64 reference, cost and conformance cases, together in one file an op.

Enters: a node with its inputs' shapes. Leaves: output shapes, expected numbers, flops and bytes, cases. An op launches
nothing: kernels do, and are measured against it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from kernelmux.errors import GraphError
from kernelmux.graph.formats import Dim, Value
from kernelmux.graph.ops.axes import COLUMNS, ROWS, SPREADS, STORED, as_stored, fits_f16
from kernelmux.graph.ops.cases import Case, elementwise_cases, like, marks
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.spreads import Draw

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


@dataclass(frozen=True)
class Cost:
    """What a node must do at least: floating-point operations, and bytes read and written once each."""

    flops: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Operands:
    """The numbers of a node, dense: what `reference` reads. Floating-point tensors share one dtype."""

    inputs: tuple[torch.Tensor, ...] = ()
    weight: tuple[torch.Tensor, ...] = ()
    bias: tuple[torch.Tensor, ...] = ()
    gamma: tuple[torch.Tensor, ...] = ()


Tell = Callable[["TensorNode"], Any]


def row_count(node: TensorNode) -> Dim:
    """Rows of the node's first input."""
    return node.inputs[0].shape[0]


def column_count(node: TensorNode) -> Dim:
    """Columns of the node's first input."""
    return node.inputs[0].shape[1]


def weight_formats(node: TensorNode) -> tuple[str, ...]:
    """How the node's weights are stored."""
    return tuple(weight.format for weight in node.weight)


def has_bias(node: TensorNode) -> bool:
    """Whether a bias is added to each of the node's products."""
    return bool(node.bias)


def own_fields(*names: str) -> dict[str, Tell]:
    """The node's fields of these names, told as they are."""
    return {name: attrgetter(name) for name in names}


class Op(ABC):
    """The contract that every kernel of this op keeps."""

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    """The ports' names, in the order of `TensorNode.inputs`."""
    outputs: ClassVar[tuple[str, ...]]
    optional_inputs: ClassVar[int] = 0
    """How many of the last inputs may be left out."""
    fields: ClassVar[tuple[str, ...]] = ()
    """TensorNode fields that a node of this op must set."""
    optional: ClassVar[tuple[str, ...]] = ()
    """TensorNode fields that it may set."""
    told: ClassVar[Mapping[str, Tell]] = {}
    """What the op's hook is told of a node, by name; kernels (`takes`) and policies (`where`) select by the same."""
    in_place: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(input, output) pairs that may share memory: a kernel must be right when they do."""
    updates: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(input, output) pairs that are one memory: the op changes the input."""

    tables: ClassVar[tuple[int, ...]] = ()
    """Inputs whose rows are not the step's, though they may be as many."""

    @abstractmethod
    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        """The outputs of a node whose inputs are known, stored as `format` where the op leaves it open.

        Raises GraphError, naming the node, where shapes, formats or fields do not go together.
        """

    def arguments(self, node: TensorNode) -> dict[str, Any]:
        """What the op's hook is told of a node, besides `node` and `device`."""
        return {name: tell(node) for name, tell in self.told.items()}

    @abstractmethod
    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        """The definition of the op, in the dtype of its operands (the suite gives float64)."""

    def flops(self, node: TensorNode) -> int:
        """Floating-point operations of the textbook algorithm; one an output element unless the op says otherwise."""
        return sum(elements(value) for value in node.outputs)

    def unread(self, node: TensorNode) -> int:
        """Bytes of its operands that it leaves alone: rows of a table that nobody asks for, experts without rows."""
        return 0

    def ids_below(self, node: TensorNode) -> int:
        """What its input `ids` is below, where it has one: a table's rows, the experts; else 0."""
        return 0

    def cost(self, node: TensorNode) -> Cost:
        """Flops, and the bytes of every operand as it is stored, but for those that it leaves alone."""
        values = (*node.inputs, *node.weights, *node.outputs)
        return Cost(self.flops(node), sum(value.nbytes for value in values) - self.unread(node))

    @abstractmethod
    def cases(self) -> Iterator[Case]:
        """Named inputs that a kernel of this op is tested with."""

    def domain(self) -> Domain | None:
        """What a kernel of this op may be given, of which more cases are drawn; None where that is not stated."""
        return None

    def make_case(
        self,
        label: str,
        inputs: Sequence[Value],
        fields: Mapping[str, Any] | None = None,
        draw: Mapping[str, Draw] | None = None,
        format: str = "f32",
        weights: int = 0,
        smoke: bool | None = None,
    ) -> Case:
        """The op's case of that label; marked by its rows and the number of its `weights`, unless `smoke` says."""
        marked = marks(inputs[0].extents[0], weights) if smoke is None else frozenset({"smoke"} if smoke else ())
        return Case(f"{self.name}-{label}", self.name, tuple(inputs), fields or {}, draw or {}, format, marked)

    def output(self, node: TensorNode, index: int, shape: tuple[Dim, ...], format: str) -> Value:
        """The node's output `index`, named as the node where it has one output, else `node.port`."""
        name = node.name if len(self.outputs) == 1 else f"{node.name}.{self.outputs[index]}"
        return Value(name, shape, format)

    def require_rows(self, node: TensorNode, *values: Value) -> None:
        """GraphError unless each value has rows and columns, and all have the same rows."""
        for value in values:
            self.require(len(value.shape) == 2, node, f"{value.name} must be [rows, columns], it is {value.shape}")
            rows = values[0].shape[0]
            self.require(value.shape[0] == rows, node, f"{value.name} has {value.shape[0]} rows, not {rows}")

    def require_heads(self, node: TensorNode, rows: Value, heads: int) -> None:
        """GraphError unless rows hold that many heads."""
        width = heads * node.head_dim
        self.require(rows.shape[1:] == (width,), node, f"{rows.name} is {rows.shape}, rows must hold {width}")

    def require_caches(self, node: TensorNode, *caches: Value) -> None:
        """GraphError unless each value is a cache of the node's heads."""
        for cache in caches:
            fits = len(cache.shape) == 4 and cache.shape[2:] == (node.num_kv_heads, node.head_dim)
            self.require(fits, node, f"{cache.name} is {cache.shape}, not [pages, page_size, num_kv_heads, head_dim]")

    def require(self, holds: bool, node: TensorNode, message: str) -> None:
        """GraphError `node: message` unless `holds`."""
        if not holds:
            raise GraphError(f"{node.name} ({self.name}): {message}", node=node.name)


def elements(value: Value) -> int:
    """How many elements a value with known extents has."""
    return math.prod(value.extents)


class Elementwise(Op):
    """An op whose inputs and output all have one shape."""

    told: ClassVar[Mapping[str, Tell]] = {"m": row_count, "n": column_count}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        first = node.inputs[0]
        self.require_rows(node, first)
        for other in node.inputs[1:]:
            fits = other.shape == first.shape
            self.require(fits, node, f"{first.name} is {first.shape}, {other.name} is {other.shape}")
        return (self.output(node, 0, first.shape, format),)

    spreads: ClassVar[tuple[str, ...]] = SPREADS
    """How the inputs' values may be spread."""

    def cases(self) -> Iterator[Case]:
        return elementwise_cases(self)

    def domain(self) -> Domain | None:
        # What fields of its own may be only the op itself can tell.
        return None if self.fields else elementwise_domain(self, self.spreads)


def elementwise_domain(
    op: Op, values: Sequence[str] = SPREADS, fields: Mapping[str, tuple[Any, ...]] | None = None
) -> Domain:
    """Of an op whose inputs all have the shape of its output, and of `fields` what each may be."""
    fields = fields or {}

    def case(label: str, point: Point) -> Case:
        shape = (point["m"], point["n"])
        made = op.make_case(label, [Value(port, shape) for port in op.inputs], {key: point[key] for key in fields})
        return as_stored(like(point["values"], made), point["stored"])

    return Domain(
        case,
        {"values": (*values,), **fields, **STORED},
        {"m": ROWS, "n": COLUMNS},
        work=lambda point: (len(op.inputs) + 1) * point["m"] * point["n"],
        holds=fits_f16,
    )

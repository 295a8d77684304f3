"""What an op is: contract, float64 reference, cost and conformance cases, together in one file an op.

Enters: a node with its inputs' shapes. Leaves: output shapes, expected numbers, flops and bytes, cases. An op launches
nothing: kernels do, and are measured against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kernelmux.errors import GraphError
from kernelmux.graph.formats import FORMATS, Dim, Value

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


Draw = Callable[["torch.Generator"], "torch.Tensor"]


@dataclass(frozen=True, eq=False)
class Case:
    """One conformance input: an op with explicit shapes, formats and fields, and how to draw what is not normal noise.

    `draw` maps an input's name to a function of a seeded generator; an input without one is drawn from N(0, 1).
    """

    name: str
    op: str
    inputs: tuple[Value, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    draw: Mapping[str, Draw] = field(default_factory=dict)
    format: str = "f32"
    """How the op's outputs are stored, where the op leaves it open."""
    marks: frozenset[str] = frozenset()
    """`smoke`: in the subset that runs in seconds. `large`: left out on a CPU unless asked for."""


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

    def cost(self, node: TensorNode) -> Cost:
        """Flops, and the bytes of every operand as it is stored."""
        values = (*node.inputs, *node.weights, *node.outputs)
        return Cost(self.flops(node), sum(value.nbytes for value in values))

    @abstractmethod
    def cases(self) -> Iterator[Case]:
        """Named inputs that a kernel of this op is tested with."""

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

    def require(self, holds: bool, node: TensorNode, message: str) -> None:
        """GraphError `node: message` unless `holds`."""
        if not holds:
            raise GraphError(f"{node.name} ({self.name}): {message}", node=node.name)


def elements(value: Value) -> int:
    """How many elements a value with known extents has."""
    count = 1
    for extent in value.extents:
        count *= extent
    return count


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

    def cases(self) -> Iterator[Case]:
        return elementwise_cases(self)


ROW_COUNTS = (1, 2, 3, 5, 8, 16, 17, 64, 128, 200, 512)
"""Row counts that cases are made for: decode, small batches, on and one off a tile, prefill."""
LONG_ROWS = (4099, 8192, 14336)
"""Columns, more than the tiles, rings and tables of common kernels hold at once."""
MANY_ROWS = 65_600
"""More than the 65,535 blocks that a CUDA grid has along its second and third axis."""

PLAIN_WEIGHTS = ("f32", "f16", "bf16")
BLOCK_WEIGHTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SUPERBLOCK_WEIGHTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FP8_WEIGHTS = ("fp8_tensor", "fp8_row", "fp8_128x128")
WEIGHTS = (*PLAIN_WEIGHTS, *BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS, *FP8_WEIGHTS)
"""Every weight format of core."""


def brought_weights() -> tuple[str, ...]:
    """Those that backends have brought."""
    return tuple(name for name, format in FORMATS.items() if format.draw is not None)


def all_weights() -> tuple[str, ...]:
    """Core's, and those that backends have brought."""
    return (*WEIGHTS, *brought_weights())


COMMON_WEIGHTS = ("f32", "bf16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "fp8_row", "fp8_128x128")
"""Those of most model files: each way to keep scales once. What is slow to draw is made for them alone."""

LARGE = 2**25
"""Weights from which a case is marked `large`: a CPU takes seconds to draw and to multiply them in float64."""
SMOKE = 2**18
"""Weights, or cached elements, up to which a case may be marked `smoke`."""


def marks(m: int, weights: int = 0) -> frozenset[str]:
    """`large` by the number of weights, else `smoke` for a few rows."""
    if weights >= LARGE or m * weights >= 2**30:
        return frozenset({"large"})
    return frozenset({"smoke"} if m in (1, 5) and weights <= SMOKE else ())


def loud(n: int, rows: int = 0) -> Draw:
    """[n], or [rows, n], of noise as large as the products of any weight format are.

    A bias or residual of N(0, 1) is less than the error that a kernel of 8-bit activations may make beside them.
    """
    shape = (rows, n) if rows else (n,)

    def draw(generator: torch.Generator) -> torch.Tensor:
        import torch

        return 256 * torch.randn(shape, generator=generator)

    return draw


class Spread(Protocol):
    """Draws a tensor of any shape."""

    def __call__(self, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor: ...


def extremes() -> Mapping[str, Spread]:
    """Inputs that are not plain noise, by name: what breaks sums, scales and divisions."""
    import torch

    def rows(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:]))

    def outliers(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        noise[..., 0] *= 1e4
        return noise

    return {
        "outliers": outliers,
        "denormals": lambda generator, shape: torch.randn(shape, generator=generator) * 1e-42,
        "equal": lambda generator, shape: torch.full(shape, 0.37),
        # A scale that rows share drowns the small ones; float16 still holds the product of any two.
        "uneven": lambda generator, shape: torch.randn(shape, generator=generator) * 30.0 ** (1 - rows(shape) % 3),
        "zeros": lambda generator, shape: torch.zeros(shape),
        "zero-row": lambda generator, shape: torch.randn(shape, generator=generator) * (rows(shape) != 1),
    }


def extreme_cases(op: Op, shape: tuple[int, int], fields: Mapping[str, Any] | None = None) -> Iterator[Case]:
    """Cases of an op whose float inputs all have one shape, one for each extreme."""
    for label, spread in extremes().items():
        draw: dict[str, Draw] = dict.fromkeys(op.inputs, partial(spread, shape=shape))
        values = tuple(Value(port, shape) for port in op.inputs)
        yield Case(f"{op.name}-{label}", op.name, values, fields or {}, draw, marks=frozenset({"smoke"}))


def elementwise_cases(op: Op, fields: Mapping[str, Any] | None = None) -> Iterator[Case]:
    """Cases of an op whose inputs all have the shape of its output."""
    fields = fields or {}
    for m in ROW_COUNTS:
        for n in (576, 1536, 1, 127, 2049) if m < 128 else (640, 33):
            values = tuple(Value(port, (m, n)) for port in op.inputs)
            yield Case(f"{op.name}-m{m}-n{n}", op.name, values, fields, marks=marks(m))
    for m, n in (*((5, n) for n in LONG_ROWS), (MANY_ROWS, 3)):
        values = tuple(Value(port, (m, n)) for port in op.inputs)
        yield Case(f"{op.name}-m{m}-n{n}", op.name, values, fields, marks=marks(m))
    yield from extreme_cases(op, (3, 200), fields)

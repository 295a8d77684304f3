"""The cases of ops: the sizes and weight formats that all share, and the inputs that break sums, scales and divisions.

Enters: an op's ports. Leaves: cases, whose numbers are drawn from a seeded generator when they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import BLOCK_WEIGHTS, FORMATS, SUPERBLOCK_WEIGHTS, Value
from kernelmux.graph.ops.spreads import Draw, Like, extremes

if TYPE_CHECKING:
    from kernelmux.graph.ops.op import Op


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


ROW_COUNTS = (1, 2, 3, 5, 8, 16, 17, 64, 128, 200, 512)
"""Row counts that cases are made for: decode, small batches, on and one off a tile, prefill."""
LONG_ROWS = (4099, 8192, 14336)
"""Columns, more than the tiles, rings and tables of common kernels hold at once."""
MANY_ROWS = 65_600
"""More than the 65,535 blocks that a CUDA grid has along its second and third axis."""

PLAIN_WEIGHTS = ("f32", "f16", "bf16")
FP8_WEIGHTS = ("fp8_tensor", "fp8_row", "fp8_128x128")
INT4_CASES = ("int4_32", "int4_64_bf16", "int4_128", "int4_row_bf16")
"""Of INT4_WEIGHTS each group and each dtype of scales once."""
WEIGHTS = (*PLAIN_WEIGHTS, *BLOCK_WEIGHTS, *SUPERBLOCK_WEIGHTS, *FP8_WEIGHTS, *INT4_CASES)
"""Every kind of weight format of core that kernels decode."""


def brought_weights() -> tuple[str, ...]:
    """Those that backends have brought."""
    return tuple(name for name, format in FORMATS.items() if format.draw is not None)


def all_weights() -> tuple[str, ...]:
    """Core's, and those that backends have brought."""
    return (*WEIGHTS, *brought_weights())


COMMON_WEIGHTS = ("f32", "bf16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "fp8_row", "fp8_128x128")
"""Those of most model files: each way to keep scales once. What is slow to draw is made for them alone."""

LARGE = 2**24
"""Weights from which a case is marked `large`: a CPU takes seconds to draw and to multiply them in float64."""
SMOKE = 2**17
"""Weights, or cached elements, up to which a case may be marked `smoke`."""


def marks(m: int, weights: int = 0) -> frozenset[str]:
    """`large` by the number of weights, else `smoke` for a few rows."""
    if weights >= LARGE or m * weights >= 2**30:
        return frozenset({"large"})
    return frozenset({"smoke"} if m in (1, 5) and weights <= SMOKE else ())


def loud(n: int, rows: int = 0) -> Draw:
    """[n], or [rows, n], of noise as large as the products of any weight format are."""
    return Like("loud", (rows, n) if rows else (n,))


def linear_fields(
    ports: Sequence[str], widths: Sequence[int], formats: Sequence[str], k: int, bias: bool = False
) -> dict[str, tuple[Value, ...]]:
    """`weight` [n, k] of each product, called by its port, and a bias for each, if asked for: `b` and the port."""
    products = list(zip(ports, widths, formats, strict=True))
    biases = tuple(Value(f"b{port}", (n,)) for port, n, _ in products if bias)
    return {"weight": tuple(Value(f"w{port}", (n, k), format) for port, n, format in products), "bias": biases}


def at_extremes(make: Callable[[str], Case], *ports: str, prefix: str = "") -> Iterator[Case]:
    """For each extreme the case that `make` gives for its name, the inputs of these ports (all, if none) drawn so."""
    for label in extremes():
        yield like(label, make(prefix + label), *ports)


def like(spread: str, case: Case, *ports: str) -> Case:
    """The case with these inputs (all of floats, if none) drawn as that spread."""
    names = ports or [value.name for value in case.inputs if value.format != "i32"]
    wide = {value.name: Like(spread, value.extents) for value in case.inputs if value.name in names}
    return replace(case, draw={**case.draw, **wide})


def extreme_cases(op: Op, shape: tuple[int, int], fields: Mapping[str, Any] | None = None) -> Iterator[Case]:
    """Cases of an op whose float inputs all have one shape, one for each extreme."""
    values = tuple(Value(port, shape) for port in op.inputs)
    return at_extremes(partial(op.make_case, inputs=values, fields=fields, smoke=True))


def elementwise_cases(op: Op, fields: Mapping[str, Any] | None = None) -> Iterator[Case]:
    """Cases of an op whose inputs all have the shape of its output."""
    shapes = [(m, n) for m in ROW_COUNTS for n in ((576, 1536, 1, 127, 2049) if m < 128 else (640, 33))]
    for m, n in (*shapes, *((5, n) for n in LONG_ROWS), (MANY_ROWS, 3), (512, 4096)):
        yield op.make_case(f"m{m}-n{n}", [Value(port, (m, n)) for port in op.inputs], fields)
    yield from extreme_cases(op, (3, 200), fields)

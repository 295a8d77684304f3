"""rope: rotary position embedding of queries and keys, both in one node."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import CONTEXT, HEAD_DIMS, HEADS, ROWS, SPREADS, STORED, THETAS, as_stored
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Extent, Point
from kernelmux.graph.ops.op import Op, Operands, own_fields, row_count
from kernelmux.graph.ops.spreads import Between, Draw, Listed

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


@dataclass(frozen=True)
class Rotation:
    """The angles of a rope: which elements pair up, how many rotate, and how frequencies are scaled.

    `pairing`: `adjacent` turns (0, 1), (2, 3), ... (GGUF's llama); `halves` turns (0, d/2), (1, d/2 + 1), ...
    (GPT-NeoX). `dims` elements of each head rotate, the rest pass. `theta` is the base of the frequencies.
    `scaling`: `none`; `linear` divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` divides low
    frequencies by `factor` and blends between `low_freq` and `high_freq` (Llama 3.1's reference code); `yarn` the same
    by rotation counts, with attention's temperature folded in (Peng et al. 2023, arXiv:2309.00071); unless `truncate`
    the pairs between which it blends are no whole numbers (gpt-oss). `attention_factor` multiplies what is turned,
    whatever the scaling.
    """

    theta: float
    dims: int
    pairing: Literal["adjacent", "halves"] = "adjacent"
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied by."""
        tempered = 1.0 + 0.1 * math.log(self.factor) if self.scaling == "yarn" and self.factor > 1 else 1.0
        return tempered * self.attention_factor

    def frequencies(self) -> list[float]:
        """Radians a position, one a pair."""
        return [self._scaled(self.theta ** (-2 * pair / self.dims), pair) for pair in range(self.dims // 2)]

    def _scaled(self, frequency: float, pair: int) -> float:
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3":
            turns = self.original_context * frequency / (2 * math.pi)
            kept = (turns - self.low_freq) / (self.high_freq - self.low_freq)
        elif self.scaling == "yarn":
            low, high = self._pair_that_turns(self.beta_fast), self._pair_that_turns(self.beta_slow)
            low, high = (math.floor(low), math.ceil(high)) if self.truncate else (low, high)
            low, high = max(low, 0), min(high, self.dims - 1)
            kept = 1 - (pair - low) / max(high - low, 0.001)
        else:
            return frequency
        kept = min(max(kept, 0.0), 1.0)
        return kept * frequency + (1 - kept) * frequency / self.factor

    def _pair_that_turns(self, count: float) -> float:
        """The (fractional) pair that makes `count` turns over the original context."""
        return self.dims * math.log(self.original_context / (count * 2 * math.pi)) / (2 * math.log(self.theta))


class Rope(Op):
    """Each pair of a head's elements turned by position times the pair's frequency.

    Axes: m rows; num_heads query heads, num_kv_heads key heads, head_dim.
    Inputs: q [m, num_heads * head_dim]; k [m, num_kv_heads * head_dim]; positions [m], i32; weight, optional
    [dims / 2]: divisors of the frequencies that a model file ships.
    Outputs: q, k, turned; each may be its input's memory.
    Numerics: Su et al. 2021 (arXiv:2104.09864); the angle in float32 or better, or far positions drift.
    """

    name = "rope"
    inputs = ("q", "k", "positions")
    outputs = ("q", "k")
    fields = ("rotation", "num_heads", "num_kv_heads", "head_dim")
    optional = ("weight",)
    in_place = ((0, 0), (1, 1))
    told = {"m": row_count, **own_fields("num_heads", "num_kv_heads", "head_dim", "rotation")}

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        q, k, positions = node.inputs
        assert node.rotation is not None
        self.require_rows(node, q, k)
        for rows, heads in ((q, node.num_heads), (k, node.num_kv_heads)):
            self.require_heads(node, rows, heads)
        self.require(positions.shape == q.shape[:1], node, f"positions is {positions.shape}, q is {q.shape}")
        dims = node.rotation.dims
        fits = 0 < dims <= node.head_dim and dims % 2 == 0
        self.require(fits, node, f"rotated dims must be even and at most head_dim {node.head_dim}, not {dims}")
        for divisors in node.weight:
            self.require(divisors.shape == (dims // 2,), node, f"{divisors.name} is {divisors.shape}, not {dims // 2}")
        return tuple(self.output(node, i, rows.shape, format) for i, rows in enumerate((q, k)))

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        q, k, positions = operands.inputs
        turn = angles(node, positions, operands.weight)
        return tuple(self._turned(node, rows, turn) for rows in (q, k))

    def _turned(self, node: TensorNode, rows: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        assert node.rotation is not None
        heads = rows.reshape(rows.shape[0], -1, node.head_dim)
        dims, adjacent = node.rotation.dims, node.rotation.pairing == "adjacent"
        left = slice(0, dims, 2) if adjacent else slice(0, dims // 2)
        right = slice(1, dims, 2) if adjacent else slice(dims // 2, dims)
        scale = node.rotation.magnitude
        cos, sin = (part.to(rows.dtype).unsqueeze(1) * scale for part in (turn.cos(), turn.sin()))
        turned = heads.clone()
        turned[..., left] = heads[..., left] * cos - heads[..., right] * sin
        turned[..., right] = heads[..., left] * sin + heads[..., right] * cos
        return turned.view(rows.shape)

    def flops(self, node: TensorNode) -> int:
        return 3 * super().flops(node)

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            heads, kv_heads = point["heads"]
            sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": point["dim"]}
            order = {"first": point["first"], "divisors": point["divisors"], "shuffled": point["shuffled"]}
            made = self.case(label, point["m"], turned(point), **sizes, **order)
            return as_stored(like(point["values"], made, "q", "k"), point["stored"])

        return Domain(
            case,
            {"heads": HEADS, **TURNED, "shuffled": (False, True), "values": SPREADS, **STORED},
            {"m": ROWS, "first": FIRST},
            work=lambda point: 2 * point["m"] * sum(point["heads"]) * point["dim"],
            # Shuffled positions lie 131 apart.
            holds=lambda point: point["first"] + point["m"] * (131 if point["shuffled"] else 1) <= CONTEXT.high,
        )

    def cases(self) -> Iterator[Case]:
        for pairing in ("adjacent", "halves"):
            for label, scaling in SCALINGS.items():
                rotation = Rotation(theta=1e5, dims=64, pairing=pairing, **scaling)
                for m in ROW_COUNTS[:8]:
                    yield self.case(f"{pairing}-{label}-m{m}", m, rotation, first=m * 97)
                for first in (0, 4095, 8191, 131_071 - 4):
                    yield self.case(f"{pairing}-{label}-at{first}", 5, rotation, first=first)
            plain = Rotation(theta=5e5, dims=64, pairing=pairing)
            for heads, kv_heads in ((9, 3), (32, 8), (28, 4), (8, 1), (1, 1)):
                yield self.case(f"{pairing}-h{heads}-kv{kv_heads}", 3, plain, heads=heads, kv_heads=kv_heads)
            for label, scaling in _OTHER_SCALINGS.items():
                yield self.case(f"{pairing}-{label}", 5, Rotation(1e5, 64, pairing, **scaling), first=3000)
            for dim, dims in ((80, 80), (128, 128), (256, 256), (96, 32), (128, 64), (64, 2)):
                rotation = Rotation(theta=1e4, dims=dims, pairing=pairing)
                yield self.case(f"{pairing}-d{dim}-of{dims}", 5, rotation, dim=dim)
            yield self.case(f"{pairing}-divisors", 9, plain, first=77, divisors=True)
            yield self.case(f"{pairing}-shuffled", 17, plain, shuffled=True)
            for m in (128, 200, 512):
                yield self.case(f"{pairing}-m{m}", m, plain, first=m, shuffled=m == 200)
            # No run, though the first and the last are as far apart as those of one.
            yield self.case(f"{pairing}-not-a-run", 4, plain, positions=(5, 900, 3, 8))
            spread = partial(self.case, m=3, rotation=plain, first=500)
            yield from at_extremes(spread, "q", "k", prefix=f"{pairing}-")

    def case(
        self,
        label: str,
        m: int,
        rotation: Rotation,
        first: int = 0,
        heads: int = 9,
        kv_heads: int = 3,
        dim: int = 64,
        divisors: bool = False,
        shuffled: bool = False,
        positions: Sequence[int] = (),
    ) -> Case:
        import torch

        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        fields: dict[str, Any] = {"rotation": rotation, **sizes}

        def drawn(generator: torch.Generator) -> torch.Tensor:
            # Of several sequences in one step, positions neither start at 0 nor rise.
            order = torch.randperm(m, generator=generator) * 131 if shuffled else torch.arange(m)
            return (first + order).to(torch.int32)

        draw: dict[str, Draw] = {"positions": Listed(positions) if positions else drawn}
        if divisors:
            fields["weight"] = (Value("divisors", (rotation.dims // 2,)),)
            draw["divisors"] = Between(1.0, 8.0, (rotation.dims // 2,))
        inputs = (Value("q", (m, heads * dim)), Value("k", (m, kv_heads * dim)), Value("positions", (m,), "i32"))
        return self.make_case(label, inputs, fields, draw)


SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "linear": {"scaling": "linear", "factor": 4.0},
    "llama3": {"scaling": "llama3", "factor": 8.0, "original_context": 8192},
    "yarn": {"scaling": "yarn", "factor": 4.0, "original_context": 4096},
}

_OTHER_SCALINGS: Mapping[str, Mapping[str, Any]] = {
    # Numbers that no model is known for, so that a kernel must take the node's.
    "linear-by-2.5": {"scaling": "linear", "factor": 2.5},
    "llama3-by-4": {"scaling": "llama3", "factor": 4.0, "original_context": 2048, "low_freq": 2.0, "high_freq": 9.0},
    "yarn-by-16": {"scaling": "yarn", "factor": 16.0, "original_context": 2048, "beta_fast": 20.0, "beta_slow": 2.0},
    "attention-factor": {"attention_factor": 1.19},
    "yarn-untruncated": {"scaling": "yarn", "factor": 32.0, "original_context": 4096, "truncate": False},
    # As models have them: Gemma 3, Llama 3.2, Qwen 2.5; and a magnitude that the file states.
    "linear-by-8": {"scaling": "linear", "factor": 8.0},
    "llama3-by-32": {"scaling": "llama3", "factor": 32.0, "original_context": 8192},
    "yarn-of-32768": {"scaling": "yarn", "factor": 4.0, "original_context": 32_768, "attention_factor": 1.2},
}


FIRST = Extent(0, 131_071, counts=(1,))
"""The position of the first row."""
TURNED: Mapping[str, tuple[Any, ...]] = {
    "dim": HEAD_DIMS,
    "part": (1.0, 0.5, 0.25),
    "pairing": ("adjacent", "halves"),
    "scaling": ("plain", *(label for label in (*SCALINGS, *_OTHER_SCALINGS) if label != "plain")),
    "theta": THETAS,
    "divisors": (False, True),
}
"""What the domains of rope, and of ops that turn too, say of the rotation; of each head `part` turns."""


def turned(point: Point) -> Rotation:
    """The rotation of such a point."""
    scaling = {**SCALINGS, **_OTHER_SCALINGS}[point["scaling"]]
    return Rotation(point["theta"], 2 * int(point["dim"] * point["part"] / 2), point["pairing"], **scaling)


def angles(node: TensorNode, positions: torch.Tensor, divisors: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
    """Radians [positions, dims / 2] in float64, so that position 131,071 keeps its fraction."""
    import torch

    assert node.rotation is not None
    frequencies = torch.tensor(node.rotation.frequencies(), dtype=torch.float64, device=positions.device)
    for divisor in divisors:
        frequencies = frequencies / divisor.to(torch.float64)
    return positions.to(torch.float64).unsqueeze(1) * frequencies

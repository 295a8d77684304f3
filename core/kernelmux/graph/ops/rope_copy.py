"""rope_copy: queries and keys turned by position, keys and values already in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from kernelmux.graph.ops.axes import CONTEXT, HEADS, ROWS, SPREADS, STORED, as_stored
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.copy import COPIED, Copy, cache_work, copied
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.rope import FIRST, SCALINGS, TURNED, Rope, Rotation, turned

PLAIN = Rotation(theta=1e4, dims=64)


class RopeCopy(Fused):
    """rope and copy in one: what follows the three products of attention, by whatever kernel these are made.

    Axes: as rope and copy.
    Inputs: q [m, num_heads * head_dim]; k, v [m, num_kv_heads * head_dim]; positions [m]; slots [m]; k_cache, v_cache;
    weight, optional [dims / 2]: the rope's divisors.
    Outputs: q, turned; k_cache, v_cache: the same memory, updated.
    Numerics: as its parts.
    """

    name = "rope_copy"
    inputs = ("q_flat", "k_flat", "v", "positions", "slots", "k_cache", "v_cache")
    outputs = ("q", "k_cache_out", "v_cache_out")
    fields = ("rotation", "num_heads", "num_kv_heads", "head_dim")
    optional = ("weight",)
    in_place = ((0, 0),)
    updates = ((5, 1), (6, 2))
    pattern = (
        Part("rope", ("q_flat", "k_flat", "positions"), ("q", "k"), weight=0),
        Part("copy", ("k", "v", "slots", "k_cache", "v_cache"), ("k_cache_out", "v_cache_out")),
    )
    told = {**Rope.told, "cache_format": lambda node: node.inputs[5].format}

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            heads, kv_heads = point["heads"]
            order: dict[str, Any] = {"first": point["first"], "divisors": point["divisors"], "dim": point["dim"]}
            made = self._case(label, point["m"], turned(point), heads, kv_heads, **order, **copied(point))
            return as_stored(like(point["values"], made, "q", "k", "v"), point["stored"])

        def work(point: Point) -> int:
            heads, kv_heads = point["heads"]
            return cache_work({**point, "kv_heads": kv_heads}) + int(2 * point["m"] * heads * point["dim"])

        return Domain(
            case,
            {"heads": HEADS, **TURNED, **COPIED, "values": SPREADS, **STORED},
            {"m": ROWS, "first": FIRST},
            work,
            holds=lambda point: point["first"] + point["m"] <= CONTEXT.high,
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            yield self._case(f"m{m}", m)
        for label, scaling in SCALINGS.items():
            yield self._case(f"halves-{label}", 5, Rotation(5e5, 64, "halves", **scaling), first=8191)
        for heads, kv_heads, dim in ((32, 8, 128), (28, 4, 128), (8, 1, 96), (4, 2, 80), (2, 1, 256), (1, 1, 64)):
            rotation = Rotation(1e4, dim, "halves" if dim == 96 else "adjacent")
            yield self._case(f"h{heads}-kv{kv_heads}-d{dim}", 5, rotation, heads, kv_heads, dim)
        yield self._case("part-of-a-head", 5, Rotation(1e4, 32), dim=96)
        for format in ("bf16", "f16", "fp8_row"):
            yield self._case(f"{format}-cache", 17, format=format, padding=3)
        for m, padding in ((8, 3), (2, 2), (1, 1)):
            yield self._case(f"padding-{padding}-of-{m}", m, padding=padding)
        yield self._case("pages-of-1", 5, page_size=1)
        yield self._case("divisors", 9, divisors=True)
        yield from at_extremes(partial(self._case, m=3), "q", "k", "v")

    def _case(
        self,
        label: str,
        m: int,
        rotation: Rotation = PLAIN,
        heads: int = 9,
        kv_heads: int = 3,
        dim: int = 64,
        *,
        first: int = 500,
        divisors: bool = False,
        **copied: Any,
    ) -> Case:
        """A case of rope and one of copy, put together."""
        turned = Rope().case(label, m, rotation, first, heads, kv_heads, dim, divisors)
        kept = Copy().case(label, m, kv_heads, dim, **copied)
        (q, k, positions), (_, v, *rest) = turned.inputs, kept.inputs
        draw = {**turned.draw, **kept.draw}
        return self.make_case(label, (q, k, v, positions, *rest), turned.fields, draw)

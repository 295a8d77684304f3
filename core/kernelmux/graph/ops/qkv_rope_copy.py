"""qkv_rope_copy: from the normed input to turned queries, with keys and values already in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import (
    CONTEXT,
    FEW_HEADS,
    FUSED_INPUTS,
    LOUD,
    ROWS,
    SPREADS,
    as_stored,
    block,
    whole_blocks,
)
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, all_weights, like, linear_fields, loud
from kernelmux.graph.ops.copy import COPIED, Copy, cache_work, copied
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.mul_mat import product_holds, product_work
from kernelmux.graph.ops.op import column_count, has_bias, row_count, weight_formats
from kernelmux.graph.ops.qkv import products
from kernelmux.graph.ops.rope import FIRST, TURNED, Rope, Rotation, turned


class QkvRopeCopy(Fused):
    """qkv, rope and copy in one.

    Axes: as qkv, rope and copy.
    Inputs: x [m, hidden_dim]; positions [m]; slots [m]; k_cache, v_cache; three weights (and, fourth, the rope's
    divisors); three biases or none.
    Outputs: q [m, num_heads * head_dim], turned; k_cache, v_cache: the same memory, updated.
    Numerics: as its parts.
    """

    name = "qkv_rope_copy"
    inputs = ("x", "positions", "slots", "k_cache", "v_cache")
    outputs = ("q", "k_cache_out", "v_cache_out")
    fields = ("weight", "rotation", "num_heads", "num_kv_heads", "head_dim")
    optional = ("bias",)
    updates = ((3, 1), (4, 2))
    pattern = (
        *products("q_flat", "k_flat", "v_flat"),
        Part("rope", ("q_flat", "k_flat", "positions"), ("q", "k"), weight=3),
        Part("copy", ("k", "v_flat", "slots", "k_cache", "v_cache"), ("k_cache_out", "v_cache_out")),
    )
    told = {
        "m": row_count,
        "k": column_count,
        **Rope.told,
        "weight_formats": lambda node: weight_formats(node)[:3],
        "bias": has_bias,
        "cache_format": lambda node: node.inputs[3].format,
    }

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            format, slots = point["format"], copied(point)
            stated: dict[str, Any] = {key: point[key] for key in ("first", "divisors", "bias", "dim")}
            stated |= {"k": whole_blocks(point["k"], format), "rotation": turned(point), "cache": slots.pop("format")}
            stated |= dict(zip(("heads", "kv_heads"), point["heads"], strict=True))
            made = self._made(label, point["m"], format, **stated, **slots)
            return as_stored(like(point["values"], made, "x"), point["stored"])

        def work(point: Point) -> int:
            heads, kv_heads = point["heads"]
            width = (heads + 2 * kv_heads) * point["dim"]
            return cache_work({**point, "kv_heads": kv_heads}) + product_work({**point, "n": width})

        def holds(point: Point) -> bool:
            # Products of outliers, or of rows thirty times as large, are more than a cache of float16 holds.
            fits = point["cache"] != "f16" or point["values"] not in (*LOUD, "uneven")
            return fits and point["first"] + point["m"] <= CONTEXT.high and product_holds({**point, "n": point["dim"]})

        return Domain(
            case,
            {
                "format": all_weights(),
                "heads": FEW_HEADS,
                **TURNED,
                **COPIED,
                "bias": (False, True),
                "values": SPREADS,
                "stored": ("f32", "bf16"),
            },
            {"m": ROWS, "k": FUSED_INPUTS, "first": FIRST},
            work,
            holds,
            {"block": ("k", "format", block)},
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS:
            yield self._case(f"f32-m{m}", m, "f32")
        for format in all_weights()[1:]:
            for m in (1, 5, 17) if format in ("Q4_1", "Q8_0") else (5,):
                yield self._case(f"{format}-m{m}", m, format)
        for format in ("bf16", "f16", "fp8_row"):
            yield self._case(f"cache-{format}", 5, "f32", cache=format, padding=1)
        yield self._case("halves", 5, "f32", pairing="halves")
        yield self._case("bias", 5, "f32", bias=True)
        yield self._case("divisors", 5, "f32", divisors=True)
        yield self._case("padding", 8, "f32", padding=3)
        yield self._case("all-padding", 2, "f32", padding=2)
        yield self._case("Q8_0-bias-halves", 5, "Q8_0", pairing="halves", bias=True)
        yield self._case("far", 5, "f32", stride=-911, first=8191)

    def _case(
        self,
        label: str,
        m: int,
        format: str,
        pairing: Literal["adjacent", "halves"] = "adjacent",
        first: int = 3,
        stride: int = 1,
        cache: str = "f32",
        **stated: Any,
    ) -> Case:
        """Of four small heads, and as few columns as the format's blocks allow, 96 at least."""
        import torch

        rotation = Rotation(theta=1e4, dims=16, pairing=pairing)
        made = self._made(label, m, format, whole_blocks(96, format), rotation, 4, 2, 16, cache=cache, **stated)
        positions = {"positions": lambda generator: (first + stride * torch.arange(m)).to(torch.int32)}
        return replace(made, draw={**made.draw, **positions})

    def _made(
        self,
        label: str,
        m: int,
        format: str,
        k: int,
        rotation: Rotation,
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        first: int = 0,
        bias: bool = False,
        divisors: bool = False,
        padding: int = 0,
        scattered: bool = False,
        page_size: int = 16,
        cache: str = "f32",
    ) -> Case:
        """A case of rope and one of copy, put together behind three products."""
        turned = Rope().case(label, m, rotation, first, heads, kv_heads, dim, divisors)
        pages = 6 + m // page_size
        kept = Copy().case(label, m, kv_heads, dim, padding, scattered, cache, pages, page_size)
        (_, _, positions), (_, _, *rest) = turned.inputs, kept.inputs
        widths = (heads * dim, kv_heads * dim, kv_heads * dim)
        fields: dict[str, Any] = {**turned.fields, **linear_fields("qkv", widths, [format] * 3, k, bias)}
        fields["weight"] += turned.fields.get("weight", ())
        draw = {**turned.draw, **kept.draw, **{f"b{port}": loud(n) for port, n in zip("qkv", widths, strict=True)}}
        return self.make_case(label, [Value("x", (m, k)), positions, *rest], fields, draw)

"""copy: new keys and values scattered into the paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelmux.graph.formats import Value
from kernelmux.graph.ops.axes import CACHES, HEAD_DIMS, KV_HEADS, PAGE_SIZES, ROWS, SPREADS, STORED, as_stored
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, at_extremes, like
from kernelmux.graph.ops.domain import Domain, Point
from kernelmux.graph.ops.op import Op, Operands, own_fields, row_count
from kernelmux.graph.ops.spreads import AROUND_F16, Between

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode


class Copy(Op):
    """cache[slots[i] // page_size, slots[i] % page_size] = row i, for keys and for values.

    Axes: m rows, num_kv_heads, head_dim; pages of page_size rows.
    Inputs: k, v [m, num_kv_heads * head_dim]; slots [m], i32; k_cache, v_cache [pages, page_size, num_kv_heads,
    head_dim].
    Outputs: k_cache, v_cache: the same memory, updated.
    Constraints: a slot occurs once. A padding row has slot -1: it is skipped.
    Numerics: rounded once, to the cache's format; in fp8_row each head of a row has a scale of its own.
    """

    name = "copy"
    inputs = ("k", "v", "slots", "k_cache", "v_cache")
    outputs = ("k_cache", "v_cache")
    fields = ("num_kv_heads", "head_dim")
    updates = ((3, 0), (4, 1))
    told = {
        "m": row_count,
        **own_fields("num_kv_heads", "head_dim"),
        "cache_format": lambda node: node.inputs[3].format,
    }

    def infer(self, node: TensorNode, format: str) -> tuple[Value, ...]:
        k, v, slots, k_cache, v_cache = node.inputs
        self.require_rows(node, k, v)
        for rows in (k, v):
            self.require_heads(node, rows, node.num_kv_heads)
        self.require(slots.shape == k.shape[:1], node, f"slots is {slots.shape}, k is {k.shape}")
        self.require_caches(node, k_cache, v_cache)
        return tuple(self.output(node, i, c.shape, c.format) for i, c in enumerate((k_cache, v_cache)))

    def reference(self, node: TensorNode, operands: Operands) -> tuple[torch.Tensor, ...]:
        k, v, slots, k_cache, v_cache = operands.inputs
        kept = slots >= 0
        where = slots[kept].long()
        updated = []
        for rows, cache in ((k, k_cache), (v, v_cache)):
            flat = cache.reshape(-1, rows.shape[1]).clone()
            flat[where] = rows[kept]
            updated.append(flat.view(cache.shape))
        return tuple(updated)

    def flops(self, node: TensorNode) -> int:
        return 0

    def domain(self) -> Domain:
        def case(label: str, point: Point) -> Case:
            heads, dim = point["kv_heads"], point["dim"]
            made = self.case(label, point["m"], heads, dim, **copied(point))
            return as_stored(like(point["values"], made, "k", "v"), point["stored"])

        return Domain(
            case,
            {
                "kv_heads": KV_HEADS,
                "dim": HEAD_DIMS,
                **COPIED,
                "values": (*SPREADS, "f16-subnormals", "nan-and-infinity"),
                **STORED,
            },
            {"m": ROWS},
            work=lambda point: cache_work(point) + 2 * point["m"] * point["kv_heads"] * point["dim"],
            # A row with a scale has none for what is no number.
            holds=lambda point: point["values"] != "nan-and-infinity" or point["cache"] != "fp8_row",
        )

    def cases(self) -> Iterator[Case]:
        for m in ROW_COUNTS[:8]:
            for heads, dim in ((3, 64), (8, 128), (1, 80)):
                for format in ("f32", "bf16", "f16"):
                    yield self.case(f"{format}-m{m}-h{heads}-d{dim}", m, heads, dim, format=format)
        for m, padding in ((8, 3), (17, 1), (2, 2), (1, 1)):
            yield self.case(f"padding-{padding}-of-{m}", m, 3, 64, padding=padding)
        yield self.case("scattered-padding", 16, 3, 64, padding=5, scattered=True)
        yield self.case("full", 128, 3, 64, pages=8)
        for m in (200, 512):
            yield self.case(f"f32-m{m}-h3-d64", m, 3, 64)
        for heads, dim in ((9, 96), (1, 256), (2, 1)):
            yield self.case(f"f32-m5-h{heads}-d{dim}", 5, heads, dim)
        for page_size in (1, 8, 32, 256):
            yield self.case(f"pages-of-{page_size}", 5, 3, 64, padding=1, page_size=page_size)
        yield self.case("f16-padding-3-of-8", 8, 3, 64, padding=3, format="f16")
        # With a scale for each row of a head.
        for m, heads, dim in ((1, 8, 128), (5, 3, 64), (17, 1, 80), (40, 2, 256)):
            yield self.case(f"fp8_row-m{m}-h{heads}-d{dim}", m, heads, dim, format="fp8_row")
        yield self.case("fp8_row-scattered-padding", 16, 3, 64, padding=5, scattered=True, format="fp8_row")
        yield self.case("fp8_row-pages-of-1", 5, 3, 64, padding=1, page_size=1, format="fp8_row")
        # More slots than 16 bits count, the last one among them.
        yield self.case("far", 3, 1, 8, pages=4_200, slots=(65_535, 65_536, 4_200 * 16 - 1))
        yield self.case("farther", 3, 1, 8, pages=18_750, slots=(262_143, 262_144, 18_750 * 16 - 1))
        yield self.case("not-a-run", 4, 3, 64, pages=8, slots=(5, 90, 3, 8))
        for format in ("f32", "bf16", "fp8_row"):
            few = partial(self.case, m=3, heads=3, dim=64, format=format)
            yield from at_extremes(few, "k", "v", prefix=f"{format}-")
        # What only one of the formats of 16 bits holds, and what float16 holds in fewer.
        for format, (label, most) in itertools.product(("bf16", "f16"), AROUND_F16.items()):
            drawn = {port: Between(-most, most, (3, 192)) for port in ("k", "v")}
            made = self.case(f"{format}-{label}", 3, 3, 64, format=format)
            yield replace(made, draw={**made.draw, **drawn})

    def case(
        self,
        label: str,
        m: int,
        heads: int,
        dim: int,
        padding: int = 0,
        scattered: bool = False,
        format: str = "f32",
        pages: int = 0,
        page_size: int = 16,
        slots: Sequence[int] = (),
    ) -> Case:
        """`slots`: which, random ones unless given, of which the last `padding` are -1, or any where `scattered`."""
        import torch

        pages = pages or 2 + m // page_size

        def draw(generator: torch.Generator) -> torch.Tensor:
            if slots:
                return torch.tensor(slots, dtype=torch.int32)
            order = torch.randperm(pages * page_size, generator=generator)[:m].to(torch.int32)
            order[m - padding :] = -1
            return order[torch.randperm(m, generator=generator)] if scattered else order

        rows = [Value(name, (m, heads * dim)) for name in ("k", "v")]
        caches = [Value(name, (pages, page_size, heads, dim), format) for name in ("k_cache", "v_cache")]
        inputs = (*rows, Value("slots", (m,), "i32"), *caches)
        fields = {"num_kv_heads": heads, "head_dim": dim}
        return self.make_case(label, inputs, fields, {"slots": draw})


COPIED: Mapping[str, tuple[Any, ...]] = {
    "cache": CACHES,
    "page_size": PAGE_SIZES,
    "padding": ("none", "some", "all"),
    "scattered": (False, True),
}
"""What the domains of copy, and of ops that copy too, say of the cache and of the slots."""


def copied(point: Point) -> dict[str, Any]:
    """These, as `Copy.case` takes them."""
    m = point["m"]
    padding = {"none": 0, "some": -(-m // 3), "all": m}[point["padding"]]
    return {
        "format": point["cache"],
        "page_size": point["page_size"],
        "padding": padding,
        "scattered": point["scattered"],
    }


def cache_work(point: Point) -> int:
    """Of a cache that holds the rows of such a point."""
    page_size = point["page_size"]
    return int((2 + point["m"] // page_size) * page_size * point["kv_heads"] * point["dim"] * 2)

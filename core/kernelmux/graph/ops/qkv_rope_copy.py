"""qkv_rope_copy: from the normed input to turned queries, with keys and values already in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from kernelmux.graph.formats import Value, lookup
from kernelmux.graph.ops.cases import ROW_COUNTS, Case, Draw, all_weights, linear_fields, loud
from kernelmux.graph.ops.fused import Fused, Part
from kernelmux.graph.ops.op import column_count, has_bias, row_count, weight_formats
from kernelmux.graph.ops.qkv import products
from kernelmux.graph.ops.rope import Rope, Rotation


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
        bias: bool = False,
        divisors: bool = False,
        padding: int = 0,
        first: int = 3,
        stride: int = 1,
        cache: str = "f32",
    ) -> Case:
        import torch

        heads, kv_heads, dim, page_size = 4, 2, 16, 16
        # As few columns as the format's blocks allow, 96 at least.
        block = lookup(format).block
        k, pages = -(-96 // block) * block, 6 + m // page_size
        widths = (heads * dim, kv_heads * dim, kv_heads * dim)
        fields: dict[str, Any] = linear_fields("qkv", widths, [format] * 3, k, bias)
        fields["weight"] += (Value("divisors", (dim // 2,)),) if divisors else ()
        rotation = Rotation(theta=1e4, dims=dim, pairing=pairing)
        fields |= {"rotation": rotation, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        shape = (pages, page_size, kv_heads, dim)
        ids = [Value(port, (m,), "i32") for port in ("positions", "slots")]
        inputs = [Value("x", (m, k)), *ids, Value("k_cache", shape, cache), Value("v_cache", shape, cache)]

        def slots(generator: torch.Generator) -> torch.Tensor:
            order = torch.randperm(pages * page_size, generator=generator)[:m]
            order[m - padding :] = -1
            return order

        draw: dict[str, Draw] = {
            "positions": lambda generator: (first + stride * torch.arange(m)).to(torch.int32),
            "slots": slots,
            **{f"b{port}": loud(n) for port, n in zip("qkv", widths, strict=True)},
            "divisors": lambda generator: 1 + torch.rand(dim // 2, generator=generator) * 7,
        }
        return self.make_case(label, inputs, fields, draw)

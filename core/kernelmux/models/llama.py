"""The llama architecture: a model file's metadata and tensors to a graph.

Enters: GGUF metadata (`llama.*`) and the stored weights. Leaves: a Graph whose layer is rms_norm, q, k, v, rope, copy,
attention, o, add, rms_norm, gate, up, silu, mul, down, add; ModelError where the file does not hold such a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernelmux.errors import label, shown
from kernelmux.graph.formats import Dim, Value
from kernelmux.graph.graph import Builder, Graph
from kernelmux.graph.ops import Rotation
from kernelmux.models.gguf import ModelFile


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes: what the graph, the cache and the batch need to know."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    rotation: Rotation


def build(file: ModelFile) -> tuple[Graph, Shape]:
    """The graph of a `llama` file; ModelError names the missing key or tensor, or the wrong shape."""
    shape = _read_shape(file)
    return _Layers(file, shape).graph(), shape


def _read_shape(file: ModelFile) -> Shape:
    metadata = _Metadata(file)
    hidden = metadata.count("embedding_length")
    heads = metadata.count("attention.head_count")
    head_dim = metadata.count("attention.key_length", hidden // heads)
    kv_heads = metadata.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise file.fault(f"{heads} query heads do not divide over {kv_heads} kv heads")
    vocab = len(file.metadata.get("tokenizer.ggml.tokens", ())) or metadata.count("vocab_size")
    return Shape(
        layers=metadata.count("block_count"),
        hidden=hidden,
        feed_forward=metadata.count("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=metadata.count("context_length"),
        epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
        rotation=_read_rotation(metadata, head_dim),
    )


def _read_rotation(metadata: _Metadata, head_dim: int) -> Rotation:
    scaling = metadata.text("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise metadata.file.fault(f"rope scaling {shown(scaling)} is not known; known: linear, none, yarn")
    dims = metadata.count("rope.dimension_count", head_dim)
    if dims > head_dim or dims % 2:
        raise metadata.file.fault(f"llama.rope.dimension_count is {dims}, of heads of {head_dim}")
    # GGUF stores llama's q and k permuted, so that neighbours turn together.
    return Rotation(
        theta=metadata.number("rope.freq_base", 10_000.0),
        dims=dims,
        pairing="adjacent",
        scaling=scaling,  # type: ignore[arg-type]
        factor=metadata.number("rope.scaling.factor", 1.0),
        original_context=metadata.count("rope.scaling.original_context_length", metadata.count("context_length")),
    )


@dataclass(frozen=True)
class _Metadata:
    """The `llama.` keys of a file, each checked for type and range when it is read."""

    file: ModelFile
    prefix: str = "llama"

    def count(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.file.fault(f"{self.prefix}.{key} is {str(value)[:40]}, a positive count is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.file.fault(f"{self.prefix}.{key} is {str(value)[:40]}, a positive number is needed")
        return float(value)

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default))

    def _get(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise self.file.fault(f"the metadata lacks {self.prefix}.{key}, which a llama model must state")
        return value


class _Layers:
    """Builds the graph: state leaves first, then one layer after another."""

    def __init__(self, file: ModelFile, shape: Shape) -> None:
        self._file = file
        self._shape = shape
        self._builder = Builder(label(str(file.metadata.get("general.name", file.path.stem))))
        self._state = {name: self._builder.leaf(name, dims, "i32", role="state") for name, dims in STEP_STATE.items()}

    def graph(self) -> Graph:
        b, s = self._builder, self._shape
        table = self._weight("token_embd.weight", s.vocab, s.hidden)
        divisors = self._file.weights.get("rope_freqs.weight")
        self._divisors = () if divisors is None else (self._weight("rope_freqs.weight", s.rotation.dims // 2),)
        x = b.value("embed", "embed", self._state["tokens"], weight=(table,))
        for layer in range(s.layers):
            x = self._attention_block(layer, x)
            x = self._feed_forward_block(layer, x)
        # Logits are computed only for the rows that the step asks for.
        x = b.value("embed", "logit_rows.select", self._state["logit_rows"], x)
        x = self._norm("output_norm", x, None)
        tied = "output.weight" not in self._file.weights
        head = table if tied else self._weight("output.weight", s.vocab, s.hidden)
        return b.build(b.value("mul_mat", "logits", x, weight=(head,)))

    def _attention_block(self, layer: int, x: Value) -> Value:
        b, s, state, at = self._builder, self._shape, self._state, f"blk.{layer}"
        heads: dict[str, Any] = {"num_heads": s.heads}
        kept: dict[str, Any] = {"num_kv_heads": s.kv_heads, "head_dim": s.head_dim, "layer": layer}
        extents = ("pages", "page_size", s.kv_heads, s.head_dim)
        cache: Sequence[Value] = [b.leaf(f"{at}.{part}_cache", extents, role="cache") for part in "kv"]
        normed = self._norm(f"{at}.attn_norm", x, layer)
        counts = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (self._linear(f"{at}.attn_{part}", normed, n * s.head_dim, layer) for part, n in counts.items())
        turned: dict[str, Any] = {"rotation": s.rotation, "weight": self._divisors}
        q, k = b.node("rope", f"{at}.rope", q, k, state["positions"], **turned, **heads, **kept)
        cache = b.node("copy", f"{at}.copy", k, v, state["slots"], *cache, **kept)
        read = (q, *cache, *(state[name] for name in ("query_start", "kv_len", "block_table")))
        mixed = b.value("attention", f"{at}.attention", *read, scale=s.head_dim**-0.5, **heads, **kept)
        out = self._linear(f"{at}.attn_output", mixed, s.hidden, layer)
        return b.value("add", f"{at}.attn_add", x, out, layer=layer)

    def _feed_forward_block(self, layer: int, x: Value) -> Value:
        b, s, at = self._builder, self._shape, f"blk.{layer}"
        normed = self._norm(f"{at}.ffn_norm", x, layer)
        gate = self._linear(f"{at}.ffn_gate", normed, s.feed_forward, layer)
        up = self._linear(f"{at}.ffn_up", normed, s.feed_forward, layer)
        gated = b.value("silu", f"{at}.ffn_silu", gate, layer=layer)
        product = b.value("mul", f"{at}.ffn_mul", gated, up, layer=layer)
        down = self._linear(f"{at}.ffn_down", product, s.hidden, layer)
        return b.value("add", f"{at}.ffn_add", x, down, layer=layer)

    def _norm(self, name: str, x: Value, layer: int | None) -> Value:
        gamma = self._weight(f"{name}.weight", self._shape.hidden)
        return self._builder.value("rms_norm", name, x, gamma=(gamma,), epsilon=self._shape.epsilon, layer=layer)

    def _linear(self, name: str, x: Value, n: int, layer: int) -> Value:
        k = x.shape[1]
        assert isinstance(k, int)
        bias = (self._weight(f"{name}.bias", n),) if f"{name}.bias" in self._file.weights else ()
        weight = self._weight(f"{name}.weight", n, k)
        return self._builder.value("mul_mat", name, x, weight=(weight,), bias=bias, layer=layer)

    def _weight(self, name: str, *shape: int) -> Value:
        """The leaf of a stored tensor, which must exist with this shape."""
        weight = self._file.weights.get(name)
        if weight is None:
            raise self._file.fault(f"tensor {name!r} is missing; a llama model needs it")
        if weight.shape != shape:
            raise self._file.fault(f"tensor {name!r} is {weight.shape}, the metadata asks for {shape}")
        return self._builder.leaf(name, shape, weight.format)


STEP_STATE: Mapping[str, tuple[Dim, ...]] = {
    "tokens": ("m",),
    "positions": ("m",),
    "slots": ("m",),
    "logit_rows": ("outs",),
    "query_start": ("seqs+1",),
    "kv_len": ("seqs",),
    "block_table": ("seqs", "width"),
}
"""The step's buffers, all i32: what changes from one walk to the next."""

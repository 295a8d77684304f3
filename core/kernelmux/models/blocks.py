"""What architectures share: step state, embedding, norms, linear layers, attention over a cache, feed-forward, head.

Enters: a ModelFile and an architecture's calls. Leaves: a Graph; ModelError where the file does not hold such a model.
Tensors have GGUF's names: blk.N.attn_q, blk.N.ffn_up and so on, and nodes are called as their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kernelmux.errors import label
from kernelmux.graph.formats import Dim, Value
from kernelmux.graph.graph import Builder, Graph
from kernelmux.graph.ops import Rotation
from kernelmux.models.gguf import ModelFile
from kernelmux.models.hyperparameters import Hyperparameters
from kernelmux.models.shape import Pairing, read_rotation, read_shape
from kernelmux.models.tensors import Tensors

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


DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

Activation = Literal["silu", "gelu"]
FeedForward = Callable[[int, Value], Value]
"""From a layer's number and normed rows to what is added to the rows."""


@dataclass(frozen=True)
class Attention:
    """How a layer attends."""

    rotation: Rotation | None
    """None where queries and keys have no positions."""
    divisors: str = ""
    """The tensor of what the rotation's frequencies are divided by; none where it is empty."""
    window: int = 0
    """How many positions a row sees, itself included; 0: all."""
    scale: float = 0.0
    """What scores are multiplied by; 0: one over the root of the head's size."""
    soft_cap: float = 0.0
    chunk: int = 0
    """Of how many positions chunks are, of which a row sees its own alone; 0: all are one."""
    sinks: bool = False
    """Whether each head has one more score, learned, that takes its share and has no value."""
    norm: Literal["", "head", "row", "turned"] = ""
    """Whether queries and keys are normed, each head by itself or whole rows; or heads once they have turned."""
    temper: tuple[float, int] | None = None
    """Scale and span of what queries are multiplied by, more the farther into a text (op temper); None: by nothing."""


@dataclass(frozen=True)
class Experts:
    """How a layer's rows are given to experts."""

    count: int
    used: int
    """Experts of each row."""
    width: int
    """Outputs of an expert's gate and up projections."""
    renormalize: bool
    """Whether the weights of a row's experts add up to one."""
    sigmoid: bool = False
    """Whether the weight of a row's one expert is a sigmoid, and multiplies what it reads instead of what it makes."""
    limit: float = 0.0
    alpha: float = 0.0
    """Where gates and ups are clamped, and what gates are multiplied by (clamped_swiglu); 0: silu alone."""


@dataclass(frozen=True)
class Routed:
    """Which experts each row goes to, and where their weights count: in what is read, or in what is made."""

    ids: Value
    """[m, used]"""
    read: Callable[[Value], Value]
    """From rows to what experts read."""
    added: Callable[[Value], Value]
    """From what a row's experts made, side by side, to what they make of it together."""


class Blocks:
    """Builds the graph of one file: state leaves first, then what the architecture asks for.

    `context` tokens are to be held: a file that has divisors for short and for long contexts is built with one of them.
    """

    def __init__(self, file: ModelFile, architecture: str, context: int = 0) -> None:
        self.keys = Hyperparameters(file, architecture)
        self.shape = read_shape(self.keys)
        self.tensors = Tensors(file, architecture, self.shape.layers)
        if context > self.shape.context:
            raise file.fault(f"a context of {context} tokens was asked for, the model holds {self.shape.context}")
        self._context = context
        self._leaves: dict[str, Value] = {}
        self._builder = Builder(label(str(file.metadata.get("general.name", file.path.stem))))
        self._state = {name: self._builder.leaf(name, dims, "i32", role="state") for name, dims in STEP_STATE.items()}

    def finish(self) -> ModelFile:
        """The file whose weights are the graph's; ModelError where a key or a tensor of it was left out."""
        self.keys.finish()
        return self.tensors.finish()

    def rotation(self, pairing: Pairing, truncate: bool = True) -> Rotation:
        """The rotary embedding that the file states; whether yarn's pairs are whole numbers it need not."""
        return read_rotation(self.keys, self.shape, pairing, truncate)

    def divisors(self) -> str:
        """The tensor that divides the rotation's frequencies, where the file has one.

        Of those for short and for long contexts it is the short one's, and the model holds no more, unless more tokens
        are to be held.
        """
        if SHORT not in self.tensors:
            return DIVISORS if DIVISORS in self.tensors else ""
        short = self.keys.count("rope.scaling.original_context_length", self.shape.context)
        wanted, other = (LONG, SHORT) if self._context > short else (SHORT, LONG)
        if other in self.tensors:
            self.tensors.take(other, self.keys.count("rope.dimension_count", self.shape.head_dim) // 2)
        if wanted == SHORT:
            held = min(short, self.shape.context)
            self.shape = replace(
                self.shape, context=held, longest=self.shape.longest if other in self.tensors else held
            )
        return wanted

    def windows(self, period: int = 0, usual: int | None = 0) -> list[int]:
        """How many positions each layer's rows see, itself included; 0: all.

        Where the file has a window and does not say of which layers it is, the last of each `period` sees all; of a
        period of 0 none does. `usual` is the window where the file has none; None: it must state one, if only 0.
        """
        layers, pattern = self.shape.layers, "attention.sliding_window_pattern"
        window = self.keys.count("attention.sliding_window", usual, least=0)
        if self.keys.is_list(pattern):
            slides = self.keys.flags_of_layers(pattern, layers)
        else:
            period = self.keys.count(pattern, period, least=0)
            slides = [not period or layer % period < period - 1 for layer in range(layers)]
        return [window if each else 0 for each in slides]

    def turning(self) -> list[bool]:
        """Which layers' queries and keys have positions: where the file does not say, all but each fourth."""
        layers, period = self.shape.layers, self.keys.count("rope.layer_interval", 4)
        usual = [(layer + 1) % period != 0 for layer in range(layers)]
        return self.keys.flags_of_layers("rope.layers", layers, usual)

    def experts(self, width_key: str, renormalize: bool) -> Experts | None:
        """How many experts the file states, and of what width; None where it has none."""
        count = self.keys.count("expert_count", 0, least=0)
        used = self.keys.count("expert_used_count", None if count else 0, least=0)
        if not count and not used:
            return None
        if not 0 < used <= count:
            self.keys.fail("expert_used_count", f"from 1 to the model's {count} experts are needed")
        return Experts(count, used, self.keys.count_of_layers(width_key, self.shape.layers), renormalize)

    def embedding(self, scale: float = 1.0) -> Value:
        """Rows of the table by the step's tokens, times `scale`."""
        table = self._weight("token_embd.weight", self.shape.vocab, self.shape.hidden)
        x = self._builder.value("embed", "embed", self._state["tokens"], weight=(table,))
        return self.scaled("embed_scale", x, scale)

    def logits(self, x: Value, scale: float = 1.0, soft_cap: float = 0.0, own_head: bool = False) -> Graph:
        """The whole graph, which hands back logits of those rows that the step asks for.

        The head is the table of embeddings, unless the file has one of its own, as it must where `own_head`.
        """
        b, s = self._builder, self.shape
        x = b.value("embed", "logit_rows.select", self._state["logit_rows"], x)
        x = self.norm("output_norm", x)
        name = "output.weight" if own_head or "output.weight" in self.tensors else "token_embd.weight"
        changed = scale != 1 or soft_cap
        y = b.value("mul_mat", "output" if changed else "logits", x, weight=(self._weight(name, s.vocab, s.hidden),))
        if scale != 1:
            y = b.value("scale", "output_scale" if soft_cap else "logits", y, scale=scale)
        if soft_cap:
            y = b.value("soft_cap", "logits", y, soft_cap=soft_cap)
        return b.build(y)

    def norm(self, name: str, x: Value, layer: int | None = None) -> Value:
        """Rows of unit root mean square, times `name`.weight."""
        (width,) = _columns(x)
        gamma = self._weight(f"{name}.weight", width)
        return self._builder.value("rms_norm", name, x, gamma=(gamma,), epsilon=self.shape.epsilon, layer=layer)

    def linear(self, name: str, x: Value, n: int, layer: int | None = None) -> Value:
        """x times `name`.weight, and `name`.bias where the file has one."""
        (k,) = _columns(x)
        bias = (self._weight(f"{name}.bias", n),) if f"{name}.bias" in self.tensors else ()
        weight = self._weight(f"{name}.weight", n, k)
        return self._builder.value("mul_mat", name, x, weight=(weight,), bias=bias, layer=layer)

    def add(self, name: str, x: Value, y: Value, layer: int | None = None) -> Value:
        return self._builder.value("add", name, x, y, layer=layer)

    def scaled(self, name: str, x: Value, scale: float, layer: int | None = None) -> Value:
        """x times a number; x itself where that is 1."""
        return x if scale == 1 else self._builder.value("scale", name, x, scale=scale, layer=layer)

    def pre_norm_layer(self, layer: int, x: Value, how: Attention, feed_forward: FeedForward | None = None) -> Value:
        """A whole layer: attention and feed-forward (its own, unless told), each after a norm and added to what was."""
        at = f"blk.{layer}"
        mixed = self.attention(layer, self.norm(f"{at}.attn_norm", x, layer), how)
        x = self.add(f"{at}.attn_add", x, mixed, layer)
        made = (feed_forward or self.feed_forward)(layer, self.norm(f"{at}.ffn_norm", x, layer))
        return self.add(f"{at}.ffn_add", x, made, layer)

    def attention(self, layer: int, x: Value, how: Attention) -> Value:
        """From normed rows to attention's output projection, through the layer's cache."""
        b, s, state, at = self._builder, self.shape, self._state, f"blk.{layer}"
        heads: dict[str, Any] = {"num_heads": s.heads}
        kept: dict[str, Any] = {"num_kv_heads": s.kv_heads, "head_dim": s.head_dim, "layer": layer}
        extents = ("pages", "page_size", s.kv_heads, s.head_dim)
        cache: Sequence[Value] = [b.leaf(f"{at}.{part}_cache", extents, role="cache") for part in "kv"]
        counts = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (self.linear(f"{at}.attn_{part}", x, n * s.head_dim, layer) for part, n in counts.items())
        if how.norm == "row":
            q, k = (self.norm(f"{at}.attn_{part}_norm", rows, layer) for part, rows in (("q", q), ("k", k)))
        normed: dict[str, Any] = {"epsilon": s.epsilon, **heads, **kept}
        if how.norm == "head":
            gamma = tuple(self._weight(f"{at}.attn_{part}_norm.weight", s.head_dim) for part in "qk")
            q, k = b.node("qk_norm", f"{at}.qk_norm", q, k, gamma=gamma, **normed)
        if how.rotation is not None:
            divisors = (self._weight(how.divisors, how.rotation.dims // 2),) if how.divisors else ()
            turned: dict[str, Any] = {"rotation": how.rotation, "weight": divisors}
            q, k = b.node("rope", f"{at}.rope", q, k, state["positions"], **turned, **heads, **kept)
        if how.norm == "turned":
            ones = (self._ones(s.head_dim),) * 2
            q, k = b.node("qk_norm", f"{at}.qk_norm", q, k, gamma=ones, **normed)
        if how.temper is not None:
            scale, span = how.temper
            q = b.value("temper", f"{at}.temper", q, state["positions"], scale=scale, span=span, layer=layer)
        cache = b.node("copy", f"{at}.copy", k, v, state["slots"], *cache, **kept)
        read = (q, *cache, *(state[name] for name in ("query_start", "kv_len", "block_table")))
        seen: dict[str, Any] = {"window": how.window, "chunk": how.chunk, "soft_cap": how.soft_cap}
        seen["scale"] = how.scale or s.head_dim**-0.5
        seen["weight"] = (self._weight(f"{at}.attn_sinks.weight", s.heads),) if how.sinks else ()
        mixed = b.value("attention", f"{at}.attention", *read, **seen, **heads, **kept)
        return self.linear(f"{at}.attn_output", mixed, s.hidden, layer)

    def feed_forward(self, layer: int, x: Value, activation: Activation = "silu") -> Value:
        """From normed rows to the down projection of a gated layer."""
        return self._gated_layer(layer, x, self.shape.feed_forward, activation)

    def shared_expert(self, layer: int, x: Value, width: int) -> Value:
        """The same of a gated layer of that width that all rows go through beside their experts."""
        return self._gated_layer(layer, x, width, end="_shexp")

    def _gated_layer(self, layer: int, x: Value, width: int, activation: Activation = "silu", end: str = "") -> Value:
        """`end` is how its names end."""
        gate, up = (self.linear(f"blk.{layer}.ffn_{part}{end}", x, width, layer) for part in ("gate", "up"))
        active = self._gated(layer, gate, up, activation, end)
        return self.linear(f"blk.{layer}.ffn_down{end}", active, self.shape.hidden, layer)

    def expert_feed_forward(self, experts: Experts, layer: int, x: Value) -> Value:
        """From normed rows to the weighted sum of what each row's experts, gated layers all, make of it.

        Rows of a row's experts lie side by side: [m, used * width].
        """
        b, at, routed = self._builder, f"blk.{layer}", self._routed(experts, layer, x)

        def by_experts(name: str, rows: Value, n: int, k: int) -> Value:
            stored, count = f"{at}.{name}", experts.count
            weight = self._weight(f"{stored}.weight", n, k, experts=count)
            bias = (self._weight(f"{stored}.bias", n, experts=count),) if f"{stored}.bias" in self.tensors else ()
            kept: dict[str, Any] = {"weight": (weight,), "bias": bias, "experts": count, "layer": layer}
            return b.value("mul_mat_id", stored, rows, routed.ids, **kept)

        wide, hidden, read = experts.width, self.shape.hidden, routed.read(x)
        gate, up = (by_experts(f"ffn_{part}_exps", read, wide, hidden) for part in ("gate", "up"))
        if experts.limit:
            clamped: dict[str, Any] = {"limit": experts.limit, "alpha": experts.alpha, "layer": layer}
            active = b.value("clamped_swiglu", f"{at}.ffn_clamped_swiglu", gate, up, **clamped)
        else:
            active = self._gated(layer, gate, up)
        return routed.added(by_experts("ffn_down_exps", active, hidden, wide))

    def _routed(self, experts: Experts, layer: int, x: Value) -> Routed:
        """Each row's experts, by a linear layer of its own."""
        b, at = self._builder, f"blk.{layer}"
        logits = self.linear(f"{at}.ffn_gate_inp", x, experts.count, layer)
        chosen: dict[str, Any] = {"top_k": experts.used, "renormalize": experts.renormalize, "layer": layer}
        ids, weights = b.node("route", f"{at}.ffn_route", logits, sigmoid=experts.sigmoid, **chosen)

        def weighed(name: str) -> Callable[[Value], Value]:
            return lambda rows: b.value("expert_sum", f"{at}.{name}", rows, weights, layer=layer)

        def alike(rows: Value) -> Value:
            return rows

        if experts.sigmoid:
            # Of one expert the weighted sum is the row times its weight.
            return Routed(ids, weighed("ffn_weighed"), alike)
        return Routed(ids, alike, weighed("ffn_experts"))

    def _gated(self, layer: int, gate: Value, up: Value, activation: Activation = "silu", end: str = "") -> Value:
        """What a gated layer's down projection reads."""
        b, at = self._builder, f"blk.{layer}"
        active = b.value(activation, f"{at}.ffn_{activation}{end}", gate, layer=layer)
        return b.value("mul", f"{at}.ffn_mul{end}", active, up, layer=layer)

    def _ones(self, width: int) -> Value:
        """The leaf of as many ones, for a norm of which files store no factors."""
        self.tensors.make_ones("ones", width)
        return self._weight("ones", width)

    def _weight(self, name: str, *shape: int, experts: int = 0) -> Value:
        """The leaf of a stored tensor, made when it is first read; of experts their rows are one after another's."""
        if name not in self._leaves:
            taken = self.tensors.take_stacked(name, experts, *shape) if experts else self.tensors.take(name, *shape)
            self._leaves[name] = self._builder.leaf(name, taken.shape, taken.format)
        return self._leaves[name]


def _columns(x: Value) -> tuple[int]:
    columns = x.shape[1]
    assert isinstance(columns, int)
    return (columns,)

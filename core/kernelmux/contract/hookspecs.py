"""The whole contract for backends: one hook an op, what it may answer, and what a kernel is.

A backend is a Python module (or object) with hook implementations, found through the entry point group
`kernelmux.backends`. A hook is asked while a plan is made; it answers with kernels for this very node, best first, or
with `Declined` and the reason. It names only those arguments that it uses. Nothing here imports torch.

Nodes that are alike but for name and layer are asked once: an answer must not depend on those two. Row counts may still
be symbols in the nodes that `inputs`, `outputs` and `packed_bytes` are given; `workspace` and `bind` get numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pluggy

if TYPE_CHECKING:
    import torch

    from kernelmux.contract.device import Device
    from kernelmux.graph.formats import Weight
    from kernelmux.graph.graph import TensorNode
    from kernelmux.graph.ops import Fused, Rotation

CONTRACT = 1
"""The version of this file's contract. A backend states the one that it was built for as its attribute `CONTRACT`."""

hookspec = pluggy.HookspecMarker("kernelmux")
hookimpl = pluggy.HookimplMarker("kernelmux")

ReasonKind = Literal[
    "format",
    "shape",
    "alignment",
    "dtype",
    "device",
    "capability",
    "missing dependency",
    "unsupported",
    "not offered",
    "forbidden",
    "over budget",
    "outranked",
    "raised",
]


@dataclass(frozen=True)
class Declined:
    """Why a backend, or one kernel of it, does not take a node: one clause for a person, a kind for a program."""

    reason: str
    kind: ReasonKind = "unsupported"
    kernel: str = ""
    """The kernel's name without its backend; empty where the whole backend declines."""


Launch = Callable[[], object]
"""What `bind` returns: a call without arguments that enqueues the node's work. What it returns is ignored."""


def in_turn(first: Launch, second: Launch) -> Launch:
    """The launch that makes these two, one after the other."""

    def launch() -> None:
        first()
        second()

    return launch


Planes = Any
"""How a bound kernel sees a tensor: a torch tensor where its format has one plane, else a tuple of them."""


@dataclass(frozen=True, eq=False)
class Tensors:
    """The memory of one bound node, at addresses that do not change while it is bound."""

    inputs: tuple[Planes, ...]
    outputs: tuple[Planes, ...]
    packed: tuple[torch.Tensor, ...] = ()
    """What `prepare` returned."""
    workspace: torch.Tensor | None = None
    """`workspace(node)` bytes of scratch, as uint8; what it holds is undefined before each launch."""
    host: tuple[torch.Tensor | None, ...] = ()
    """Of each input that is step state its mirror in host memory, which a launch may read without waiting for the
    device; None for the others. A kernel that reads it is not capturable."""


class Kernel(ABC):
    """One implementation of one op. Class attributes declare; four methods work. A kernel keeps no state of its own."""

    name: ClassVar[str]
    """Without the backend, as `int4`; plans and policies say `torch:int4`."""
    version: ClassVar[str] = "1"
    """Changes whenever its numbers or its packed form may: it is part of a plan's fingerprint."""
    precision: ClassVar[float]
    """Bound on the error against the op's float64 reference: NMSE, the squared error over the squared reference."""
    launches: ClassVar[int] = 1
    """Device launches of a call, at most: a library may split its work."""
    capturable: ClassVar[bool] = True
    """False where a launch reads host state or allocates, so that a CUDA graph cannot hold it."""
    stands_for: ClassVar[tuple[str, ...]] = ()
    """Of a fused kernel: backends beside its own, in place of whose kernels it may run, as of those it is made of."""
    packed: ClassVar[str] = ""
    """The name of the packed weights' form; kernels with the same name, on the same weights, share one copy."""

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        """The formats that each input may have, best first. As the graph states them, unless overridden."""
        return [[value.format] for value in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        """The formats that each output can be written in, best first. As the graph states them, unless overridden."""
        return [[value.format] for value in node.outputs]

    def packed_bytes(self, node: TensorNode) -> int:
        """Bytes that `prepare` will hold for this node, known before anything is packed."""
        return 0

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        """The packed form of the node's weights (weight, bias, gamma, in this order), made once and shared."""
        return ()

    def workspace(self, node: TensorNode) -> int:
        """Bytes of scratch that a launch needs, at the node's row count."""
        return 0

    @abstractmethod
    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        """A call that does the node's work on `stream` (a torch stream, None on the CPU).

        Everything slow happens here: compiling, loading, choosing. The node's extents and formats are final.
        """


Answer = Kernel | Declined | Sequence[Kernel | Declined] | None
"""What a hook may return; None, or not implementing it, means that the backend has nothing for this op."""


class Hooks:
    """One hook an op. `m` is the largest row count of the bucket in question: an offered kernel takes 1 to m rows."""

    @hookspec
    def dispatch_mul_mat(self, node: TensorNode, m: int, n: int, k: int, weight_format: str, device: Device) -> Answer:
        """y = x Wᵀ + b: m rows, n outputs, k inputs, the weight stored as `weight_format`."""

    @hookspec
    def dispatch_rms_norm(self, node: TensorNode, m: int, hidden_dim: int, epsilon: float, device: Device) -> Answer:
        """Rows scaled to unit root mean square, times gamma."""

    @hookspec
    def dispatch_add(self, node: TensorNode, m: int, n: int, device: Device) -> Answer:
        """The sum of two tensors of m rows and n columns."""

    @hookspec
    def dispatch_rope(
        self,
        node: TensorNode,
        m: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotation: Rotation,
        device: Device,
    ) -> Answer:
        """Queries and keys turned by position."""

    @hookspec
    def dispatch_attention(
        self,
        node: TensorNode,
        m: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int | None,
        cache_format: str,
        device: Device,
    ) -> Answer:
        """Causal grouped-query attention over the paged cache."""

    @hookspec
    def dispatch_copy(
        self, node: TensorNode, m: int, num_kv_heads: int, head_dim: int, cache_format: str, device: Device
    ) -> Answer:
        """New keys and values scattered into the paged cache."""

    @hookspec
    def dispatch_mul(self, node: TensorNode, m: int, n: int, device: Device) -> Answer:
        """The product of two tensors of m rows and n columns."""

    @hookspec
    def dispatch_silu(self, node: TensorNode, m: int, n: int, device: Device) -> Answer:
        """x times the sigmoid of x, m rows and n columns."""

    @hookspec
    def dispatch_embed(self, node: TensorNode, m: int, k: int, table_format: str, device: Device) -> Answer:
        """m rows of k columns, looked up in a table by id."""

    @hookspec
    def dispatch_convert(self, node: TensorNode, m: int, n: int, source: str, target: str, device: Device) -> Answer:
        """m rows of n columns, from the format `source` to the format `target`."""

    @hookspec
    def dispatch_add_rms_norm(
        self, node: TensorNode, m: int, hidden_dim: int, epsilon: float, device: Device
    ) -> Answer:
        """The sum of two tensors, and its norm."""

    @hookspec
    def dispatch_swiglu(self, node: TensorNode, m: int, n: int, device: Device) -> Answer:
        """silu(gate) * up, m rows and n columns."""

    @hookspec
    def dispatch_qkv(
        self, node: TensorNode, m: int, n: Sequence[int], k: int, weight_formats: Sequence[str], device: Device
    ) -> Answer:
        """Three mul_mats of one input: n and weight_formats of each."""

    @hookspec
    def dispatch_gate_up_swiglu(
        self, node: TensorNode, m: int, n: int, k: int, weight_formats: Sequence[str], device: Device
    ) -> Answer:
        """Two mul_mats of one input, then silu(gate) * up."""

    @hookspec
    def dispatch_mul_mat_add(
        self, node: TensorNode, m: int, n: int, k: int, weight_format: str, device: Device
    ) -> Answer:
        """A mul_mat added to the residual stream."""

    @hookspec
    def dispatch_qkv_rope_copy(
        self,
        node: TensorNode,
        m: int,
        k: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotation: Rotation,
        weight_formats: Sequence[str],
        cache_format: str,
        device: Device,
    ) -> Answer:
        """qkv, rope and copy in one."""

    @hookspec
    def fused_ops(self) -> Sequence[Fused]:
        """Fused ops that this backend brings; each has a hook `dispatch_<name>`, told `node`, its arguments, `device`.

        Asked once, when the backend is registered. Only a backend that brings an op implements this.
        """
        return ()

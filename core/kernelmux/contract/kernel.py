"""What a kernel is: what it declares of itself, and the five methods that a plan and a walk call.

A kernel is a class. Core makes an instance for each node and device that it is offered for, refuses what its
declarations exclude, and asks it for the rest. Asking is pure: nothing is compiled, allocated, measured or written
before `prepare` and `bind`. Nothing here imports torch.

Nodes that are alike but for name and layer are asked once: an answer must not depend on those two. Row counts may still
be symbols in the nodes that `inputs`, `outputs` and `packed_bytes` are given; all other methods get numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kernelmux.contract.cache import source_hash
from kernelmux.contract.device import Device, on_stream
from kernelmux.contract.weights import dense
from kernelmux.graph.formats import FORMATS, Value, Weight

if TYPE_CHECKING:
    import torch

    from kernelmux.graph.graph import TensorNode

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
    "failed",
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

    @property
    def matrix(self) -> torch.Tensor:
        """The matrix whose columns the outputs are, where they lie side by side; one output is its own."""
        first = self.outputs[0]
        width = sum(output.shape[1] for output in self.outputs)
        whole: torch.Tensor = first.as_strided((len(first), width), (width, 1)) if len(self.outputs) > 1 else first
        return whole


@dataclass(frozen=True)
class Efficiency:
    """What share of a device's ceilings a kernel reaches where they bound it: what it is chosen by, unless measured."""

    reading: float = 0.7
    """Of the rate at which memory is read, where a node moves much and computes little."""
    multiplying: float = 0.3
    """Of the rate of its arithmetic, where a node computes much."""
    arithmetic: str = "f32"
    """The format whose GEMM is that ceiling: `f32`, `bf16`, `fp8`, or `dp4a` for integers outside tensor cores."""


EVERY_OP = "*"
"""In `Kernel.ops`: whatever op there is, those of other backends too."""


class Kernel(ABC):
    """One implementation of an op. Class attributes declare; methods work. It keeps no state but what it is given."""

    ops: ClassVar[tuple[str, ...]] = ()
    """The ops that it implements: it is offered for their nodes."""
    name: ClassVar[str]
    """Without the backend, as `int4`; plans and policies say `torch:int4`."""
    version: ClassVar[str] = ""
    """Of its numbers and packed form; where it is empty, a hash of its package's source."""
    precision: ClassVar[float]
    """Bound on the error against the op's float64 reference: NMSE, the squared error over the squared reference."""
    launches: ClassVar[int] = 1
    """Device launches of a call, at most: a library may split its work."""
    capturable: ClassVar[bool] = True
    """False where a launch reads host state or allocates, so that a captured graph cannot hold it."""
    packed: ClassVar[str] = ""
    """The name of the packed weights' form; kernels with the same name, on the same weights, share one copy.

    Where it is that of a plain format, core makes each weight dense in it, unless `prepare` is overridden."""
    input_formats: ClassVar[Sequence[str]] = ()
    """The formats that it reads activations in, best first; as the graph states them where there are none."""
    output_formats: ClassVar[Sequence[str]] = ()
    """The formats that it writes activations in, likewise."""
    devices: ClassVar[tuple[str, ...]] = ()
    """Kinds of device that it runs on; empty: all that its backend does."""
    capability: ClassVar[tuple[int, int]] = (0, 0)
    """Least compute capability of a CUDA device."""
    takes: ClassVar[Mapping[str, object]] = {}
    """What it takes of what its hook is told: values or a range each, `{"weight_format": ("Q4_0",), "m": "..64"}`."""
    side_by_side: ClassVar[bool] = False
    """Whether it writes its outputs as the columns of one matrix: `bind` finds them beside each other in memory."""
    rounds_to: ClassVar[str] = ""
    """A format that its results pass through, whichever it writes: then `auto` takes no logits from it."""
    strided: ClassVar[bool] = False
    """Whether it reads inputs [rows, columns] that are columns of a wider matrix, and so have gaps between rows."""

    efficiency: Efficiency = Efficiency()
    """What share of the device's ceilings it reaches, as far as its author can tell without measuring."""

    device: Device = Device("cpu")
    """The device that the instance was made for."""
    backend: str = ""
    """The backend that offers it; core says so."""
    edition: int = 0
    """How many backends of its name were taken out before, as where a notebook defines one again; core says so."""
    variant: Any = None
    """Of a kernel with variants the one that the plan has taken for the node's rows; None before."""

    def refuses(self, node: TensorNode) -> Declined | None:
        """Why it does not take a node of up to as many rows as the node has, beside what it declares; None: it does."""
        return None

    def comes_late(self, node: TensorNode) -> bool:
        """Whether its backend's other kernels come before it for a node, against the order in which they are listed."""
        return False

    def joins(self, node: TensorNode) -> bool:
        """Whether it writes a node's outputs side by side: where there are several."""
        return self.side_by_side and len(node.outputs) > 1

    def variants(self, node: TensorNode) -> Sequence[Any]:
        """The ways in which it may do a node, told apart by `str`: tilings. The first is the one to try untold."""
        return ()

    def work(self, node: TensorNode) -> str:
        """What decides between variants: nodes of the same work take the same one."""
        return ""

    def reaches(self, node: TensorNode) -> Efficiency:
        """What it reaches at a node's extents, where `efficiency` is not the same for all of them."""
        return self.efficiency

    def inputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        """The formats that each input may have, best first. Unless overridden, what `input_formats` says."""
        return [_formats(value, self.input_formats) for value in node.inputs]

    def outputs(self, node: TensorNode) -> Sequence[Sequence[str]]:
        """The formats that each output can be written in, best first. Unless overridden, what `output_formats` says."""
        return [_formats(value, self.output_formats) for value in node.outputs]

    def packed_bytes(self, node: TensorNode) -> int:
        """Bytes that `prepare` will hold for this node, known before anything is packed."""
        return sum(FORMATS[self.packed].nbytes(value.extents) for value in node.weights) if self._packs_dense else 0

    def prepare(self, weights: Sequence[Weight], device: Device) -> tuple[torch.Tensor, ...]:
        """The packed form of the node's weights (weight, bias, gamma, in this order), made once and shared."""
        if not self._packs_dense:
            return ()
        return tuple(dense(weight, FORMATS[self.packed].dtype, device) for weight in weights)

    def workspace(self, node: TensorNode) -> int:
        """Bytes of scratch that a launch needs, at the node's row count."""
        return 0

    @abstractmethod
    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        """A call that does the node's work on `stream` (a torch stream, None on the CPU).

        Everything slow happens here: compiling, loading, choosing. The node's extents and formats are final. Nodes are
        bound in several threads at once.
        """

    @property
    def full_name(self) -> str:
        """With its backend, as plans and policies say it: `torch:int4`."""
        return f"{self.backend}:{self.name}"

    @property
    def own_version(self) -> str:
        """What a plan's fingerprint holds: the version that it states, else that of its package's source."""
        return self.version or source_hash(type(self))

    @property
    def _packs_dense(self) -> bool:
        return self.packed in FORMATS and FORMATS[self.packed].plain

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


def _formats(value: Value, formats: Sequence[str]) -> Sequence[str]:
    """Those for rows of activations; ids, lengths and caches are as the graph states them."""
    return formats if formats and value.convertible else [value.format]


class CurrentStream(Kernel):
    """A kernel whose library launches on torch's current stream: for each launch that is made the kernel's own."""

    def bind(self, node: TensorNode, tensors: Tensors, stream: Any) -> Launch:
        return on_stream(self.call(node, tensors), stream)

    @abstractmethod
    def call(self, node: TensorNode, tensors: Tensors) -> Launch:
        """As `bind`, for whatever stream is torch's current one when it is called."""


Answer = Kernel | Declined | Sequence[Kernel | Declined]
"""What a hook for an op may return: one, or several, best first."""

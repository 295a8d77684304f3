"""Single kernels, timed: bound as a walk binds them, their operands rotated past the cache, beside every peer.

Enters: a Work, the registry, the machine's ceilings. Leaves: a row for each kernel that takes the node; why each other
one declines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelmux.contract.answers import bound, checked_workspace
from kernelmux.contract.device import Ceilings, Device
from kernelmux.contract.kernel import Declined, Kernel, Tensors
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.registry import Registry
from kernelmux.graph.formats import Value, Weight, as_planes, empty_planes, side_by_side
from kernelmux.graph.graph import TensorNode
from kernelmux.measure.ceilings import gemm_ceiling
from kernelmux.measure.table import Tables
from kernelmux.measure.timing import Timing, time_launches
from kernelmux.measure.works import Work, stored_as
from kernelmux.models.random import RandomWeights, random_planes

if TYPE_CHECKING:
    import torch

MOST_COPIES = 64
"""Operands so small that more copies would be needed lie in the cache in a real step as well."""


@dataclass(frozen=True)
class OpTiming:
    """One kernel at one work."""

    work: Work
    kernel: str
    node: TensorNode
    """The work's node with its values as the kernel stores them."""
    timing: Timing
    packed_bytes: int
    rotated_bytes: int

    def row(self, ceilings: Ceilings) -> dict[str, Any]:
        """What a table shows."""
        flops, nbytes, seconds = self.work.flops, self.work.nbytes(self.node), self.timing.median / 1e6
        formats = (self.node.inputs[0].format, self.node.outputs[0].format)
        gemm = gemm_ceiling(ceilings, formats) if self.node.weight and flops else None
        return {
            "op": self.node.op,
            "work": self.work.label,
            "m": self.work.m,
            "kernel": self.kernel,
            "formats": " to ".join(dict.fromkeys(formats)),
            "us": round(self.timing.median, 2),
            "p10 to p90": [round(self.timing.p10, 2), round(self.timing.p90, 2)],
            "GB/s": round(nbytes / seconds / 1e9, 1),
            "% of reading": round(100 * nbytes / seconds / ceilings.read, 1),
            "TFLOP/s": round(flops / seconds / 1e12, 3),
            "% of GEMM": round(100 * flops / seconds / gemm, 1) if gemm else "",
            "captured": self.timing.captured,
            "packed MB": round(self.packed_bytes / 1e6, 2),
            "rotated MB": round(self.rotated_bytes / 1e6, 1),
        }


def find_kernels(work: Work, registry: Registry, device: Device) -> tuple[Mapping[str, Kernel], Mapping[str, Declined]]:
    """Every kernel that takes the node, with the variant that a plan would take, and why the others do not."""
    offer, tables = registry.offer(work.node, device), Tables(device)
    for kernel in offer.kernels.values():
        if (picked := tables.pick(kernel, work.node)) is not None:
            kernel.variant = picked[0]
    return offer.kernels, offer.declined


def random_weights(works: Iterable[Work], device: Device) -> PackedWeights:
    """Weights for every work, drawn and packed when a kernel is timed, and shared by those that pack alike."""
    values = [value for work in works for value in work.node.weights]
    described = {value.name: Weight(value.name, value.extents, value.format, ()) for value in values}
    return PackedWeights(RandomWeights(described, device.torch), device)


def time_kernel(work: Work, name: str, kernel: Kernel, weights: PackedWeights, activations: str) -> OpTiming:
    """Times a kernel, its activations stored as `activations` wherever it can read and write that."""
    node, device = stored_as(work.node, kernel, activations), weights.device
    packed, stream = weights.get(node, name, kernel), device.platform.stream(device)
    tensors = list(_rotation(work, node, kernel, packed, device))
    calls = [bound(kernel, node, operands, stream) for operands in tensors]
    timing = time_launches(calls, device, kernel.capturable, stream)
    packed_bytes = sum(part.nbytes for part in packed)
    return OpTiming(work, name, node, timing, packed_bytes, len(tensors) * _operand_bytes(node, packed))


def bind_once(work: Work, name: str, kernel: Kernel, weights: PackedWeights) -> None:
    """Binds a kernel as `time_kernel` does, in the formats that it likes best: what it compiles is compiled then."""
    node, device = stored_as(work.node, kernel, ""), weights.device
    packed = weights.get(node, name, kernel)
    operands = next(_rotation(work, node, kernel, packed, device))
    bound(kernel, node, operands, device.platform.stream(device))


def _operand_bytes(node: TensorNode, packed: Sequence[torch.Tensor]) -> int:
    return sum(value.nbytes for value in (*node.inputs, *node.outputs)) + sum(part.nbytes for part in packed)


def copies(nbytes: int, device: Device) -> int:
    """How many copies of operands of `nbytes` outrun the cache."""
    platform = device.platform
    return max(1, min(MOST_COPIES, -(-max(platform.past_cache, 2 * platform.cache_bytes(device)) // nbytes)))


def _rotation(
    work: Work, node: TensorNode, kernel: Kernel, packed: tuple[torch.Tensor, ...], device: Device
) -> Iterator[Tensors]:
    """The node's memory, as often as it takes to outrun the cache; scratch is one, as in a plan's arena."""
    import torch

    inputs = [_drawn(work, node, value, device) for value in node.inputs]
    nbytes = checked_workspace(kernel, node)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device.torch) if nbytes else None
    host = tuple(
        parts[0].cpu() if value.format == "i32" else None for value, parts in zip(node.inputs, inputs, strict=True)
    )
    for copy in range(copies(_operand_bytes(node, packed), device)):
        mine = [tuple(part.clone() for part in parts) if copy else parts for parts in inputs]
        outputs = [empty_planes(value, device.torch) for value in node.outputs]
        if kernel.joins(node):
            outputs = [(part,) for part in side_by_side(node.outputs, device.torch)]
        for source, target in node.contract.updates:
            outputs[target] = mine[source]
        yield Tensors(
            inputs=tuple(map(as_planes, mine)),
            outputs=tuple(map(as_planes, outputs)),
            packed=tuple(part.clone() for part in packed) if copy else packed,
            workspace=workspace,
            host=host,
        )


def _drawn(work: Work, node: TensorNode, value: Value, device: Device) -> tuple[torch.Tensor, ...]:
    """An input's planes: step state as the batch has it, ids at random, all else noise."""
    import torch

    generator = torch.Generator(device.torch).manual_seed(0)
    if value.format == "i32":
        state = work.batch.state()
        if value.name in state:
            flat = torch.tensor(state[value.name], dtype=torch.int32, device=device.torch)
            return (flat.view(value.extents),)
        return (
            torch.randint(
                node.contract.ids_below(node),
                value.extents,
                generator=generator,
                dtype=torch.int32,
                device=device.torch,
            ),
        )
    return random_planes(value.format, value.extents, generator, 1.0)

"""Runs a plan: binds every step to its memory once, then calls the bound launches in order.

Enters: a Plan, the model's weights, and buffers for the graph's other leaves (step state, caches), which their owner
updates in place between walks. Leaves: the graph's outputs, in the arena. Chooses nothing; allocates only when a walk
of new extents is bound.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelmux.errors import LaunchError, PlanError
from kernelmux.formats import Value, as_planes, as_tuple, lookup, torch_dtype
from kernelmux.hookspecs import Launch, Planes, Tensors
from kernelmux.memory import Layout, PackedWeights, aligned
from kernelmux.plan import Plan
from kernelmux.schedule import Step

if TYPE_CHECKING:
    import torch

KEPT_WALKS = 16
"""Bound walks that a walker keeps: decode reuses one, prompts of new lengths take turns."""


@dataclass(frozen=True, eq=False)
class Walk:
    """A schedule bound to memory at exact extents: calling it runs the step and returns the number of launches."""

    steps: Sequence[Step]
    calls: Sequence[Launch]
    outputs: Mapping[str, Planes]
    """The graph's outputs by name; the next walk overwrites them."""
    launches: int
    device: str

    def __call__(self) -> int:
        pending = iter(self.calls)
        try:
            for call in pending:
                call()
        except Exception as error:
            # The iterator knows how far it got, so that a walk that works pays nothing for this.
            index = len(self.calls) - operator.length_hint(pending) - 1
            raise _launch_error(self.steps, index, self.device, error) from error
        return self.launches


# What CUDA says of faults that end the context (the CUDA runtime's error strings): every later call fails too.
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "device-side assert",
    "unspecified launch failure",
    "hardware stack error",
    "uncorrectable ECC error",
)
_SUSPECTS = 4
"""Nodes that the message about a sticky fault names: launches are asynchronous, so an earlier one may be to blame."""


def _launch_error(steps: Sequence[Step], index: int, device: str, error: Exception) -> LaunchError:
    """What to say when the step at `index` has raised."""
    node, choice = steps[index].node, steps[index].choice
    shapes = ", ".join(f"{value.name} {list(value.shape)} {value.format}" for value in (*node.inputs, *node.outputs))
    message = (
        f"{choice.name} raised at {node.name} ({node.op}, step {index + 1} of {len(steps)}) on {device}, "
        f"with {shapes}: {type(error).__name__}: {error}"
    )
    sticky = any(fault in str(error) for fault in _STICKY)
    if sticky:
        suspects = ", ".join(
            f"{step.node.name} ({step.choice.name})" for step in reversed(steps[: index + 1][-_SUSPECTS:])
        )
        message += f". The device is lost to this process; suspects, latest first: {suspects}"
    return LaunchError(message, node.name, choice.name, sticky)


class Walker:
    """Binds a plan's schedules, one arena under all of them, and walks.

    `leaves` holds the buffers of state and caches by name, at least as large as any walk needs: a walk sees the first
    rows of those whose extents are symbols.
    """

    def __init__(self, plan: Plan, packed: PackedWeights, leaves: Mapping[str, Planes]) -> None:
        import torch

        if missing := [leaf.name for leaf in plan.graph.leaves if leaf.role != "weight" and leaf.name not in leaves]:
            raise PlanError(f"the walker was given no buffer for {', '.join(missing)}")
        self.plan = plan
        self._packed = packed
        self._leaves = leaves
        nbytes = max(schedule.layout.nbytes for schedule in plan.schedules.values())
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=plan.device.torch)
        self._stream = torch.Stream(plan.device.torch) if plan.device.kind == "cuda" else None
        self._walks: OrderedDict[tuple[tuple[str, int], ...], Walk] = OrderedDict()

    def prepare(self) -> Iterator[str]:
        """Packs every weight that some schedule needs, yielding each node's name: binding would do it, but silently."""
        for schedule in self.plan.schedules.values():
            for index, step in enumerate(schedule.steps):
                try:
                    self._packed.get(step.node, step.choice.name, step.choice.kernel)
                except Exception as error:
                    raise _launch_error(schedule.steps, index, self.plan.device.torch, error) from error
                yield step.node.name

    def without(self, error: LaunchError) -> Walker:
        """A walker over the same memory whose plan does without the kernel that raised.

        Raises the error itself where the policy says so (`on_error`), where the fault is sticky, or where no other
        kernel takes the node.
        """
        at = (error.node, error.kernel)
        steps = (step for schedule in self.plan.schedules.values() for step in schedule.steps)
        choice = next(step.choice for step in steps if (step.node.name, step.choice.name) == at)
        if error.sticky or choice.on_error == "error":
            raise error
        try:
            plan = self.plan.without(error.node, error.kernel)
        except PlanError as nobody:
            raise error from nobody
        return Walker(plan, self._packed, self._leaves)

    def bind(self, **dims: int) -> Walk:
        """The walk at exact extents, as `bind(m=5, outs=1, seqs=1)`; recent ones are kept."""
        key = tuple(sorted(dims.items()))
        if key not in self._walks:
            self._walks[key] = self._bind(dims)
            if len(self._walks) > KEPT_WALKS:
                self._walks.popitem(last=False)
        self._walks.move_to_end(key)
        return self._walks[key]

    def _bind(self, asked: Mapping[str, int]) -> Walk:
        schedule = self.plan.schedule(asked["m"], asked.get("outs", asked["m"]))
        dims = self._all_dims(asked)
        views: dict[str, Planes] = {}
        for leaf in self.plan.graph.leaves:
            if leaf.role != "weight":
                (value,) = leaf.outputs
                views[value.name] = _narrow(self._leaves[value.name], value.resolve(dims))
        steps = [Step(step.node.resolve(dims), step.choice) for step in schedule.steps]
        calls = []
        for index, step in enumerate(steps):
            try:
                calls.append(self._bind_step(step, schedule.layout, views))
            except Exception as error:
                raise _launch_error(steps, index, self.plan.device.torch, error) from error
        stored = zip(self.plan.graph.outputs, schedule.outputs, strict=True)
        outputs = {name: views[physical] for name, physical in stored}
        return Walk(steps, calls, outputs, schedule.launches, self.plan.device.torch)

    def _all_dims(self, asked: Mapping[str, int]) -> Mapping[str, int]:
        """Every symbol of the graph: those asked for, and the rest from the buffers' own extents."""
        dims = {"outs": asked["m"], **asked}
        if "seqs" in dims:
            dims["seqs+1"] = dims["seqs"] + 1
        for name, planes in self._leaves.items():
            buffer = as_tuple(planes)[0]
            for symbol, extent in zip(self.plan.graph.values[name].shape, buffer.shape, strict=True):
                if isinstance(symbol, str):
                    dims.setdefault(symbol, extent)
        return dims

    def _bind_step(self, step: Step, layout: Layout, views: dict[str, Planes]) -> Launch:
        node, kernel = step.node, step.choice.kernel
        for source, target in node.contract.updates:
            views[node.outputs[target].name] = views[node.inputs[source].name]
        for value in node.outputs:
            if value.name in layout.offsets:
                views[value.name] = self._view(value, layout.offsets[value.name])
        tensors = Tensors(
            inputs=tuple(views[value.name] for value in node.inputs),
            outputs=tuple(views[value.name] for value in node.outputs),
            packed=self._packed.get(node, step.choice.name, kernel),
            workspace=self._scratch(node.name, kernel.workspace(node), layout),
        )
        return kernel.bind(node, tensors, self._stream)

    def _scratch(self, node: str, nbytes: int, layout: Layout) -> torch.Tensor | None:
        """A node's scratch: its place in the arena, or memory of its own where fewer rows need more."""
        if not nbytes:
            return None
        offset, reserved = layout.workspaces.get(node, (0, 0))
        return self._arena[offset : offset + nbytes] if nbytes <= reserved else self._arena.new_empty(nbytes)

    def _view(self, value: Value, offset: int) -> Planes:
        """The planes of a value at its place in the arena."""
        planes = []
        for plane in lookup(value.format).planes:
            nbytes = plane.nbytes(value.extents)
            flat = self._arena[offset : offset + nbytes].view(torch_dtype(plane.dtype))
            planes.append(flat.view(plane.shape(value.extents)))
            offset += aligned(nbytes)
        return as_planes(tuple(planes))


def _narrow(planes: Planes, value: Value) -> Planes:
    """The first rows and columns of a buffer, as many as `value` has."""
    parts = zip(as_tuple(planes), lookup(value.format).planes, strict=True)
    return as_planes(tuple(part[tuple(map(slice, plane.shape(value.extents)))] for part, plane in parts))

"""A schedule placed in memory: what each step's kernel reads and writes, at exact extents; nothing is bound yet.

Enters: a plan, its arena, the buffers of state and caches; extents. Leaves: PlacedSteps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kernelmux.contract.kernel import Kernel, Planes, Tensors
from kernelmux.graph.formats import Value, aligned, as_planes, as_tuple, lookup, torch_dtype
from kernelmux.graph.graph import nameless
from kernelmux.plan.formats import Step
from kernelmux.plan.memory import Layout
from kernelmux.plan.plan import Plan
from kernelmux.run.walk import launch_error

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class PlacedStep:
    """A step at exact extents, its kernel with the variant for them, and its tensors but for packed weights."""

    step: Step
    kernel: Kernel
    tensors: Tensors

    @cached_property
    def work(self) -> Hashable:
        """What steps have in common for which a kernel compiles the same."""
        return self.step.choice.name, str(self.kernel.variant), nameless(self.step.node)


@dataclass(frozen=True, eq=False)
class PlacedSteps:
    """The steps of one walk, in order, and the graph's outputs by name."""

    each: Sequence[PlacedStep]
    outputs: Mapping[str, Planes]
    launches: int


@dataclass(frozen=True, eq=False)
class Placement:
    """The memory under a plan's walks: one arena for all schedules, and what outlives a walk.

    `leaves` holds the buffers of state and caches by name, at least as large as any walk needs: a walk sees the first
    rows of those whose extents are symbols. `host` holds mirrors of the step state in host memory.
    """

    plan: Plan
    arena: torch.Tensor
    leaves: Mapping[str, Planes]
    host: Mapping[str, torch.Tensor]

    def at(self, asked: Mapping[str, int]) -> PlacedSteps:
        """The steps of a walk at exact extents; LaunchError where a kernel raises."""
        schedule = self.plan.schedule(asked["m"], asked.get("outs", asked["m"]))
        dims = self._all_dims(asked)
        views: dict[str, Planes] = {}
        host: dict[str, torch.Tensor] = {}
        for leaf in self.plan.graph.leaves:
            if leaf.role != "weight":
                (value,) = leaf.outputs
                views[value.name] = _narrow(self.leaves[value.name], value.resolve(dims))
                if value.format == "i32":
                    mirror = self.host.get(value.name)
                    host[value.name] = views[value.name] if mirror is None else _narrow(mirror, value.resolve(dims))
        steps = [Step(step.node.resolve(dims), step.choice) for step in schedule.steps]
        each = []
        for index, step in enumerate(steps):
            try:
                each.append(self._place(step, schedule.layout, views, host))
            except BaseException as error:
                raise launch_error(steps, index, self.plan.device, error) from error
        stored = zip(self.plan.graph.outputs, schedule.outputs, strict=True)
        return PlacedSteps(each, {name: views[physical] for name, physical in stored}, schedule.launches)

    def _all_dims(self, asked: Mapping[str, int]) -> Mapping[str, int]:
        """Every symbol of the graph: those asked for, and the rest from the buffers' own extents."""
        dims = {"outs": asked["m"], **asked}
        if "seqs" in dims:
            dims["seqs+1"] = dims["seqs"] + 1
        for name, planes in self.leaves.items():
            buffer = as_tuple(planes)[0]
            for symbol, extent in zip(self.plan.graph.values[name].shape, buffer.shape, strict=True):
                if isinstance(symbol, str):
                    dims.setdefault(symbol, extent)
        return dims

    def _place(
        self, step: Step, layout: Layout, views: dict[str, Planes], host: Mapping[str, torch.Tensor]
    ) -> PlacedStep:
        node = step.node
        kernel = step.choice.kernel_at(node)
        for source, target in node.contract.updates:
            views[node.outputs[target].name] = views[node.inputs[source].name]
        for value in node.outputs:
            if value.name in layout.offsets:
                views[value.name] = self._view(value, layout)
        tensors = Tensors(
            inputs=tuple(views[value.name] for value in node.inputs),
            outputs=tuple(views[value.name] for value in node.outputs),
            workspace=self._scratch(node.name, kernel.workspace(node), layout),
            host=tuple(host.get(value.name) for value in node.inputs),
        )
        return PlacedStep(step, kernel, tensors)

    def _scratch(self, node: str, nbytes: int, layout: Layout) -> torch.Tensor | None:
        """A node's scratch: its place in the arena, or memory of its own where fewer rows need more."""
        if not nbytes:
            return None
        offset, reserved = layout.workspaces.get(node, (0, 0))
        return self.arena[offset : offset + nbytes] if nbytes <= reserved else self.arena.new_empty(nbytes)

    def _view(self, value: Value, layout: Layout) -> Planes:
        """The planes of a value at its place in the arena; of one side by side with others its columns."""
        offset, width = layout.offsets[value.name], layout.widths.get(value.name)
        if width is not None:
            rows, columns = value.extents
            item = lookup(value.format).dtype
            flat = self.arena[offset : offset + ((rows - 1) * width + columns) * item.itemsize].view(item)
            return flat.as_strided((rows, columns), (width, 1))
        planes = []
        for plane in lookup(value.format).planes:
            nbytes = plane.nbytes(value.extents)
            flat = self.arena[offset : offset + nbytes].view(torch_dtype(plane.dtype))
            planes.append(flat.view(plane.shape(value.extents)))
            offset += aligned(nbytes)
        return as_planes(tuple(planes))


def _narrow(planes: Planes, value: Value) -> Planes:
    """The first rows and columns of a buffer, as many as `value` has."""
    parts = zip(as_tuple(planes), lookup(value.format).planes, strict=True)
    return as_planes(tuple(part[tuple(map(slice, plane.shape(value.extents)))] for part, plane in parts))

"""Runs a plan: binds every step to its memory once, then calls the bound launches in order.

Enters: a Plan, the model's weights, and buffers for the graph's other leaves (step state, caches), which their owner
updates in place between walks. Leaves: the graph's outputs, in the arena. Chooses nothing; allocates only when a walk
of new extents is bound. All of it happens on the stream that it is given.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kernelmux.contract.answers import bound
from kernelmux.contract.kernel import Launch, Planes, Tensors
from kernelmux.contract.packed import PackedWeights
from kernelmux.errors import LaunchError, PlanError
from kernelmux.graph.formats import Value, aligned, as_planes, as_tuple, lookup, torch_dtype
from kernelmux.plan.formats import Step
from kernelmux.plan.memory import Layout
from kernelmux.plan.plan import Plan
from kernelmux.run.capture import CapturedWalk, capture
from kernelmux.run.walk import Walk, launch_error

if TYPE_CHECKING:
    import torch

KEPT_WALKS = 16
"""Bound walks that a walker keeps: decode reuses one, prompts of new lengths take turns."""


class Walker:
    """Binds a plan's schedules, one arena under all of them, and walks.

    `leaves` holds the buffers of state and caches by name, at least as large as any walk needs: a walk sees the first
    rows of those whose extents are symbols. `host` holds mirrors of the step state in host memory, for kernels that
    read it there; on the CPU the buffers are their own mirrors. `stream` is the one that kernels launch on.
    """

    def __init__(
        self,
        plan: Plan,
        packed: PackedWeights,
        leaves: Mapping[str, Planes],
        host: Mapping[str, torch.Tensor] | None = None,
        stream: Any = None,
    ) -> None:
        import torch

        if missing := [leaf.name for leaf in plan.graph.leaves if leaf.role != "weight" and leaf.name not in leaves]:
            raise PlanError(f"the walker was given no buffer for {', '.join(missing)}")
        self.plan = plan
        self._packed = packed
        self._leaves = leaves
        self._host = host or {}
        nbytes = max(schedule.layout.nbytes for schedule in plan.schedules.values())
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=plan.device.torch)
        self.stream = stream
        self._walks: OrderedDict[tuple[tuple[str, int], ...], Walk] = OrderedDict()

    def prepare(self) -> Iterator[str]:
        """Packs every weight that some schedule needs, yielding each node's name: binding would do it, but silently."""
        for schedule in self.plan.schedules.values():
            for index, step in enumerate(schedule.steps):
                try:
                    self._packed.get(step.node, step.choice.name, step.choice.kernel)
                except (Exception, SystemExit) as error:
                    raise launch_error(schedule.steps, index, self.plan.device, error) from error
                yield step.node.name

    def without(self, error: LaunchError) -> Walker:
        """A walker over the same memory, on the same stream, whose plan does without the kernel that raised.

        Raises the error itself where the policy says so (`on_error`), where the fault is sticky, or where no other
        kernel takes the node.
        """
        at = (error.node, error.kernel)
        choice = next(step.choice for step in self.plan.steps if (step.node.name, step.choice.name) == at)
        if error.sticky or choice.on_error == "error":
            raise error
        try:
            plan = self.plan.without(error.node, error.kernel)
        except PlanError as nobody:
            raise error from nobody
        self._packed.keep(plan.packed_forms)
        return Walker(plan, self._packed, self._leaves, self._host, self.stream)

    def bind(self, **dims: int) -> Walk:
        """The walk at exact extents, as `bind(m=5, outs=1, seqs=1)`; recent ones are kept."""
        key = tuple(sorted(dims.items()))
        if key not in self._walks:
            self._walks[key] = self._bind(dims)
            if len(self._walks) > KEPT_WALKS:
                self._walks.popitem(last=False)
        self._walks.move_to_end(key)
        return self._walks[key]

    def capture(self, tail: Callable[[Walk], object], **dims: int) -> CapturedWalk:
        """The walk at exact extents as a graph of the device, with the launches of `tail` after its own.

        LaunchError names the node that cannot be captured.
        """
        return capture(self._bind(dims), self.plan.device, self.stream, tail)

    def _bind(self, asked: Mapping[str, int]) -> Walk:
        schedule = self.plan.schedule(asked["m"], asked.get("outs", asked["m"]))
        dims = self._all_dims(asked)
        views: dict[str, Planes] = {}
        host: dict[str, torch.Tensor] = {}
        for leaf in self.plan.graph.leaves:
            if leaf.role != "weight":
                (value,) = leaf.outputs
                views[value.name] = _narrow(self._leaves[value.name], value.resolve(dims))
                if value.format == "i32":
                    mirror = self._host.get(value.name)
                    host[value.name] = views[value.name] if mirror is None else _narrow(mirror, value.resolve(dims))
        steps = [Step(step.node.resolve(dims), step.choice) for step in schedule.steps]
        calls = []
        with self.plan.device.platform.on(self.stream):
            for index, step in enumerate(steps):
                try:
                    calls.append(self._bind_step(step, schedule.layout, views, host))
                except (Exception, SystemExit) as error:
                    raise launch_error(steps, index, self.plan.device, error) from error
        stored = zip(self.plan.graph.outputs, schedule.outputs, strict=True)
        outputs = {name: views[physical] for name, physical in stored}
        return Walk(steps, calls, outputs, schedule.launches, self.plan.device)

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

    def _bind_step(
        self, step: Step, layout: Layout, views: dict[str, Planes], host: Mapping[str, torch.Tensor]
    ) -> Launch:
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
            packed=self._packed.get(node, step.choice.name, kernel),
            workspace=self._scratch(node.name, kernel.workspace(node), layout),
            host=tuple(host.get(value.name) for value in node.inputs),
        )
        return bound(kernel, node, tensors, self.stream)

    def _scratch(self, node: str, nbytes: int, layout: Layout) -> torch.Tensor | None:
        """A node's scratch: its place in the arena, or memory of its own where fewer rows need more."""
        if not nbytes:
            return None
        offset, reserved = layout.workspaces.get(node, (0, 0))
        return self._arena[offset : offset + nbytes] if nbytes <= reserved else self._arena.new_empty(nbytes)

    def _view(self, value: Value, layout: Layout) -> Planes:
        """The planes of a value at its place in the arena; of one side by side with others its columns."""
        offset, width = layout.offsets[value.name], layout.widths.get(value.name)
        if width is not None:
            rows, columns = value.extents
            item = lookup(value.format).dtype
            flat = self._arena[offset : offset + ((rows - 1) * width + columns) * item.itemsize].view(item)
            return flat.as_strided((rows, columns), (width, 1))
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

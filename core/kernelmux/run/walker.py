"""Runs a plan: binds every step to its memory once, then calls the bound launches in order.

Enters: a Plan, the model's weights, and buffers for the graph's other leaves (step state, caches), which their owner
updates in place between walks. Leaves: the graph's outputs, in the arena. Chooses nothing; allocates only when a walk
of new extents is bound. All of it happens on the stream that it is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kernelmux.contract.answers import bound
from kernelmux.contract.kernel import Launch, Planes
from kernelmux.contract.packed import Form, PackedWeights, packed_key
from kernelmux.errors import LaunchError, PlanError
from kernelmux.plan.formats import Step
from kernelmux.plan.plan import Plan
from kernelmux.run.capture import CapturedWalk, capture
from kernelmux.run.placement import PlacedStep, PlacedSteps, Placement
from kernelmux.run.progress import BINDING, COMPILING, LOOKING_UP, MAPPING, PACKING, PLACING, Progress
from kernelmux.run.walk import Walk, launch_error
from kernelmux.run.watch import Watch

if TYPE_CHECKING:
    import torch

Key = tuple[tuple[str, int], ...]
THREADS = min(os.cpu_count() or 1, 8)
"""Kernels that are compiled at once at most."""


class Made(NamedTuple):
    """Counts of what takes time before a step, and of what a step makes none once all is prepared."""

    packed: int
    """Forms of weights."""
    bound: int
    """Launches."""
    captured: int
    """Walks."""


class Walker:
    """Binds a plan's schedules, one arena under all of them, and walks.

    `leaves`, of state and caches, are as `Placement` has them. `host` holds mirrors of the step state in host memory,
    for kernels that read it there; on the CPU the buffers are their own mirrors. `stream` is the one that kernels
    launch on. `watch` is who looks at its walks.
    """

    def __init__(
        self,
        plan: Plan,
        packed: PackedWeights,
        leaves: Mapping[str, Planes],
        host: Mapping[str, torch.Tensor] | None = None,
        stream: Any = None,
        watch: Watch | None = None,
    ) -> None:
        import torch

        if missing := [leaf.name for leaf in plan.graph.leaves if leaf.role != "weight" and leaf.name not in leaves]:
            raise PlanError(f"the walker was given no buffer for {', '.join(missing)}")
        self.plan = plan
        self.stream = stream
        self.watch = watch or Watch()
        nbytes = max(schedule.layout.nbytes for schedule in plan.schedules.values())
        arena = torch.empty(nbytes, dtype=torch.uint8, device=plan.device.torch)
        self.placement = Placement(plan, arena, leaves, host or {})
        self.packed = packed
        self._pool = plan.device.platform.graph_pool()
        self._bound = 0
        self._walks: dict[Key, Walk] = {}
        self._captured: dict[tuple[Callable[[Walk], object], Key], CapturedWalk] = {}

    def prepare(self, extents: Iterable[Mapping[str, int]] = ()) -> Iterator[Progress]:
        """Packs every weight that some schedule needs, and binds the walks at all these extents.

        One launch of each kind of work is bound first, several at a time, as soon as its own weights are packed: what
        takes long in them, compiling, is done while the rest is packed.
        """
        missing = {_key(dims): dims for dims in extents if _key(dims) not in self._walks}
        placed: dict[Key, PlacedSteps] = {}
        kinds: dict[Hashable, PlacedStep] = {}
        for count, (key, dims) in enumerate(missing.items(), 1):
            placed[key] = self.placement.at(dims)
            kinds |= {each.work: each for each in placed[key].each}
            yield Progress(PLACING, count, len(missing))
        ready = dict[PlacedStep, Launch]()
        yield from self._pack_and_compile(list(kinds.values()), ready)
        for count, (key, steps) in enumerate(placed.items(), 1):
            self._walks[key] = self._walk(steps, ready)
            yield Progress(BINDING, count, len(placed))

    def _pack_and_compile(self, kinds: Sequence[PlacedStep], ready: dict[PlacedStep, Launch]) -> Iterator[Progress]:
        """Packs all and binds these, whose launches are `ready` then. While any is compiled, that is the stage."""
        waiting = {_form(each.step) for each in kinds}
        device = self.plan.device
        with ThreadPoolExecutor(THREADS, "compile", device.platform.enter_thread, (device,)) as threads:
            pending: dict[Future[Launch], PlacedStep] = {}
            untold: dict[str, Progress] = {}
            compiling = False
            for form, progress in self._pack(waiting):
                untold[progress.stage] = progress
                if compiling:
                    count = sum(future.done() for future in pending)
                    yield Progress(COMPILING, count, len(pending))
                    compiling = count < len(pending)
                if not compiling:
                    yield from untold.values()
                    untold.clear()
                if form is not None:
                    waiting.discard(form)
                if kinds and not waiting and not pending:
                    pending = {threads.submit(self._bind, each): each for each in kinds}
                    # At once: packing the next form may wait for what is compiled.
                    yield Progress(COMPILING, 0, len(pending))
                    compiling = True
            for count, future in enumerate(as_completed(pending), 1):
                # Whoever raised does so again when its turn comes, with its place in the walk.
                if future.exception() is None:
                    ready[pending[future]] = future.result()
                    self._bound += 1
                if compiling:
                    yield Progress(COMPILING, count, len(pending))
        yield from untold.values()

    def _pack(self, first: Collection[Form]) -> Iterator[tuple[Form | None, Progress]]:
        """Makes every packed form that some schedule needs, some first, and what else is made of their weights.

        What the cache on disk has is mapped before anything is made.
        """
        wanted = {
            _form(step): (schedule.steps, index)
            for schedule in self.plan.schedules.values()
            for index, step in enumerate(schedule.steps)
        }
        found = set[Form]()
        if self.packed.cache is not None:
            for count, (form, (steps, index)) in enumerate(wanted.items(), 1):
                if self.packed.find(form, steps[index].choice.kernel):
                    found.add(form)
                yield None, Progress(LOOKING_UP, count, len(wanted))
        # All forms of a weight in a row: it travels once.
        places = {names: index for index, (names, _) in reversed([*enumerate(wanted)])}
        early = {names for names, _ in first}
        forms = sorted(wanted, key=lambda form: (form not in found, form[0] not in early, places[form[0]]))
        nbytes = self.plan.packed_forms
        done = {MAPPING: 0, PACKING: 0}
        total = {MAPPING: sum(nbytes.get(form, 0) for form in found)}
        total[PACKING] = self.plan.packed_bytes - total[MAPPING]
        with self.packed.uploading(forms):
            for form in forms:
                steps, index = wanted[form]
                choice = steps[index].choice
                try:
                    self.packed.get(steps[index].node, choice.name, choice.kernel)
                except BaseException as error:
                    raise launch_error(steps, index, self.plan.device, error) from error
                stage = MAPPING if form in found else PACKING
                done[stage] += nbytes.get(form, 0)
                yield form, Progress(stage, done[stage], total[stage])

    def without(self, error: LaunchError) -> Walker:
        """A walker over the same memory, on the same stream, whose plan does without the kernel that raised.

        Raises the error itself where the policy says so (`on_error`), where the fault is sticky, or where no other
        kernel takes the node; and where the plan is strict.
        """
        at = (error.node, error.kernel)
        choice = next(step.choice for step in self.plan.steps if (step.node.name, step.choice.name) == at)
        if error.sticky or choice.on_error == "error":
            raise error
        if self.plan.strict:
            raise error.strictly() from error
        try:
            plan = self.plan.without(error.node, error.kernel)
        except PlanError as nobody:
            raise error from nobody
        self.packed.keep(plan.packed_forms)
        return Walker(plan, self.packed, self.placement.leaves, self.placement.host, self.stream, self.watch)

    def bind(self, **dims: int) -> Walk:
        """The walk at exact extents, as `bind(m=5, outs=1, seqs=1)`; bound once."""
        key = _key(dims)
        if key not in self._walks:
            self._walks[key] = self._walk(self.placement.at(dims), {})
        return self._walks[key]

    def capture(self, tail: Callable[[Walk], object], **dims: int) -> CapturedWalk:
        """The walk at exact extents as a graph of the device, with the launches of `tail` after its own; made once.

        LaunchError names the node that cannot be captured.
        """
        key = tail, _key(dims)
        if key not in self._captured:
            self._captured[key] = capture(self.bind(**dims), self.plan.device, self.stream, tail, self._pool)
        return self._captured[key]

    @property
    def made(self) -> Made:
        """What was made so far."""
        return Made(self.packed.made, self._bound, len(self._captured))

    def _walk(self, placed: PlacedSteps, ready: Mapping[PlacedStep, Launch]) -> Walk:
        steps = [each.step for each in placed.each]
        calls = []
        for index, each in enumerate(placed.each):
            try:
                if (launch := ready.get(each)) is None:
                    launch = self._bind(each)
                    self._bound += 1
                calls.append(launch)
            except BaseException as error:
                raise launch_error(steps, index, self.plan.device, error) from error
        tensors = [each.tensors for each in placed.each]
        return Walk(steps, calls, placed.outputs, placed.launches, self.plan.device, tensors, self.watch)

    def _bind(self, placed: PlacedStep) -> Launch:
        node = placed.step.node
        with self.plan.device.platform.on(self.stream):
            tensors = replace(placed.tensors, packed=self.packed.get(node, placed.step.choice.name, placed.kernel))
            return bound(placed.kernel, node, tensors, self.stream)


def _form(step: Step) -> Form:
    return packed_key(step.node, step.choice.name, step.choice.kernel)


def _key(dims: Mapping[str, int]) -> Key:
    return tuple(sorted(dims.items()))

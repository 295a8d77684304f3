"""The plan: for every node the kernel, the reason, and each candidate that lost; then formats, conversions and memory.

Enters: Graph, Policy, Registry, Device. Leaves: a frozen Plan with a fingerprint. Row counts fall into buckets within
which the choices are the same; a Schedule is what is walked at one pair of buckets (token rows, rows with logits).
Nothing is launched, packed, compiled or allocated here.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from kernelmux.contract.cache import library_versions
from kernelmux.contract.device import Device
from kernelmux.contract.packed import Form, packed_form
from kernelmux.contract.registry import Registry
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.measure.predict import CONTEXT
from kernelmux.plan.buckets import Considered, choose_buckets, first_row, row_counts
from kernelmux.plan.choice import Rejection
from kernelmux.plan.explain import show
from kernelmux.plan.formats import Step
from kernelmux.plan.offers import Offers
from kernelmux.plan.requirements import check_requirements, notes
from kernelmux.plan.schedule import Schedule, Scheduling
from kernelmux.plan.selection import Locked, Selector
from kernelmux.plan.why import why
from kernelmux.policy.policy import Policy

MAX_ROWS = 512
"""Token rows of the largest step, unless told: longer prompts run in chunks of it."""


@dataclass(frozen=True)
class Plan:
    """The frozen choice of kernels for a graph on a device; `schedule` is what a walk at given rows runs."""

    graph: Graph
    policy: Policy
    device: Device
    buckets: tuple[int, ...]
    """The largest row count of each bucket, ascending."""
    schedules: Mapping[tuple[int, int], Schedule]
    fused: Mapping[str, tuple[str, ...]]
    """The plain nodes that each fused node stands for."""
    considered: Considered
    """Of plain nodes the fused candidates that did not take their place at some row count, and why."""
    notes: tuple[str, ...]
    """What whoever asked for this plan must be told: a backend that the policy names is broken."""
    registry: Registry = field(compare=False, repr=False)
    banned: frozenset[tuple[str, str]] = frozenset()
    """(node, kernel) pairs that raised in a walk."""
    locked: Locked | None = field(default=None, compare=False, repr=False)
    """Of a plan from a lock file: its choices, by bucket and node."""
    context: int = CONTEXT
    """Cached tokens of each sequence that decodes, for which `auto` chose."""
    strict: bool = field(default=False, compare=False, repr=False)
    """Whether a kernel that raises in a walk is an error, whatever the policy makes of it."""

    def __str__(self) -> str:
        """The table of `kernelmux plan`."""
        return show(self)

    def __repr__(self) -> str:
        buckets = ", ".join(map(str, self.buckets))
        return f"<Plan {self.fingerprint}: {self.graph.name} on {self.device.device_class}, up to {buckets} rows>"

    def why(self, node: str, rows: int | None = None) -> str:
        """All about one node, at all row counts or one, as `plan --why` says it; PlanError for no such node."""
        return why(self, node, rows)

    def without(self, node: str, kernel: str) -> Plan:
        """The plan that would have been made had the kernel declined the node."""
        banned = self.banned | {(node, kernel)}
        return make_plan(
            self.graph, self.policy, self.registry, self.device, self.max_rows, banned, self.locked, self.context
        )

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def bucket(self, rows: int) -> int:
        """The bucket of a row count; PlanError above the largest, and below 1."""
        if rows < 1:
            raise PlanError(f"a step has from 1 to {self.max_rows} rows, not {rows}")
        for top in self.buckets:
            if rows <= top:
                return top
        raise PlanError(
            f"the plan takes up to {self.max_rows} rows, {rows} were asked for; plan with max_rows={rows} in Python: "
            "longer prompts run in several steps"
        )

    def schedule(self, m: int, outs: int) -> Schedule:
        """What is walked for `m` token rows of which `outs` give logits."""
        if outs > m:
            raise PlanError(f"logits of {outs} rows were asked for, of a step of {m}")
        return self.schedules[self.bucket(m), self.bucket(outs)]

    def nodes_meant(self, step: Step, top: int) -> Iterator[tuple[TensorNode, int]]:
        """The nodes that a step stands for, itself and its plain parts, at the row counts that tell in its bucket."""
        low = first_row(self.buckets, top)
        for name in (step.node.name, *self.fused.get(step.node.name, ())):
            node = step.node if name == step.node.name else self.plain[name]
            yield from ((node, rows) for rows in self.policy.telling_rows(low, top))

    @cached_property
    def plain(self) -> Mapping[str, TensorNode]:
        """The graph's nodes, by name."""
        return {node.name: node for node in self.graph.ops}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of all that decides what a walk computes, and does where a kernel raises; equal in any process.

        Graph, device class, versions of kernels and libraries; of every step kernel, variants, formats and `on_error`.
        """
        steps = {f"{m}/{outs}": schedule.identity for (m, outs), schedule in sorted(self.schedules.items())}
        parts = [self.graph.digest, self.device.device_class, self.versions, self.libraries, self.buckets, steps]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def steps(self) -> Iterator[Step]:
        """The steps of all schedules."""
        return itertools.chain.from_iterable(schedule.steps for schedule in self.schedules.values())

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """The version of each kernel that was chosen, by its op and full name."""
        choices = {f"{step.node.op} {step.choice.name}": step.choice.kernel for step in self.steps}
        return {name: kernel.own_version for name, kernel in sorted(choices.items())}

    @cached_property
    def libraries(self) -> Mapping[str, str]:
        """The versions of the libraries that the chosen backends are built on."""
        backends = {step.choice.backend for step in self.steps}
        names = {name for backend in backends for name in self.registry.backends[backend].libraries}
        return library_versions(sorted(names))

    @cached_property
    def packed_forms(self) -> Mapping[Form, int]:
        """The bytes of every packed form that some schedule needs; known before anything is packed."""
        forms: dict[Form, int] = {}
        for step in self.steps:
            if (form := packed_form(step.node, step.choice.name, step.choice.kernel)) is not None:
                forms[form] = step.choice.kernel.packed_bytes(step.node)
        return forms

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(self.packed_forms.values())

    @cached_property
    def extra_copy_bytes(self) -> int:
        """Bytes of packed forms beside the first of each weight: what choosing different kernels by rows costs."""
        seen: set[str] = set()
        extra = 0
        for (names, _), nbytes in self.packed_forms.items():
            extra += nbytes if seen.issuperset(names) else 0
            seen.update(names)
        return extra

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token of one sequence takes, over all layers."""
        dims = {"pages": 1, "page_size": 1}
        caches = (leaf.outputs[0].resolve(dims) for leaf in self.graph.leaves if leaf.role == "cache")
        return sum(cache.nbytes for cache in caches)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without looking for garbage: of the many objects that planning makes next to all live on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def make_plan(
    graph: Graph,
    policy: Policy,
    registry: Registry,
    device: Device,
    max_rows: int = MAX_ROWS,
    banned: frozenset[tuple[str, str]] = frozenset(),
    locked: Locked | None = None,
    context: int = CONTEXT,
) -> Plan:
    """Chooses a kernel for every node and lays out its memory.

    `banned` kernels are passed over; with `locked` (choices by bucket and node) nothing is chosen, only looked up.
    `auto` chooses for sequences of `context` cached tokens where they decode.
    Raises PlanError where no kernel takes a node (it lists every refusal) or a requirement does not hold, PolicyError
    where the policy names what does not exist, BackendError where no backend is installed.
    """
    if max_rows < 1:
        raise PlanError(f"a plan needs room for at least one row, not max_rows={max_rows}")
    if context < 0:
        raise PlanError(f"a sequence has no {context=} cached tokens; 0 or more, for which `auto` chooses")
    graph = graph.with_cache_format(policy.cache_format(device))
    working: tuple[str, ...] | None = None
    # A backend that breaks while it is asked is quarantined: then its earlier answers do not count either.
    while working != registry.working:
        working = registry.working
        selector = Selector(policy, Offers(registry, device), banned, locked, context)
        buckets = choose_buckets(graph, selector, sorted(locked) if locked else row_counts(policy, max_rows))
        tops = tuple(bucket.rows for bucket in buckets)
        scheduling = Scheduling(graph, selector, tops, selector.predictor.tables)
        pairs = [(m, outs) for m, outs in itertools.product(buckets, buckets) if outs.rows <= m.rows]
        schedules = {(m.rows, outs.rows): scheduling.schedule(m, outs) for m, outs in pairs}
        selector.check_names()
    fused = {fusion.node.name: fusion.parts for bucket in buckets for fusion in bucket.fusions}
    considered: dict[str, tuple[Rejection, ...]] = {}
    for name, losers in itertools.chain.from_iterable(bucket.considered.items() for bucket in buckets):
        considered[name] = tuple(dict.fromkeys(considered.get(name, ()) + losers))
    plan = Plan(graph, policy, device, tops, schedules, fused, considered, (), registry, banned, locked, context)
    check_requirements(plan)
    return plan if locked else replace(plan, notes=notes(plan, selector.record, max_rows))

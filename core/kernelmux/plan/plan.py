"""The plan: for every node the kernel, the reason, and each candidate that lost; then formats, conversions and memory.

Enters: Graph, Policy, Registry, Device. Leaves: a frozen Plan with a fingerprint. Row counts fall into buckets within
which the choices are the same; a Schedule is what is walked at one pair of buckets (token rows, rows with logits).
Nothing is launched, packed or allocated here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kernelmux.contract.device import Device
from kernelmux.contract.packed import Form, packed_form
from kernelmux.contract.registry import Registry
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import Fusion, find_fusions, fuse
from kernelmux.plan.choice import Choice
from kernelmux.plan.requirements import check_requirements
from kernelmux.plan.schedule import Schedule, Step, make_schedule
from kernelmux.plan.selection import Held, Selector
from kernelmux.policy.policy import Policy

MAX_ROWS = 512
"""Token rows of the largest step, unless told: longer prompts run in chunks of it."""


@dataclass(frozen=True)
class Bucket:
    """The choices that hold up to a row count: the fusions kept, and a choice for every node that remains."""

    rows: int
    fusions: tuple[Fusion, ...]
    choices: Mapping[str, Choice]
    """By node name."""

    @cached_property
    def signature(self) -> tuple[tuple[str, str, str], ...]:
        """What two buckets with the same choices have in common."""
        return tuple((node, choice.name, choice.reason) for node, choice in sorted(self.choices.items()))


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
    registry: Registry = field(compare=False, repr=False)
    banned: frozenset[tuple[str, str]] = frozenset()
    """(node, kernel) pairs that raised in a walk."""
    locked: Mapping[int, Mapping[str, str]] | None = field(default=None, repr=False)
    """Of a plan from a lock file: its kernels, by bucket and node."""

    def without(self, node: str, kernel: str) -> Plan:
        """The plan that would have been made had the kernel declined the node."""
        banned = self.banned | {(node, kernel)}
        return make_plan(self.graph, self.policy, self.registry, self.device, self.max_rows, banned, self.locked)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def bucket(self, rows: int) -> int:
        """The bucket of a row count; PlanError above the largest."""
        return _top(self.buckets, rows)

    def schedule(self, m: int, outs: int) -> Schedule:
        """What is walked for `m` token rows of which `outs` give logits."""
        if outs > m:
            raise PlanError(f"logits of {outs} rows were asked for, of a step of {m}")
        return self.schedules[self.bucket(m), self.bucket(outs)]

    def nodes_meant(self, step: Step, top: int) -> Iterator[tuple[TensorNode, int]]:
        """The nodes that a step stands for, itself and its plain parts, at the row counts that tell in its bucket."""
        below = max((bucket for bucket in self.buckets if bucket < top), default=0)
        for name in (step.node.name, *self.fused.get(step.node.name, ())):
            node = step.node if name == step.node.name else self._plain[name]
            yield from ((node, rows) for rows in self.policy.telling_rows(below + 1, top))

    @cached_property
    def _plain(self) -> Mapping[str, TensorNode]:
        return {node.name: node for node in self.graph.ops}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of graph, choices with their kernels' versions, buckets and device class; equal in any process."""
        chosen = {
            f"{m}/{outs}": [[step.node.name, step.choice.name, step.choice.kernel.version] for step in schedule.steps]
            for (m, outs), schedule in sorted(self.schedules.items())
        }
        parts = [self.graph.to_json(), self.device.device_class, self.buckets, chosen]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def packed_forms(self) -> Mapping[Form, int]:
        """The bytes of every packed form that some schedule needs; known before anything is packed."""
        forms: dict[Form, int] = {}
        for schedule in self.schedules.values():
            for step in schedule.steps:
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


def make_plan(
    graph: Graph,
    policy: Policy,
    registry: Registry,
    device: Device,
    max_rows: int = MAX_ROWS,
    banned: frozenset[tuple[str, str]] = frozenset(),
    locked: Mapping[int, Mapping[str, str]] | None = None,
) -> Plan:
    """Chooses a kernel for every node and lays out its memory.

    `banned` kernels are passed over; with `locked` (kernels by bucket and node) nothing is chosen, only looked up.
    Raises PlanError where no kernel takes a node (it lists every refusal) or a requirement does not hold, PolicyError
    where the policy names what does not exist, BackendError where no backend is installed.
    """
    if max_rows < 1:
        raise PlanError(f"a plan needs room for at least one row, not max_rows={max_rows}")
    graph = graph.with_cache_format(policy.document.kv.format)
    working = registry.working
    plan = _make_plan(graph, policy, registry, device, max_rows, banned, locked)
    # A backend that breaks while it is asked is quarantined: then its earlier answers do not count either.
    return plan if working == registry.working else make_plan(graph, policy, registry, device, max_rows, banned, locked)


def _make_plan(
    graph: Graph,
    policy: Policy,
    registry: Registry,
    device: Device,
    max_rows: int,
    banned: frozenset[tuple[str, str]],
    locked: Mapping[int, Mapping[str, str]] | None,
) -> Plan:
    selector = Selector(policy, registry, device, banned, locked)
    buckets = _choose_buckets(graph, selector, sorted(locked) if locked else _row_counts(policy, max_rows))
    tops = tuple(bucket.rows for bucket in buckets)
    schedules = {
        (m.rows, outs.rows): _schedule(graph, selector, m, outs)
        for m, outs in itertools.product(buckets, buckets)
        if outs.rows <= m.rows
    }
    if locked is None:
        selector.check_names()
    fused = {fusion.node.name: fusion.parts for bucket in buckets for fusion in bucket.fusions}
    plan = Plan(graph, policy, device, tops, schedules, fused, registry, banned, locked)
    check_requirements(plan)
    return plan


def _row_counts(policy: Policy, max_rows: int) -> list[int]:
    """Row counts to choose at: powers of two, and each bound of the policy, so that a rule holds for a whole bucket."""
    powers = (2**power for power in range(max_rows.bit_length()))
    return sorted({rows for rows in (*powers, *policy.row_bounds) if rows < max_rows} | {max_rows})


def _choose_buckets(graph: Graph, selector: Selector, counts: Sequence[int]) -> list[Bucket]:
    """Choices by row count; neighbours with equal choices are one bucket."""
    fusions = find_fusions(graph, fused_ops()) if selector.policy.document.fuse else []
    nodes = {node.name: node for node in graph.ops}
    fused = {fusion.node.name: fusion.node for fusion in fusions}
    held: dict[str, frozenset[Form]] = {}
    buckets: list[Bucket] = []
    for rows in counts:
        if selector.locked is not None:
            buckets.append(_look_up(nodes, selector, fusions, rows, selector.locked[rows]))
            continue
        bucket = _choose_at(nodes, selector, fusions, rows, held)
        if buckets and buckets[-1].signature == bucket.signature:
            buckets.pop()
        buckets.append(bucket)
        for name, choice in bucket.choices.items():
            if (form := packed_form(nodes.get(name) or fused[name], choice.name, choice.kernel)) is not None:
                held.update({value: held.get(value, frozenset()) | {form} for value in form[0]})
    return buckets


def _choose_at(
    nodes: Mapping[str, TensorNode], selector: Selector, fusions: Sequence[Fusion], rows: int, held: Held
) -> Bucket:
    """The choices at one row count: plain kernels first, then each fusion that they agree to, longest first."""
    choices = {name: selector.choose(node, _own_rows(node, rows), held, exact=False) for name, node in nodes.items()}
    kept: list[Fusion] = []
    for fusion in fusions:
        if all(part in choices for part in fusion.parts):
            parts = [(nodes[part], choices[part]) for part in fusion.parts]
            if (fused := selector.fuse(fusion.node, _own_rows(fusion.node, rows), parts, held)) is not None:
                kept.append(fusion)
                for part in fusion.parts:
                    del choices[part]
                choices[fusion.node.name] = fused
    if selector.policy.document.weights.copies is not None:
        plain = {name: node for name, node in nodes.items() if name in choices}
        choices.update({name: selector.choose(node, _own_rows(node, rows), held) for name, node in plain.items()})
    return Bucket(rows, tuple(kept), choices)


def _own_rows(node: TensorNode, rows: int) -> int:
    """A node's row count in a bucket: the bucket's, unless the graph fixes it."""
    own = node.inputs[0].shape[0]
    return rows if isinstance(own, str) else own


def _look_up(
    nodes: Mapping[str, TensorNode], selector: Selector, fusions: Sequence[Fusion], rows: int, locked: Mapping[str, str]
) -> Bucket:
    """The choices of a locked plan at one row count."""
    kept = tuple(
        fusion
        for fusion in fusions
        if fusion.node.name in locked and (fusion.node.name, locked[fusion.node.name]) not in selector.banned
    )
    gone = {part for fusion in kept for part in fusion.parts}
    remaining = [node for name, node in nodes.items() if name not in gone] + [fusion.node for fusion in kept]
    return Bucket(rows, kept, {node.name: selector.choose(node, _own_rows(node, rows)) for node in remaining})


def _schedule(graph: Graph, selector: Selector, m: Bucket, outs: Bucket) -> Schedule:
    """The steps at one pair of buckets: a node's own rows (of tokens, or of logits) pick its bucket."""

    def bucket(node: TensorNode) -> Bucket:
        return outs if node.inputs[0].shape[0] == "outs" else m

    fusions = [fusion for fusion in m.fusions if bucket(fusion.node) is m]
    fusions += [fusion for fusion in outs.fusions if bucket(fusion.node) is outs and outs is not m]
    chosen = [Step(node, bucket(node).choices[node.name]) for node in fuse(graph.ops, fusions)]
    return make_schedule(graph, chosen, selector, {"m": m.rows, "outs": outs.rows})


def _top(tops: Sequence[int], rows: int) -> int:
    """The smallest bucket that holds `rows`."""
    for top in tops:
        if rows <= top:
            return top
    raise PlanError(f"the plan takes up to {tops[-1]} rows, {rows} were asked for; plan with max_rows={rows}")


def kernel_counts(schedule: Schedule) -> Mapping[str, Mapping[str, int]]:
    """How many nodes of each op each kernel got: {op: {kernel: nodes}}, in walking order."""
    counts: dict[str, dict[str, int]] = {}
    for step in schedule.steps:
        of_op = counts.setdefault(step.node.op, {})
        of_op[step.choice.name] = of_op.get(step.choice.name, 0) + 1
    return counts

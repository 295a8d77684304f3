"""Buckets: ranges of row counts within which all choices are the same.

Enters: a graph, a selector. Leaves: the choices that hold up to each row count, with the fusions kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kernelmux.contract.packed import Form, packed_form
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import Fusion, find_fusions, fuse
from kernelmux.plan.auto import Auto
from kernelmux.plan.choice import Choice, Placed, Rejection
from kernelmux.plan.fusion import Fusing, apart
from kernelmux.plan.selection import Held, Selector
from kernelmux.plan.slots import Slotting
from kernelmux.policy.grammar import AUTO
from kernelmux.policy.policy import Policy

Considered = Mapping[str, tuple[Rejection, ...]]
"""By plain node: the fused candidates that did not take its place, as `triton:bf16 of qkv`, and why."""


@dataclass(frozen=True)
class Bucket:
    """The choices that hold up to a row count: the fusions kept, and a choice for every node that remains."""

    rows: int
    fusions: tuple[Fusion, ...]
    choices: Mapping[str, Choice]
    """By node name."""
    considered: Considered

    @cached_property
    def signature(self) -> tuple[tuple[str, str, str], ...]:
        """What two buckets with the same choices have in common."""
        return tuple((node, choice.name, choice.reason) for node, choice in sorted(self.choices.items()))


def first_row(tops: Sequence[int], top: int) -> int:
    """The least row count of the bucket that ends at `top`."""
    return max((other for other in tops if other < top), default=0) + 1


def bounds(tops: Sequence[int], wanted: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The least and the largest row count of these buckets, by where they end."""
    return ((first_row(tops, top), top) for top in wanted)


def row_counts(policy: Policy, max_rows: int) -> list[int]:
    """Row counts to choose at: powers of two, and each bound of the policy, so that a rule holds for a whole bucket."""
    powers = (2**power for power in range(max_rows.bit_length()))
    return sorted({rows for rows in (*powers, *policy.row_bounds) if rows < max_rows} | {max_rows})


def choose_buckets(graph: Graph, selector: Selector, counts: Sequence[int]) -> list[Bucket]:
    """Choices by row count; neighbours with equal choices are one bucket.

    The largest may be less than was asked for, where more rows need packed forms that weights may not have.
    """
    fusions = find_fusions(graph, fused_ops()) if selector.policy.document.fuse else []
    choosing = _Choosing(graph, selector, fusions)
    fused = {fusion.node.name: fusion.node for fusion in fusions}
    if (locked := selector.locked) is not None:
        return [choosing.look_up(rows, locked[rows]) for rows in counts]
    held: dict[str, frozenset[Form]] = {}
    buckets: list[Bucket] = []
    waiting = list(counts)
    while waiting:
        # `auto` settles what is packed at both ends, decode and prompts: the most rows choose second.
        if len(buckets) == 1 and AUTO in _words(selector.policy):
            waiting = choosing.up_to_most(waiting, held)
            bucket = choosing.at(waiting.pop(), held)
        else:
            bucket = choosing.at(waiting.pop(0), held)
        if bucket is None:
            continue
        buckets.append(bucket)
        for name, choice in bucket.choices.items():
            node = choosing.nodes.get(name) or fused[name]
            if (form := packed_form(node, choice.name, choice.kernel)) is not None:
                held.update({value: held.get(value, frozenset()) | {form} for value in form[0]})
    buckets.sort(key=lambda bucket: bucket.rows)
    return [
        bucket
        for bucket, above in itertools.zip_longest(buckets, buckets[1:])
        if above is None or above.signature != bucket.signature
    ]


def _words(policy: Policy) -> set[str]:
    """All words for kernels that a policy has."""
    lists = [policy.document.defaults.use, *(rule.use for rule in policy.document.rule)]
    return {word for listed in lists for word in listed}


class _Choosing:
    """The choices of one graph, row count by row count."""

    def __init__(self, graph: Graph, selector: Selector, fusions: Sequence[Fusion]) -> None:
        self._graph, self._selector, self._fusions = graph, selector, fusions
        self._fusing = Fusing(selector)
        self.nodes = {node.name: node for node in graph.ops}
        slotting = Slotting(graph, fusions, selector.kind)
        self._auto = Auto(graph, selector, self._fusing, slotting)

    def at(self, rows: int, held: Held) -> Bucket | None:
        """The choices at one row count: plain kernels first, then each fusion that they agree to, longest first.

        Where the policy leaves some node to `auto`, what is the fastest together; None where that needs packed forms
        beyond those `held` that weights may not have.
        """
        if self._is_open(rows):
            return self._assigned(rows, held)
        plain = {name: self._choose(node, rows, held, exact=False) for name, node in self.nodes.items()}
        choices, kept = dict(plain), list[Fusion]()
        considered: dict[str, list[Rejection]] = {}
        for fusion in self._fusions:
            if all(part in choices for part in fusion.parts):
                parts = [(self.nodes[part], choices[part]) for part in fusion.parts]
                made, refused = self._fusing.decide(fusion.node, fusion.node.rows_at(rows), parts, held)
                if made is None:
                    _note(considered, refused, fusion)
                    continue
                kept.append(fusion)
                for part in fusion.parts:
                    del choices[part]
                choices[fusion.node.name] = made
        kept = self._taken_apart(kept, choices, plain.__getitem__, considered)
        if self._selector.policy.document.weights.copies is not None:
            remaining = {name: node for name, node in self.nodes.items() if name in choices}
            choices.update({name: self._choose(node, rows, held) for name, node in remaining.items()})
        return Bucket(rows, tuple(kept), choices, {name: tuple(dict.fromkeys(why)) for name, why in considered.items()})

    def up_to_most(self, counts: Sequence[int], held: Held) -> list[int]:
        """Of ascending row counts those that steps had better have, where the policy leaves some node to `auto`."""
        if not self._is_open(counts[-1]):
            return list(counts)
        most = self._auto.most(counts, held)
        return [rows for rows in counts if rows <= most]

    def _is_open(self, rows: int) -> bool:
        return any(self._selector.is_open(node, node.rows_at(rows)) for node in self.nodes.values())

    def _assigned(self, rows: int, held: Held) -> Bucket | None:
        assigned = self._auto.at(rows, held)
        if assigned is None:
            return None
        choices: dict[str, Choice] = {}
        kept: list[Fusion] = []
        for fusion in assigned.fusions:
            name = fusion.node.name
            try:
                choices[name] = self._prefer(fusion.node, rows, held, assigned.kernels[name])
                kept.append(fusion)
            except PlanError:
                # It has raised in a walk, or packs one copy too many: its parts run.
                continue
        gone = {part for fusion in kept for part in fusion.parts}
        for name, node in self.nodes.items():
            if name not in gone:
                choices[name] = self._prefer(node, rows, held, assigned.kernels.get(name, ""))
        considered: dict[str, list[Rejection]] = {}
        standing = {fusion.node.name for fusion in kept}
        for group in self._auto.slotting.groups:
            node = group[0].node
            if node.name not in standing:
                refused = self._fusing.refused(node, node.rows_at(rows), self._auto.parts[node.name])
                _note(considered, refused, *group)

        def plain(part: str) -> Choice:
            return self._prefer(self.nodes[part], rows, held, "")

        kept = self._taken_apart(kept, choices, plain, considered)
        return Bucket(rows, tuple(kept), choices, {name: tuple(dict.fromkeys(why)) for name, why in considered.items()})

    def _prefer(self, node: TensorNode, rows: int, held: Held, preferred: str) -> Choice:
        return self._selector.choose(node, node.rows_at(rows), held, preferred=preferred)

    def look_up(self, rows: int, locked: Mapping[str, Placed]) -> Bucket:
        """The choices of a locked plan at one row count."""
        banned = self._selector.banned
        kept = tuple(
            fusion
            for fusion in self._fusions
            if (name := fusion.node.name) in locked and (name, locked[name].name) not in banned
        )
        gone = {part for fusion in kept for part in fusion.parts}
        remaining = [node for name, node in self.nodes.items() if name not in gone] + [fusion.node for fusion in kept]
        return Bucket(rows, kept, {node.name: self._choose(node, rows) for node in remaining}, {})

    def _choose(self, node: TensorNode, rows: int, held: Held | None = None, exact: bool = True) -> Choice:
        return self._selector.choose(node, node.rows_at(rows), held, exact)

    def _taken_apart(
        self,
        kept: Sequence[Fusion],
        choices: dict[str, Choice],
        plain: Callable[[str], Choice],
        considered: dict[str, list[Rejection]],
    ) -> list[Fusion]:
        """The fusions that stay: without those whose kernel writes side by side what somebody reads otherwise."""
        if not any(choice.kernel.side_by_side for choice in choices.values()):
            return list(kept)
        faults = dict(apart(self._graph, fuse(self._graph.ops, kept), choices))
        for fusion in kept:
            if (fault := faults.get(fusion.node.name)) is None:
                continue
            gone = choices.pop(fusion.node.name)
            rules = self._selector.policy.document.rule
            if gone.rule is not None and rules[gone.rule].on_unsupported == "error":
                raise PlanError(f"{fusion.node.name} cannot have {gone.name}: {fault}", node=fusion.node.name)
            _note(considered, [Rejection(gone.name, fault, "format")], fusion)
            choices.update({part: plain(part) for part in fusion.parts})
        return [fusion for fusion in kept if fusion.node.name not in faults]


def _note(considered: dict[str, list[Rejection]], refused: Sequence[Rejection], *alike: Fusion) -> None:
    """Puts it on record with each plain node why nobody took the fused one."""
    found = refused or [Rejection("nobody", "no backend offers it", "not offered")]
    told = [Rejection(f"{why.kernel} of {alike[0].node.op}", why.reason, why.kind) for why in found]
    for part in (part for fusion in alike for part in fusion.parts):
        considered.setdefault(part, []).extend(told)

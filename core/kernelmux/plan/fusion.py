"""Which fused nodes take the place of plain ones, and why each other candidate does not.

Enters: the choices for a graph's plain nodes at one row count, the places where fused ops would stand. Leaves: the
fusions kept, with their kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kernelmux.contract.kernel import Declined, Kernel
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.plan.choice import Choice, Rejection
from kernelmux.plan.formats import joint_format, wanted_formats
from kernelmux.plan.selection import Held, Refuse, Selector
from kernelmux.policy.grammar import AUTO, PARTS, Rule

Agreed = tuple[tuple[str, str, int | None], ...]
"""Of each part of a fusion: its kernel, the policy's words for it, and the rule."""

Verdict = tuple[Choice | None, tuple[Rejection, ...]]


@dataclass
class Fusing:
    """Decides for one selector; alike fusions are decided once."""

    selector: Selector
    _verdicts: dict[tuple[int, int, int | None, Agreed], Verdict] = field(default_factory=dict)

    def decide(
        self, node: TensorNode, rows: int, parts: Sequence[tuple[TensorNode, Choice]], held: Held | None
    ) -> Verdict:
        """The kernel for a fused node, None where its parts had better stay; and why candidates were not taken.

        A rule that names the fused op decides. Without one a kernel takes the place of others only if they would have
        agreed: it has the name of those that read weights, and the backend of the others.
        """
        rule = self.selector.match(node, rows)
        if (ruled := self._ruled(node, rows, held)) is not None:
            named, refused = ruled
            return named and replace(named, rejected=named.rejected + _replaced(parts)), refused
        own = self.selector.own_refusal(node, held, exact=True)
        if own is not None:
            return self._agree(node, rows, rule, parts, own)
        agreed = tuple((choice.name, choice.asked, choice.rule) for _, choice in parts)
        key = self.selector.offers.kind(node), rows, rule, agreed
        if key not in self._verdicts:
            self._verdicts[key] = self._agree(node, rows, rule, parts, None)
        return self._verdicts[key]

    def forced(self, node: TensorNode, rows: int) -> bool:
        """Whether a rule that names a fused op decides about a node: a kernel that it names takes it."""
        ruled = self._ruled(node, rows, None)
        return ruled is not None and ruled[0] is not None

    def candidates(self, node: TensorNode, rows: int, parts: Sequence[TensorNode]) -> list[tuple[str, Kernel]]:
        """The kernels that may run all parts of a fused node: those of their rules, or what `auto` may take."""
        if self._rule_of_its_own(node, rows) is not None:
            named, _ = self._ruled(node, rows, None) or (None, ())
            return [(named.name, named.kernel)] if named else []
        offer = self.selector.offers.of(node, rows)
        return [(name, offer.kernels[name]) for name, why in self._refusals(node, rows, parts) if why is None]

    def refused(self, node: TensorNode, rows: int, parts: Sequence[TensorNode]) -> list[Rejection]:
        """Why the kernels of a fused node do not run, where its parts do."""
        asked = self._rule_of_its_own(node, rows)
        if asked is not None and PARTS in asked.use:
            return list(self._left_to_parts(node, rows))
        slower = Declined("what runs in its place is predicted to be faster", "outranked")
        why = [(name, declined or slower) for name, declined in self._refusals(node, rows, parts)]
        declined = self.selector.offers.of(node, rows).declined.items()
        why += [(name, refusal) for name, refusal in declined if ":" in name]
        return [Rejection(name, refusal.reason, refusal.kind) for name, refusal in why]

    def _refusals(
        self, node: TensorNode, rows: int, parts: Sequence[TensorNode]
    ) -> Iterator[tuple[str, Declined | None]]:
        rule, offer = self.selector.match(node, rows), self.selector.offers.of(node, rows)
        fixed = [(part, self.selector.choose(part, rows)) for part in parts if not self.selector.is_open(part, rows)]
        for name, kernel in offer.kernels.items():
            why = self._disagreement(name, kernel, fixed)
            yield name, why or self.selector.refusal(name, node, rule, offer, AUTO)

    def _rule_of_its_own(self, node: TensorNode, rows: int) -> Rule | None:
        """The rule that decides about a fused node, if it names the fused op."""
        index = self.selector.match(node, rows)
        rule = None if index is None else self.selector.policy.document.rule[index]
        return rule if rule is not None and node.op in (rule.op or ()) else None

    def _ruled(self, node: TensorNode, rows: int, held: Held | None) -> Verdict | None:
        """What a rule that names the fused op decides: a kernel, or that its parts stay. None: it leaves that open."""
        asked = self._rule_of_its_own(node, rows)
        if asked is None:
            return None
        if PARTS in asked.use and not self.selector.candidates(node, rows):
            return None, tuple(self._left_to_parts(node, rows))
        try:
            named = self.selector.choose(node, rows, held)
        except PlanError as error:
            if PARTS in asked.use:
                return None, (Rejection(node.op, str(error), "unsupported"), *self._left_to_parts(node, rows))
            if asked.on_unsupported == "error":
                raise
            return None, (Rejection(node.op, str(error), "unsupported"),)
        return (named, named.rejected) if named.asked in asked.use else None

    def _left_to_parts(self, node: TensorNode, rows: int) -> Iterator[Rejection]:
        """Why no kernel takes a fused node whose rule asks for its parts, where none does that it names before them."""
        rule, offer = self.selector.match(node, rows), self.selector.offers.of(node, rows)
        asked = Declined(f"its parts run, by {self.selector.policy.where(rule)}", "outranked")
        for name in offer.kernels:
            why = self.selector.refusal(name, node, rule, offer, name) or asked
            yield Rejection(name, why.reason, why.kind)
        declined = [(name, why) for name, why in offer.declined.items() if ":" in name]
        yield from (Rejection(name, why.reason, why.kind) for name, why in declined)
        if not (offer.kernels or declined):
            yield Rejection("nobody", asked.reason, asked.kind)

    def _agree(
        self,
        node: TensorNode,
        rows: int,
        rule: int | None,
        parts: Sequence[tuple[TensorNode, Choice]],
        own: Refuse | None,
    ) -> Verdict:
        """The first kernel for a fused node that may run all of its parts."""
        offer = self.selector.offers.of(node, rows)
        refused = [Rejection(name, why.reason, why.kind) for name, why in offer.declined.items() if ":" in name]
        for name, kernel in offer.kernels.items():
            # Its parts were chosen by these words, and it may stand for them.
            why = self._disagreement(name, kernel, parts) or self.selector.refusal(name, node, rule, offer, name)
            why = why or (own(name, kernel) if own else None)
            if why is None:
                goes_on = any(choice.on_error == "next" for _, choice in parts)
                on_error = "next" if goes_on else self.selector.policy.on_error(rule)
                reason = f"in place of {len(parts)} nodes"
                replaced = _replaced(parts)
                return Choice(name, reason, replaced, rule, name, on_error, kernel=kernel), tuple(refused)
            refused.append(Rejection(name, why.reason, why.kind))
        return None, tuple(refused)

    def _disagreement(self, name: str, kernel: Kernel, parts: Sequence[tuple[TensorNode, Choice]]) -> Declined | None:
        """Why a fused kernel may not run all parts, which choices were made for."""
        for part, choice in parts:
            if not _stands_for(name, part, choice):
                return Declined(f"{part.op} was given to {choice.name}, by {choice.reason}", "outranked")
            if not self.selector.within_budget(kernel, choice.rule):
                return Declined(f"its error bound {kernel.precision:g} is over the budget of {part.op}", "over budget")
        return None


def _replaced(parts: Sequence[tuple[TensorNode, Choice]]) -> tuple[Rejection, ...]:
    """Why the kernels of the plain nodes do not run: a fused one takes their place."""
    ops: dict[str, dict[str, None]] = {}
    for part, choice in parts:
        ops.setdefault(choice.name, {})[part.op] = None
    return tuple(
        Rejection(f"{plain} of {', '.join(of)}", f"all {len(parts)} nodes run as one", "outranked")
        for plain, of in ops.items()
    )


def _stands_for(name: str, part: TensorNode, choice: Choice) -> bool:
    """Whether a fused kernel may run a part that `choice` was made for."""
    if part.weight or ":" in choice.asked:
        return name == choice.name
    return choice.backend == name.partition(":")[0]


def apart(graph: Graph, nodes: Sequence[TensorNode], choices: Mapping[str, Choice]) -> Iterator[tuple[str, str]]:
    """Nodes whose kernel writes its outputs side by side where somebody cannot read them so: name, and why."""
    wanted = wanted_formats(graph, [(node, choices[node.name]) for node in nodes])
    whole = [node for node in nodes if not choices[node.name].kernel.strided]
    # The first of those that read a value whole.
    blind = {value.name: reader.name for reader in reversed(whole) for value in reader.inputs}
    for node in nodes:
        kernel = choices[node.name].kernel
        if not kernel.joins(node):
            continue
        names = {value.name for value in node.outputs}
        if kept := names.intersection(graph.outputs):
            yield node.name, f"it writes side by side, and {min(kept)} is what the graph hands back"
            continue
        if readers := [blind[value.name] for value in node.outputs if value.name in blind]:
            kernel_name = choices[readers[0]].name
            yield node.name, f"it writes side by side, and {kernel_name} of {readers[0]} reads whole rows only"
        elif joint_format(kernel, node, wanted) is None:
            yield node.name, "it writes side by side, in no format that all of its readers take"

"""The nodes, kernels and row counts to blame for wrong results: those without which the results are right.

Enters: a model, a plan, token ids. Leaves: a Verdict, proved by a plan that does without just those. One run is held
against another in which the reference makes every launch, on the same memory and in the same formats: what is swapped
changes no layout, no fusion and no other kernel. A fault that only shows where launches are replayed or chained is
looked for by plans instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kernelmux.debug.apart import SLACK
from kernelmux.debug.search import accomplices, to_blame
from kernelmux.debug.suspects import REFERENCE, Beside, Suspect, Swap, suspects_of
from kernelmux.errors import LaunchError, ModelError
from kernelmux.graph.domain import Range
from kernelmux.plan.plan import Plan
from kernelmux.policy.grammar import Rule
from kernelmux.policy.policy import Policy
from kernelmux.run.capture import captured_rows
from kernelmux.run.feeds import Feed
from kernelmux.run.ladder import eager_extents
from kernelmux.run.model import Model
from kernelmux.run.replaced import Replaced
from kernelmux.run.session import Session

if TYPE_CHECKING:
    import torch

LEAST_BOUND = 1e-4
ANY_ERROR = 1.0
FEW = 8
"""Suspects of which each is tried to be left out, one by one."""


@dataclass(frozen=True)
class Verdict:
    """Who is to blame for an error, if anybody."""

    error: float
    """Of the plan: NMSE of the worst row of logits, each less its mean."""
    position: int
    """Of that row."""
    bound: float
    blamed: tuple[Suspect, ...]
    """Empty where the error is within the bound, and where no kernel is to blame."""
    accomplices: tuple[Suspect, ...]
    """Without which those to blame do no harm."""
    healed: float | None
    """The error of a plan that does without those to blame."""
    replayed: bool
    """Whether the fault shows only where launches are captured or chained."""
    runs: int
    """How often the tokens were run, beside the runs that others are held against."""
    proved_after: int
    """Runs until those to blame were proved to be; what follows leaves out row counts, and looks for accomplices."""
    raised: str
    """What ended the run of the plan, if a kernel did: the error is infinite then."""
    replaced: tuple[Replaced, ...]
    """Kernels of the plan that raised and gave way to others, which were run in their place."""
    policy: Policy | None
    """Works around the fault."""


def bisect(
    model: Model,
    plan: Plan,
    ids: Sequence[int],
    decoded: int = 0,
    *,
    instead: Sequence[str] = (REFERENCE,),
    limit: float | None = None,
    show: Callable[[int, float], object] = lambda runs, error: None,
) -> Verdict:
    """Runs `ids`, the last `decoded` of them a step each, until it is known who is to blame for an error over `limit`.

    `instead` are the kernels that the policy which works around it uses. `show` is told of every run. ModelError where
    there are no tokens to run.
    """
    if not 0 <= decoded < len(ids) <= model.source.shape.context:
        raise ModelError(
            f"a fault is looked for in 1 to {model.source.shape.context} tokens of which the last may be decoded "
            f"(--decode), but the first, not in {len(ids)}{f' of which {decoded} are' if decoded > 0 else ''}"
        )
    return _Search(model, plan, ids, decoded, instead, limit, show).verdict()


def stated_error(plan: Plan) -> float:
    """What the kernels of a plan's largest walk say that they err by, together."""
    return sum(step.choice.kernel.precision for step in plan.schedule(plan.max_rows, plan.max_rows).steps)


class _Search:
    """Runs of one text, each with some launches made by the reference, or by another plan."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        ids: Sequence[int],
        decoded: int,
        instead: Sequence[str],
        limit: float | None,
        show: Callable[[int, float], object],
    ) -> None:
        self.model, self.ids, self.decoded = model, ids, decoded
        self.instead, self.show = tuple(instead), show
        self.limit = max(LEAST_BOUND, SLACK * stated_error(plan)) if limit is None else limit
        self.runs = 0
        self.raised = ""
        self.fails_one_by_one = False
        self._healed: dict[frozenset[Suspect], float] = {}
        """The errors of plans that do without some."""
        # Kept, so that every run finds its weights packed.
        self._first = model.session(plan, len(ids))
        self._found = self._run(self._first)
        # Where a kernel raised and gave way to another, that one is suspected.
        self.plan = self._first.plan
        nodes: dict[str, list[Suspect]] = {}
        for suspect in suspects_of(self.plan, self._row_counts()):
            nodes.setdefault(suspect.node, []).append(suspect)
        self.nodes = list(nodes.values())
        self._truth = self._run(self._session(), _all(self.nodes))

    def verdict(self) -> Verdict:
        error, position = self._error(self._found)
        found, replayed = self._to_blame() if error > self.limit else ((), False)
        proved_after = self.runs
        blamed = self._fewer(found)
        return Verdict(
            error=error,
            position=position,
            bound=self.limit,
            blamed=blamed,
            accomplices=() if replayed or not blamed else self._accomplices(blamed),
            healed=self._healed[frozenset(blamed)] if blamed else None,
            replayed=replayed,
            runs=self.runs,
            proved_after=proved_after,
            raised=self.raised,
            replaced=tuple(self._first.replaced),
            policy=without(self.plan.policy, blamed, self.instead) if blamed else None,
        )

    def _to_blame(self) -> tuple[Sequence[list[Suspect]], bool]:
        """The nodes, and whether the fault shows only where launches are captured or chained."""
        found = to_blame(self.nodes, self._heals, self._proves, self._wrong_by_themselves)
        # Where nothing ever failed before an observer's eyes it may be that nothing does.
        replayed = not self.fails_one_by_one and self._heals(())
        if replayed:
            found = to_blame(self._replaceable(), self._proves, self._proves)
        return found or (), replayed

    def _heals(self, nodes: Sequence[Sequence[Suspect]]) -> bool:
        """Whether all is right where the reference makes the launches of some nodes."""
        within = self._error(self._run(self._session(), _all(nodes)))[0] <= self.limit
        self.fails_one_by_one = self.fails_one_by_one or not within
        return within

    def _proves(self, nodes: Sequence[Sequence[Suspect]]) -> bool:
        """Whether all is right with a plan that does without some nodes' kernels."""
        some = frozenset(_all(nodes))
        if some not in self._healed:
            self._healed[some] = self._error_without(sorted(some, key=_all(self.nodes).index))
        return self._healed[some] <= self.limit

    def _replaceable(self) -> list[list[Suspect]]:
        """Nodes whose exchange tells of a fault that replays alone show: in whose place others can be captured.

        From here on others come first: with the reference's kernels a step is captured no longer, nor is it wrong.
        """
        if not (self.decoded and captured_rows(self.plan, 1)):
            return self.nodes
        working = self.plan.registry.working
        self.instead = (*(name for name in working if name not in (REFERENCE, *self.instead)), *self.instead)
        self._healed.clear()
        steps = self._plan_without(_all(self.nodes)).schedule(1, 1).steps
        held = {step.node.name: step.choice.kernel.capturable for step in steps}
        return [node for node in self.nodes if all(held.get(name, True) for name in (node[0].node, *node[0].parts))]

    def _wrong_by_themselves(self) -> Sequence[list[Suspect]]:
        """Nodes of which launches are far from what the reference makes of the same inputs, at those row counts.

        One run finds all of a kernel's that is wrong wherever it runs; faults of memory, order and replay it does not.
        """
        session = self._session()
        beside = Beside(session)
        with session.watched(beside):
            self._error(self._run(session))
        return [node for node in self.nodes if any(map(beside.tells_against, node))]

    def _fewer(self, nodes: Sequence[Sequence[Suspect]]) -> tuple[Suspect, ...]:
        """Of those to blame the nodes and row counts that none can be left out of, where there are several."""
        kept = _all(nodes)
        by_rows = [[other for other in kept if other.rows == rows] for rows in dict.fromkeys(s.rows for s in kept)]
        for some in (*by_rows, *([suspect] for suspect in kept if len(kept) <= FEW)):
            rest = [other for other in kept if other not in some]
            if 0 < len(rest) < len(kept) and self._proves([rest]):
                kept = rest
        return tuple(kept)

    def _accomplices(self, blamed: Sequence[Suspect]) -> tuple[Suspect, ...]:
        every = _all(self.nodes)

        def fails(kept: Sequence[Suspect]) -> bool:
            swapped = [suspect for suspect in every if suspect not in kept]
            return self._error(self._run(self._session(), swapped))[0] > self.limit

        return tuple(accomplices(every, blamed, fails))

    def _row_counts(self) -> set[int]:
        """Those of the walks, which may be padded."""
        prompt, most = len(self.ids) - self.decoded, self.plan.max_rows
        counts = {prompt % most, most if prompt >= most else 0, 1 if self.decoded else 0} - {0}
        return {eager_extents(self.plan, rows, rows, 1, 1)["m"] for rows in counts}

    def _session(self) -> Session:
        return self.model.session(self.plan, len(self.ids))

    def _error_without(self, some: Sequence[Suspect]) -> float:
        """Of a plan that does without them: held against its own launches made by the reference, for what it stores
        otherwise is rounded otherwise."""
        session = self.model.session(self._plan_without(some), len(self.ids))
        found = self._run(session)
        every = [*suspects_of(session.plan, self._row_counts())]
        return self._error(found, self._run(self.model.session(session.plan, len(self.ids)), every))[0]

    def _plan_without(self, some: Sequence[Suspect]) -> Plan:
        policy, plan = without(self.plan.policy, some, self.instead), self.plan
        return self.model.plan(policy, device=plan.device, max_rows=plan.max_rows, context=plan.context)

    def _run(self, session: Session, swapped: Collection[Suspect] | None = None) -> torch.Tensor:
        """Logits [tokens, vocabulary] of all positions; NaN from where a kernel raises.

        Where some are swapped, even none, launches are made one by one.
        """
        import torch

        parts = list[torch.Tensor]()
        watched = nullcontext() if swapped is None else session.watched(Swap(session, swapped))
        try:
            with watched:
                # The next step overwrites what one returns.
                parts += (logits.cpu().clone() for logits in fed(session, self.ids, self.decoded, all_logits=True))
        except LaunchError as error:
            if error.sticky:
                raise
            if session is self._first:
                self.raised = f"{error.kernel} raised at {error.node}: {error.reason}"
        missing = len(self.ids) - sum(map(len, parts))
        return torch.cat([*parts, torch.full((missing, self.model.source.shape.vocab), math.nan)]).float()

    def _error(self, found: torch.Tensor, truth: torch.Tensor | None = None) -> tuple[float, int]:
        """Of a run the NMSE of the worst row, and which it is; no number is worse than any."""
        self.runs += 1
        wanted = (self._truth if truth is None else truth).double()
        spread = (wanted - wanted.mean(-1, keepdim=True)).square().sum(-1).clamp(min=1e-300)
        errors = (found.double() - wanted).square().sum(-1).div(spread).nan_to_num(nan=math.inf)
        self.show(self.runs, float(errors.max()))
        return float(errors.max()), int(errors.argmax())


def fed(session: Session, ids: Sequence[int], decoded: int, *, all_logits: bool = False) -> Iterator[torch.Tensor]:
    """Logits of a new sequence's prompt, of its last row or of all, then of each of the last `decoded` tokens."""
    sequence, prompt = session.open(), len(ids) - decoded
    yield session.feed(sequence, ids[:prompt], all_logits=all_logits)
    for token in ids[prompt:]:
        yield session.step([Feed(sequence, [token])])


def _all(nodes: Sequence[Sequence[Suspect]]) -> list[Suspect]:
    return [suspect for node in nodes for suspect in node]


def without(policy: Policy, blamed: Sequence[Suspect], instead: Sequence[str]) -> Policy:
    """The policy with a rule before all others for each of those to blame, and for what a fused one stands for.

    Of `instead` its own backend, where that is named as a whole, is left out.
    """
    rules, names = [], []
    for suspect in blamed:
        low, high = suspect.rows
        nodes = tuple(_literal(name) for name in (suspect.node, *suspect.parts))
        # Whatever they err by: a budget of the policy's would bring back those to blame.
        others = tuple(name for name in instead if name != suspect.kernel.partition(":")[0]) or tuple(instead)
        rules.append(Rule(node=nodes, m=Range(low, high), use=others, max_error=ANY_ERROR))
        names.append(f"{suspect.node}={','.join(others)}")
    document = policy.document.model_copy(update={"rule": (*rules, *policy.document.rule)})
    return replace(policy, document=document, options=(*names, *policy.options))


def _literal(name: str) -> str:
    """A name as a pattern that only it matches."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)

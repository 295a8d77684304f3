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

from kernelmux.contract.answers import bound
from kernelmux.contract.kernel import Launch
from kernelmux.debug.search import accomplices, to_blame
from kernelmux.errors import LaunchError, ModelError, PlanError
from kernelmux.graph.domain import Range
from kernelmux.plan.buckets import first_row
from kernelmux.plan.plan import Plan
from kernelmux.policy.grammar import Rule
from kernelmux.policy.policy import Policy
from kernelmux.run.feeds import Feed
from kernelmux.run.model import Model
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk
from kernelmux.run.watch import Observer

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"
TRUTH = "reference:f32"
"""The kernel that makes a launch in another's place."""
SLACK = 10.0
"""Times what all kernels of a walk say that they err by, which is what logits may be off by unless told."""
LEAST_BOUND = 1e-4


@dataclass(frozen=True)
class Suspect:
    """A node of a plan at some row counts, and its kernel."""

    node: str
    op: str
    kernel: str
    rows: tuple[int, int]
    """The least and the largest of the bucket."""
    parts: tuple[str, ...] = ()
    """The plain nodes that a fused one stands for."""

    def __str__(self) -> str:
        low, high = self.rows
        return f"{self.kernel} at {self.node} ({self.op}), {f'{low}' if low == high else f'{low} to {high}'} rows"


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
    """How often the tokens were run, beside the one that the others are held against."""
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
            f"a fault is looked for in 1 to {model.source.shape.context} tokens of which the last may be decoded, "
            f"not in {len(ids)} of which {decoded} are"
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
        self.model, self.plan, self.ids, self.decoded = model, plan, ids, decoded
        self.instead, self.show = tuple(instead), show
        self.limit = max(LEAST_BOUND, SLACK * stated_error(plan)) if limit is None else limit
        self.runs = 0
        # Kept, so that every run finds its weights packed.
        self.first = model.session(plan, len(ids))
        self.suspects = list(_suspects(plan, self._row_counts()))
        self.truth = self._run(self.first, self.suspects)

    def verdict(self) -> Verdict:
        error, position = self._error(self._run(self.first))
        if error <= self.limit:
            return Verdict(error, position, self.limit, (), (), None, False, self.runs, None)
        healed = dict[tuple[Suspect, ...], float]()

        def proves(some: Sequence[Suspect]) -> bool:
            healed[tuple(some)] = self._error(self._run_without(some))[0]
            return healed[tuple(some)] <= self.limit

        failed = False

        def heals(some: Sequence[Suspect]) -> bool:
            nonlocal failed
            within = self._error(self._run(self._session(), some))[0] <= self.limit
            failed = failed or not within
            return within

        found = to_blame(self.suspects, heals, proves)
        # Where nothing ever failed before an observer's eyes it may be that nothing does.
        replayed = not failed and self._is_sound_one_by_one()
        if replayed:
            found = to_blame(self.suspects, proves, proves)
        blamed = tuple(sorted(found or (), key=self.suspects.index))
        return Verdict(
            error=error,
            position=position,
            bound=self.limit,
            blamed=blamed,
            accomplices=() if replayed or not blamed else self._accomplices(blamed),
            healed=healed.get(tuple(found)) if found else None,
            replayed=replayed,
            runs=self.runs,
            policy=without(self.plan.policy, blamed, self.instead) if blamed else None,
        )

    def _is_sound_one_by_one(self) -> bool:
        return self._error(self._run(self._session(), ()))[0] <= self.limit

    def _accomplices(self, blamed: Sequence[Suspect]) -> tuple[Suspect, ...]:
        def fails(kept: Sequence[Suspect]) -> bool:
            swapped = [suspect for suspect in self.suspects if suspect not in kept]
            return self._error(self._run(self._session(), swapped))[0] > self.limit

        return tuple(accomplices(self.suspects, blamed, fails))

    def _row_counts(self) -> set[int]:
        """Of the buckets that the run walks, the largest row counts."""
        prompt, most = len(self.ids) - self.decoded, self.plan.max_rows
        counts = {prompt % most, most if prompt >= most else 0, 1 if self.decoded else 0} - {0}
        return {self.plan.bucket(rows) for rows in counts}

    def _session(self) -> Session:
        return self.model.session(self.plan, len(self.ids))

    def _run_without(self, some: Sequence[Suspect]) -> torch.Tensor:
        """As a plan runs that does without them."""
        policy = without(self.plan.policy, some, self.instead)
        plan = self.model.plan(policy, device=self.plan.device, max_rows=self.plan.max_rows, context=self.plan.context)
        return self._run(self.model.session(plan, len(self.ids)))

    def _run(self, session: Session, swapped: Collection[Suspect] | None = None) -> torch.Tensor:
        """Logits [tokens, vocabulary] of all positions; NaN from where a kernel raises.

        Where some are swapped, even none, launches are made one by one.
        """
        import torch

        sequence, parts, prompt = session.open(), list[torch.Tensor](), len(self.ids) - self.decoded
        watched = nullcontext() if swapped is None else session.watched(_Swap(session, swapped))
        try:
            with watched:
                parts.append(session.feed(sequence, self.ids[:prompt], all_logits=True).cpu())
                parts += (session.step([Feed(sequence, [token])]).cpu() for token in self.ids[prompt:])
        except LaunchError as error:
            if error.sticky:
                raise
        missing = len(self.ids) - sum(map(len, parts))
        vocab = self.model.source.shape.vocab
        return torch.cat([*parts, torch.full((missing, vocab), math.nan)]).float()

    def _error(self, found: torch.Tensor) -> tuple[float, int]:
        """Of a run the NMSE of the worst row, and which it is; no number is worse than any."""
        self.runs += 1
        wanted = self.truth.double()
        spread = (wanted - wanted.mean(-1, keepdim=True)).square().sum(-1).clamp(min=1e-300)
        errors = (found.double() - wanted).square().sum(-1).div(spread).nan_to_num(nan=math.inf)
        self.show(self.runs, float(errors.max()))
        return float(errors.max()), int(errors.argmax())


def _suspects(plan: Plan, tops: Collection[int]) -> Iterator[Suspect]:
    """All steps of the walks at these row counts, a node's next to each other, in the order of the walk."""
    found: dict[str, list[Suspect]] = {}
    for top in sorted(tops):
        rows = first_row(plan.buckets, top), top
        for step in plan.schedule(top, top).steps:
            node = step.node
            suspect = Suspect(node.name, node.op, step.choice.name, rows, plan.fused.get(node.name, ()))
            if not step.choice.name.startswith(f"{REFERENCE}:"):
                found.setdefault(node.name, []).append(suspect)
    return (suspect for each in found.values() for suspect in each)


def without(policy: Policy, blamed: Sequence[Suspect], instead: Sequence[str]) -> Policy:
    """The policy with a rule before all others for each of those to blame, and for what a fused one stands for."""
    rules, names = [], []
    for suspect in blamed:
        low, high = suspect.rows
        nodes = tuple(_literal(name) for name in (suspect.node, *suspect.parts))
        rules.append(Rule(node=nodes, m=Range(low, high), use=tuple(instead)))
        names.append(f"{suspect.node}={','.join(instead)}")
    document = policy.document.model_copy(update={"rule": (*rules, *policy.document.rule)})
    return replace(policy, document=document, options=(*names, *policy.options))


def _literal(name: str) -> str:
    """A name as a pattern that only it matches."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


class _Swap(Observer):
    """Makes the launches of some suspects by the reference, on the memory that their own kernels would have used."""

    def __init__(self, session: Session, swapped: Collection[Suspect]) -> None:
        self.session = session
        self.swapped = {(suspect.node, suspect.rows[1]) for suspect in swapped}
        self._launches: dict[tuple[Walk, int], Launch] = {}

    def launch(self, walk: Walk, index: int, call: Launch) -> None:
        top = self.session.plan.bucket(walk.steps[0].node.rows)
        if (walk.steps[index].node.name, top) not in self.swapped:
            call()
            return
        if (walk, index) not in self._launches:
            self._launches[walk, index] = self._bound(walk, index)
        self._launches[walk, index]()

    def _bound(self, walk: Walk, index: int) -> Launch:
        node, walker = walk.steps[index].node, self.session.walker
        offer = walker.plan.registry.offer(node, walk.device, REFERENCE)
        kernel = offer.kernels.get(TRUTH)
        if kernel is None:
            raise PlanError(
                f"{TRUTH} does not take {node.name} ({node.op}); install kernelmux-reference to look for faults"
            )
        with walk.device.platform.on(walker.stream):
            packed = walker.packed.get(node, TRUTH, kernel)
            return bound(kernel, node, replace(walk.tensors[index], packed=packed), walker.stream)

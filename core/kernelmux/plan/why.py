"""Why a node has its kernel: the choice with its variants, who lost and by how much, what fused nodes stand for it.

Enters: a Plan, a node's name. Leaves: text of at most so many columns, or data for JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernelmux.contract.packed import packed_form
from kernelmux.errors import PlanError, nearest
from kernelmux.graph.formats import human_count
from kernelmux.measure.predict import Prediction, human_time
from kernelmux.plan.auto import PAYS
from kernelmux.plan.buckets import bounds
from kernelmux.plan.choice import Rejection
from kernelmux.plan.offers import Offers
from kernelmux.plan.selection import LEAST_TIME, Selector
from kernelmux.plan.table import WIDTH, grouped, members, spans, wrapped

if TYPE_CHECKING:
    from kernelmux.graph.graph import TensorNode
    from kernelmux.plan.choice import Choice
    from kernelmux.plan.formats import Step
    from kernelmux.plan.plan import Plan

ONCE_MORE = (
    f"it would pack the weights once more, which is done where that takes {1 - PAYS:.0%} off a step, there is room, "
    "and the policy allows it"
)

Told = tuple[str, tuple[Rejection, ...]]
"""What a step's choice is, in lines; and who lost."""


def why(plan: Plan, name: str, rows: int | None = None) -> str:
    """All about one node, or about what stands for it: kernel, variants and losers in every bucket, fused candidates.

    `name` may be that of a row of the table, `blk.0..29.attn_q`; with `rows` only the bucket of so many is told.
    PlanError for an unknown name, and for more rows than the plan has.
    """
    names, apart = _nodes_named(plan, name), _Apart(plan)
    told: dict[Told, list[int]] = {}
    for top, steps in _steps_of(plan, names, rows):
        texts = [_chosen(step, _told(plan, step, top, apart), top, apart) for step in steps]
        for told_once in grouped(texts) if len(texts) > 1 else texts:
            told.setdefault(told_once, []).append(top)
    lines = []
    for (text, losers), tops in told.items():
        lines += f"rows {spans(bounds(plan.buckets, tops))}: {text}".split("\n")
        lines += _refused(losers if len(told) == 1 else filter(_was_outranked, losers))
    if len(told) > 1 and (refused := list(_refused_by_rows(plan, told))):
        lines += ["refused:", *refused]
    if considered := _considered(plan, names):
        lines += ["fused candidates:", *_refused(dict.fromkeys(map(_at_any_count, considered)))]
    return "\n".join(part for line in lines for part in wrapped(line, WIDTH, "    "))


def why_data(plan: Plan, name: str, rows: int | None = None) -> dict[str, Any]:
    """The same for a script."""
    names, apart = _nodes_named(plan, name), _Apart(plan)
    return {
        "node": name,
        "buckets": [
            {
                "rows": top,
                "node": step.node.name,
                **choice_data(_told(plan, step, top, apart)),
                "predicted": step.choice.predicted and asdict(step.choice.predicted),
                "variants": [asdict(taken) for taken in step.choice.variants],
                "parts": [asdict(part) for part in apart.parts(step, top)],
            }
            for top, steps in _steps_of(plan, names, rows)
            for step in steps
        ],
        "considered": [asdict(loser) for loser in _considered(plan, names)],
    }


def choice_data(choice: Choice) -> dict[str, Any]:
    """A choice for a script: kernel, reason, losers."""
    return {
        "kernel": choice.name,
        "reason": choice.reason,
        "rejected": [asdict(loser) for loser in choice.rejected],
    }


@dataclass(frozen=True)
class Part:
    """A plain node that a fused one stands for: the kernel that would be the fastest there, and what it would take."""

    node: str
    kernel: str
    us: float


@dataclass
class _Apart:
    """What the parts of fused nodes would take by themselves: predicted when it is asked for."""

    plan: Plan

    @cached_property
    def _selector(self) -> Selector:
        return Selector(self.plan.policy, Offers(self.plan.registry, self.plan.device), self.plan.banned)

    def parts(self, step: Step, top: int) -> list[Part]:
        """Those of a step in a bucket; none of a plain node, nor of a locked plan, which chooses nothing."""
        if self.plan.locked is not None:
            return []
        nodes = [self.plan.plain[name] for name in self.plan.fused.get(step.node.name, ())]
        return [part for node in nodes for part in self._fastest(node, node.rows_at(top))]

    def predicted(self, step: Step, top: int) -> Prediction:
        """What the fused node itself takes."""
        return self._selector.predict(step.choice.name, step.choice.kernel, step.node, step.node.rows_at(top))

    def kept_from(self, loser: Rejection, step: Step, top: int) -> str:
        """Why `auto` did not take a kernel that is predicted to be faster by itself; "" of a slower one."""
        node, rows = step.node, step.node.rows_at(top)
        kernel = self._selector.offers.of(node, rows).kernels.get(loser.kernel)
        if kernel is None or loser.kind != "outranked":
            return ""
        if self._selector.predict(loser.kernel, kernel, node, rows).us >= self.predicted(step, top).us:
            return ""
        form = packed_form(node, loser.kernel, kernel)
        if form is not None and form not in self.plan.packed_forms:
            return ONCE_MORE
        return "the whole step is predicted to be slower with it, for conversions and storage beside it"

    def _fastest(self, node: TensorNode, rows: int) -> list[Part]:
        found = (
            Part(node.name, name, self._selector.predict(name, kernel, node, rows).us)
            for name, kernel in self._selector.candidates(node, rows)
        )
        return sorted(found, key=lambda part: part.us)[:1]


def _nodes_named(plan: Plan, name: str) -> list[str]:
    """The nodes that are meant by a name, or by that of a row of the table."""
    steps = [step for top in plan.buckets for step in plan.schedule(top, top).steps]
    known = dict.fromkeys(each for step in steps for each in (step.node.name, *plan.fused.get(step.node.name, ())))
    if not (found := members(name, known)):
        raise PlanError(f"no node {name!r}{nearest(name, known).partition(';')[0]}; kernelmux plan lists them")
    return found


def _steps_of(plan: Plan, names: Sequence[str], rows: int | None) -> Iterator[tuple[int, list[Step]]]:
    """In each bucket, or in that of `rows`, the steps of nodes, or of the fused nodes that stand for them."""
    wanted = set(names)
    for top in plan.buckets if rows is None else [plan.bucket(rows)]:
        steps = plan.schedule(top, top).steps
        yield top, [step for step in steps if {step.node.name, *plan.fused.get(step.node.name, ())} & wanted]


def _chosen(step: Step, choice: Choice, top: int, apart: _Apart) -> Told:
    """A step's choice in words, and who lost."""
    return "\n".join(_lines(step, choice, top, apart)), choice.rejected


def _lines(step: Step, choice: Choice, top: int, apart: _Apart) -> Iterator[str]:
    """A step's choice, then a line for its variants, and one for what the parts of a fused node would take."""
    parts = apart.parts(step, top)
    predicted = choice.predicted or (apart.predicted(step, top) if parts else None)
    at = f" at {human_count(step.node.rows_at(top), 'row')}" if top > 1 else ""
    told = f", predicted {human_time(predicted.us)}{at} ({predicted.source})" if predicted else ""
    yield f"{step.node.name} ({step.node.op}) runs {choice.name}: {choice.reason}{told}"
    if choice.variants:
        taken = (f"{each.variant} up to {human_count(each.rows, 'row')} ({each.source})" for each in choice.variants)
        yield f"  variants: {'; '.join(taken)}"
    if parts:
        each = (f"{part.node.rpartition('.')[2]} {human_time(part.us)} ({part.kernel})" for part in parts)
        yield f"  its {len(parts)} parts would take {human_time(sum(part.us for part in parts))}: {', '.join(each)}"


def _told(plan: Plan, step: Step, top: int, apart: _Apart) -> Choice:
    """A choice that says of those who lost, and would be faster by themselves, what keeps them from the node."""
    choice = step.choice
    if plan.locked is not None or choice.predicted is None:
        return choice
    kept = [apart.kept_from(loser, step, top) for loser in choice.rejected]
    losers = tuple(
        replace(loser, reason=f"{loser.reason}; {why}") if why else loser
        for loser, why in zip(choice.rejected, kept, strict=True)
    )
    said = f"{LEAST_TIME} without another packed copy" if ONCE_MORE in kept else LEAST_TIME
    return replace(choice, reason=choice.reason.replace(LEAST_TIME, said, 1), rejected=losers)


def _was_outranked(loser: Rejection) -> bool:
    return loser.kind == "outranked"


def _at_any_count(loser: Rejection) -> Rejection:
    """A refusal without the row count that was one too many: `it takes m ..64` of `it takes m ..64, not 512`."""
    return replace(loser, reason=re.sub(r"(it takes m \S+), not \d+$", r"\1", loser.reason))


def _refused_by_rows(plan: Plan, told: Mapping[Told, Sequence[int]]) -> Iterator[str]:
    """Each refusal once, with the row counts where it holds, unless that is everywhere."""
    tops = sorted({top for held in told.values() for top in held})
    where: dict[Rejection, set[int]] = {}
    for (_, losers), held in told.items():
        for loser in losers:
            if not _was_outranked(loser):
                where.setdefault(_at_any_count(loser), set()).update(held)
    alike: dict[tuple[int, ...], list[Rejection]] = {}
    for loser, rows in where.items():
        alike.setdefault(tuple(sorted(rows)), []).append(loser)
    for held, alike_losers in alike.items():
        yield from _refused(alike_losers, "" if list(held) == tops else f" at {spans(bounds(plan.buckets, held))} rows")


def _refused(losers: Iterable[Rejection], where: str = "") -> Iterator[str]:
    """A line for each reason, with all whom it kept out: first those who could have had the node."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for loser in sorted(losers, key=_was_outranked, reverse=True):
        by_reason.setdefault((loser.reason, loser.kind), []).append(loser.kernel)
    yield from (f"  not {joined(names)}{where}: {reason} [{kind}]" for (reason, kind), names in by_reason.items())


def joined(names: Iterable[str]) -> str:
    """Kernels in a row, a fused op said once: `a:f32, a:f64 of qkv`."""
    by_op: dict[str, list[str]] = {}
    for name in names:
        kernel, _, op = name.partition(" of ")
        by_op.setdefault(op, []).append(kernel)
    return "; ".join(f"{', '.join(kernels)}{op and f' of {op}'}" for op, kernels in by_op.items())


def _considered(plan: Plan, names: Iterable[str]) -> list[Rejection]:
    """The fused candidates that did not take the nodes' place, or that of those which they stand for."""
    plain = dict.fromkeys(each for name in names for each in (name, *plan.fused.get(name, ())))
    return list(dict.fromkeys(loser for each in plain for loser in plan.considered.get(each, ())))

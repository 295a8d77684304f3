"""Tuning as a whole: kernels timed, plans made by these times, held against others, and the best written down.

Enters: a model, a device, row counts, a time budget. Leaves: a policy's text, with what its whole steps take beside all
other ways to run the model, and what was left out. Times go to this machine's tables as they come: an interrupted run
goes on where it ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kernelmux.contract import registry
from kernelmux.contract.device import Device
from kernelmux.errors import KernelmuxError
from kernelmux.graph.graph import Graph, TensorNode
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions
from kernelmux.measure.predict import Prediction, Predictor
from kernelmux.measure.table import Tables, forget, package_of, remember
from kernelmux.measure.works import Batch
from kernelmux.plan.budget import added_error, less_exact
from kernelmux.plan.offers import Offers
from kernelmux.plan.plan import Plan
from kernelmux.plan.selection import Selector
from kernelmux.policy.grammar import AUTO
from kernelmux.policy.policy import parse_policy, policy_text
from kernelmux.run.model import Model
from kernelmux.tune.measuring import Measured, Progress, Smoke, measure
from kernelmux.tune.plans import Contender, Divergence, Named, Steps
from kernelmux.tune.questions import Question, find_questions
from kernelmux.tune.workers import Worker
from kernelmux.tune.written import Section, write_rules

MEASURING, COMPARING = 0.55, 0.85
"""Shares of the time budget at which measuring kernels ends, and comparing plans; the rest is for their error."""
PASSES = 3
"""How often it is asked at most what is not known yet."""
BETTER = 0.98
"""A plan takes the tuned one's place at a row count where it takes no more than this share of its time."""
FAR = 5.0
"""A plan that is predicted to take so many times as long is not run."""
DIVERGED = 256
"""Tokens of text over which a plan's answers are compared with float32's, and"""
DECODED = 64
"""how many of them row by row."""


@dataclass(frozen=True)
class Asked:
    """What to tune for."""

    model: Named
    device: Device
    counts: tuple[int, ...]
    context: int
    seconds: float
    max_error: float | None = None
    variants: bool = False

    @property
    def base(self) -> str:
        """The policy that tuning starts from, as text."""
        budget = f"\n[defaults]\nmax_error = {self.max_error:g}\n" if self.max_error is not None else ""
        return f'extends = "default"\n{budget}'

    @property
    def device_name(self) -> str:
        """As a command line calls the device."""
        return f"{self.device.kind}:{self.device.index}" if self.device.index else self.device.kind


@dataclass(frozen=True)
class Compared:
    """A way to run the model: microseconds of whole steps by rows, or why there are none."""

    label: str
    times: Mapping[int, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Point:
    """What an error budget buys: microseconds of the least and of the most rows, nats a token to float32."""

    label: str
    max_error: float | None
    """None: the default's."""
    times: Mapping[int, float]
    divergence: tuple[float, float] | None
    """Of prompts and of decoding; None where it was not measured."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found."""

    policy: str
    """The rules; who writes the file puts a head before them."""
    plan: Plan
    measured: Measured
    compared: tuple[Compared, ...]
    """The tuned policy first."""
    winners: Mapping[int, str]
    """By rows whose choices the policy has."""
    frontier: tuple[Point, ...]
    """The policy, and what smaller and larger budgets would give, the most exact first."""
    notes: tuple[str, ...]


@dataclass
class Tuning:
    """One run of it."""

    asked: Asked
    model: Model
    smoke: Smoke
    progress: Progress
    _started: float = field(default_factory=time.monotonic)
    _plans: dict[str, Plan] = field(default_factory=dict)

    def run(self, worker: Worker) -> Tuned:
        """Measures, plans, compares."""
        asked = self.asked
        before = Contender("auto before", self._written([Section(asked.counts[-1], self._plan())]))
        measured = self._measure(worker)
        tuned = self._plan()
        ways = [Contender("tuned", self._written([Section(asked.counts[-1], tuned)])), before, *self._backends(tuned)]
        compared = self._compare(ways, worker)
        compared, winners = self._sure(ways, compared, worker)
        text, plan, notes = self._best(ways, tuned, winners)
        if set(winners.values()) - {"tuned"}:
            final = Contender("policy", text)
            again = self._steps(final, worker)
            compared = [Compared("policy", again.times, again.note), *compared]
        frontier = self._frontier(Contender("this policy", text), compared[0].times, worker)
        return Tuned(text, plan, measured, tuple(compared), winners, tuple(frontier), tuple(notes))

    def questions(self) -> list[Question]:
        """What is not known of this machine yet."""
        asked = self.asked
        return find_questions(self._graph, self._new_selector(), asked.counts, Tables(asked.device), asked.context)

    def _measure(self, worker: Worker) -> Measured:
        """Once more by what is known then: what seemed to be far too slow may not be, beside what was measured."""
        until, whole = self._started + MEASURING * self.asked.seconds, Measured(faults=self._on_record())
        for subject, fault in whole.faults.items():
            self.progress.tell(f"{subject} is left out: {fault}")
        for _ in range(PASSES):
            questions = [each for each in self.questions() if each.subject not in whole.faults]
            if not questions:
                break
            found = measure(questions, worker, self._keep, self.smoke, self.progress, self.asked.variants, until)
            faults = {**whole.faults, **found.faults}
            unsteady = whole.unsteady + found.unsteady
            whole = Measured(whole.answered + found.answered, faults, found.left, unsteady)
        return whole

    def forget(self) -> None:
        """Empties this machine's tables of all packages whose kernels may run a node."""
        offers = self._selector.offers
        kernels = (kernel for node in self._graph.ops for kernel in offers.of(node, 1).kernels.values())
        for package in {package_of(kernel) for kernel in kernels}:
            forget(package, self.asked.device)

    def _on_record(self) -> dict[str, str]:
        """The kernels that are left out for what is known of them already."""
        found, offers = {}, self._selector.offers
        fused = (fusion.node for fusion in find_fusions(self._graph, fused_ops()))
        for node in (*self._graph.ops, *fused):
            for name, kernel in offers.of(node, 1).kernels.items():
                if fault := self.smoke.failure(node.op, name, kernel):
                    found[f"{node.op} {name}"] = fault
        return found

    @cached_property
    def _selector(self) -> Selector:
        return self._new_selector()

    def _new_selector(self) -> Selector:
        """One that predicts by what is measured by now."""
        policy = parse_policy(self.asked.base, "tune")
        return Selector(policy, Offers(registry.current(), self.asked.device), context=self.asked.context)

    @cached_property
    def _graph(self) -> Graph:
        return self.model.graph.with_cache_format(self._selector.policy.cache_format(self.asked.device))

    def _keep(self, question: Question, us: float, variant: str, work: str) -> None:
        times = {question.family: {question.size: {str(question.work.m): round(us, 3)}}}
        remember(question.package, self.asked.device, {work: variant} if variant else {}, times)

    def _plan(self, text: str = "") -> Plan:
        """The plan of a policy's text, of none the one that `auto` makes by what is known now."""
        asked = self.asked
        policy = parse_policy(text or asked.base, "tune")
        return self.model.plan(policy, device=asked.device, max_rows=asked.counts[-1], context=asked.context)

    def _written(self, sections: Sequence[Section]) -> str:
        """A policy by which plans get just these choices."""
        selector = self._new_selector()

        def told(node: TensorNode, rows: int) -> Mapping[str, Prediction]:
            offer, rule = selector.offers.of(node, rows), selector.match(node, rows)
            return {
                name: selector.predict(name, kernel, node, rows)
                for name, kernel in offer.kernels.items()
                if selector.refusal(name, node, rule, offer, AUTO) is None
            }

        return self.asked.base + write_rules(self._graph, sections, told, self.asked.counts) + "\n"

    def _backends(self, tuned: Plan) -> Iterator[Contender]:
        """Each backend by itself, as `--use` would ask for it; what it lacks is as without it."""
        for name in registry.current().working:
            way = Contender(name, self.asked.base, (f"*={name}",))
            try:
                plan = way.plan(self.model, self.asked.device, self.asked.counts[-1])
            except KernelmuxError as error:
                self.progress.tell(f"{name} alone has no plan: {error}")
                continue
            if not any(step.choice.backend == name for step in plan.steps):
                continue
            slower = min(self._predicted(plan, rows) / self._predicted(tuned, rows) for rows in self.asked.counts)
            if slower > FAR:
                self.progress.tell(f"{name} alone is predicted to take {slower:.0f} times as long: it is not run")
                continue
            yield way

    def _predicted(self, plan: Plan, rows: int) -> float:
        predictor = Predictor(self.asked.device, Tables(self.asked.device), self.asked.context)
        steps = plan.schedule(rows, Batch.of(rows, 1).sequences).steps
        return sum(predictor.of(step.choice.kernel, step.node, step.node.rows_at(rows)).us for step in steps)

    def _compare(self, ways: Sequence[Contender], worker: Worker) -> list[Compared]:
        """The steps of each, the tuned plan in any case, others while there is time."""
        self.progress.begin(len(ways), "whole plans")
        compared = []
        for done, way in enumerate(ways):
            self.progress.advance(done, way.label)
            if done and time.monotonic() > self._started + COMPARING * self.asked.seconds:
                compared.append(Compared(way.label, note="there was no time left"))
                continue
            compared.append(self._steps(way, worker))
        self.progress.advance(len(ways), "")
        return compared

    def _sure(
        self, ways: Sequence[Contender], compared: list[Compared], worker: Worker
    ) -> tuple[list[Compared], Mapping[int, str]]:
        """Where another plan seems to be faster both run once more, one after the other: it must be so twice."""
        winners = self._winners(ways, compared)
        again = {"tuned", *winners.values()}
        if again == {"tuned"}:
            return compared, winners
        if time.monotonic() > self._started + self.asked.seconds:
            self.progress.tell("what seems to be faster than the tuned plan was not run again: there was no time left")
            return compared, dict.fromkeys(winners, "tuned")
        self.progress.begin(len(again), "whole plans, once more")
        for index, way in enumerate(ways):
            if way.label in again:
                self.progress.advance(len(again), way.label)
                compared[index] = self._steps(way, worker)
        second = self._winners(ways, compared)
        return compared, {rows: best if second[rows] == best else "tuned" for rows, best in winners.items()}

    def _steps(self, way: Contender, worker: Worker, counts: tuple[int, ...] = ()) -> Compared:
        answer = worker.ask(Steps(self.asked.model, way, counts or self.asked.counts, self.asked.context))
        if answer.fault:
            self.progress.tell(f"{way.label} was not timed: {answer.fault}")
            return Compared(way.label, note=answer.fault)
        return Compared(way.label, answer.value)

    def _winners(self, ways: Sequence[Contender], compared: Sequence[Compared]) -> Mapping[int, str]:
        """By rows the fastest; the tuned plan unless another is faster by more than noise, and as exact."""
        winners = {}
        for rows in self.asked.counts:
            rough = {way.label for way in ways if self._is_rough(way, rows)}
            times = {each.label: each.times[rows] for each in compared if rows in each.times}
            times = {label: us for label, us in times.items() if label == "tuned" or label not in rough}
            best = min(times, key=times.__getitem__, default="tuned")
            own = times.get("tuned")
            winners[rows] = best if own is None or times.get(best, own) <= BETTER * own else "tuned"
        return winners

    def _is_rough(self, way: Contender, rows: int) -> bool:
        """Whether a backend by itself takes kernels, or rounds logits, as the default does not."""
        if not way.use:
            return False
        return bool(less_exact(self._plan_of(way), rows, Batch.of(rows, 1).sequences))

    def _plan_of(self, way: Contender) -> Plan:
        """The plan that a way to run the model has, made once."""
        if way.label not in self._plans:
            self._plans[way.label] = way.plan(self.model, self.asked.device, self.asked.counts[-1])
        return self._plans[way.label]

    def _best(
        self, ways: Sequence[Contender], tuned: Plan, winners: Mapping[int, str]
    ) -> tuple[str, Plan, Sequence[str]]:
        """The policy of the winners, its plan, and where this does not choose as they did."""
        plans = {way.label: self._plan_of(way) for way in ways}
        plans["tuned"] = tuned
        sections: list[Section] = []
        for index, rows in enumerate(self.asked.counts):
            above = self.asked.counts[index + 1 :]
            high = math.isqrt(rows * above[0]) if above else rows
            if sections and sections[-1].plan is plans[winners[rows]]:
                sections.pop()
            sections.append(Section(high, plans[winners[rows]]))
        text = self._written(sections)
        plan = self._plan(text)
        notes = []
        for rows in self.asked.counts:
            if moved := _moved(plans[winners[rows]], plan, rows):
                notes.append(f"at {rows} rows {len(moved)} nodes are not as they were timed, first {moved[0]}")
        return text, plan, notes

    def _frontier(self, ours: Contender, times: Mapping[int, float], worker: Worker) -> Iterator[Point]:
        """float32, the policy, and the budgets that would let in kernels which are left out for their error."""
        asked, ends = self.asked, (self.asked.counts[0], self.asked.counts[-1])
        exact = Contender("float32", policy_text("exact"))
        looser = [
            (Contender(f"max_error {error:g}", f'extends = "default"\n[defaults]\nmax_error = {error:g}\n'), error)
            for error in self._errors_left_out()
        ]
        ways = [(exact, 0.0), (ours, asked.max_error), *looser]
        self.progress.begin(len(ways), "speed and error")
        for done, (way, budget) in enumerate(ways):
            self.progress.advance(done, way.label)
            if way is not ours and time.monotonic() > self._started + asked.seconds:
                self.progress.tell(f"{way.label} was not run: there was no time left")
                continue
            steps = times if way is ours else self._steps(way, worker, ends).times
            if steps:
                nats = (0.0, 0.0) if way is exact else self._divergence(way, exact, worker)
                yield Point(way.label, budget, {rows: steps[rows] for rows in ends if rows in steps}, nats)
        self.progress.advance(len(ways), "")

    def _errors_left_out(self) -> list[float]:
        """The least and the largest error of kernels that only the budget keeps from multiplying weights."""
        errors = set()
        for node in self._graph.ops:
            if node.op == "mul_mat":
                offer, rule = self._selector.offers.of(node, 1), self._selector.match(node, 1)
                for name, kernel in offer.kernels.items():
                    refusal = self._selector.refusal(name, node, rule, offer, AUTO)
                    if refusal is not None and refusal.kind == "over budget":
                        errors.add(added_error(kernel, node))
        return sorted({min(errors), max(errors)}) if errors else []

    def _divergence(self, way: Contender, exact: Contender, worker: Worker) -> tuple[float, float] | None:
        """How far a plan is from float32, where that can be run."""
        answer = worker.ask(Divergence(self.asked.model, way, exact, DIVERGED, DECODED))
        if answer.fault:
            self.progress.tell(f"the divergence of {way.label} from float32 was not measured: {answer.fault}")
            return None
        whole, decoding = answer.value
        return whole, decoding


def _moved(one: Plan, other: Plan, rows: int) -> list[str]:
    """The nodes that two plans run otherwise at a row count."""
    kernels = [{step.node.name: step.choice.name for step in plan.schedule(rows, rows).steps} for plan in (one, other)]
    return [name for name in dict.fromkeys((*kernels[0], *kernels[1])) if kernels[0].get(name) != kernels[1].get(name)]

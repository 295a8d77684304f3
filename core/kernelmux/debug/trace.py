"""Where a step's time goes, node by node, and how much of it better kernels could gain.

Enters: a model, a plan, a load. Leaves: a StepTrace of the prompt and one of decoding. Each node's time is its mean
over the usual ones of steps that are made launch by launch; beside their sum stands the step as it is run, measured in
turns with them.
What a node takes at least are its bytes and products at the machine's ceilings, which are measured, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from kernelmux.contract.device import Ceilings
from kernelmux.debug.times import Span, Times, times_of
from kernelmux.errors import KernelmuxError
from kernelmux.measure.ceilings import measure_ceilings
from kernelmux.measure.predict import human_time, least_of, moved_bytes
from kernelmux.measure.timing import Timing
from kernelmux.measure.works import Batch, Work
from kernelmux.plan.plan import Plan
from kernelmux.run.bench import prepared_session, random_ids, time_prompt
from kernelmux.run.capture import captured_rows
from kernelmux.run.model import Model
from kernelmux.run.pages import CachedSequence
from kernelmux.run.progress import Progress
from kernelmux.run.session import Session
from kernelmux.run.walk import Walk

PROMPTS = 5
"""Times that the prompt is read launch by launch, and as it is run."""
TURNS = 8
"""Turns that decoding steps are taken in: some launch by launch, some as they are run."""
By = Literal["op", "layer", "kernel"]


@dataclass(frozen=True)
class NodeTime:
    """One node of a step; microseconds are means over the middle half of walks."""

    node: str
    op: str
    layer: int | None
    kernel: str
    variant: str
    rows: int
    us: float
    gap: float | None
    """From its end to the next launch; None of a device's launches, which are in line before it comes to them."""
    nbytes: int
    flops: int
    reading: float
    """Microseconds that its bytes take at the ceiling."""
    multiplying: float
    """Microseconds that its products take at the ceiling."""
    bound: str
    """Which of the two is the longer: `reading`, or `bf16 arithmetic`."""

    @property
    def least(self) -> float:
        """Microseconds at the ceilings."""
        return max(self.reading, self.multiplying)

    @property
    def gain(self) -> float:
        """Microseconds that a better kernel saves at most."""
        return max(self.us - self.least, 0.0)


@dataclass(frozen=True)
class Group:
    """Nodes of one op, one layer or one kernel."""

    name: str
    count: int
    us: float
    share: float
    """Of the step."""
    ceiling: float
    """What they take at the ceilings, as a share of what they take; beyond 1 where a cache holds what they read."""
    bound: str
    gain: float
    """What better kernels save at most, as a share of the step."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.share:.1%} of the step, {self.ceiling:.0%} of {self.bound}; better kernels gain at "
            f"most {self.gain:.1%} of the step"
        )


@dataclass(frozen=True)
class StepTrace:
    """One kind of step, node by node in the order of the walk."""

    work: str
    tokens: int
    captured: bool
    """Whether the step as it is run is one replay."""
    step: Timing
    """Microseconds of the step as it is run."""
    nodes: tuple[NodeTime, ...]

    @property
    def us(self) -> float:
        """Microseconds of all nodes."""
        return sum(node.us for node in self.nodes)

    @property
    def between(self) -> float | None:
        """Microseconds between the launches; None of a replay.

        Of a step that Python launches on a device they are the rest of it: what the device waits for.
        """
        gaps = [node.gap for node in self.nodes if node.gap is not None]
        if gaps:
            return sum(gaps)
        return None if self.captured else max(self.step.median - self.us, 0.0)

    def groups(self, by: By) -> list[Group]:
        """The nodes by op, layer or kernel: those that take the longest first, layers in their order."""
        found: dict[Any, list[NodeTime]] = {}
        for node in self.nodes:
            found.setdefault(getattr(node, by), []).append(node)
        groups = [self._group("none" if name is None else str(name), nodes) for name, nodes in found.items()]
        return groups if by == "layer" else sorted(groups, key=lambda group: -group.us)

    def _group(self, name: str, nodes: Sequence[NodeTime]) -> Group:
        us, step = sum(node.us for node in nodes), self.step.median
        longest = max(nodes, key=lambda node: node.least)
        gain = sum(node.gain for node in nodes)
        ceiling = sum(node.least for node in nodes) / us if us else 0.0
        return Group(name, len(nodes), us, us / step, ceiling, longest.bound, gain / step)

    def __str__(self) -> str:
        low, high = (human_time(each) for each in (self.step.p10, self.step.p90))
        gaps = "" if self.between is None else f", between launches {human_time(self.between)}"
        return (
            f"{self.work}: {human_time(self.step.median)} a step ({low} to {high}); its {len(self.nodes)} nodes one by "
            f"one take {human_time(self.us)}, {self.us / self.step.median:.0%} of it{gaps}"
        )


@dataclass(frozen=True)
class Trace:
    """What was traced, on which machine."""

    model: str
    device: str
    policy: str
    fingerprint: str
    ceilings: Ceilings
    steps: tuple[StepTrace, ...]

    def told(self) -> Mapping[str, Any]:
        """All of it, and the groups, for JSON."""
        steps = [
            {
                **asdict(step),
                "us": step.us,
                "between": step.between,
                **{f"by_{by}": [asdict(group) for group in step.groups(by)] for by in ("op", "layer", "kernel")},
            }
            for step in self.steps
        ]
        return {**vars(self), "ceilings": asdict(self.ceilings), "steps": steps}


def trace_model(
    model: Model,
    plan: Plan,
    prompt: int,
    decode: int,
    batch: int,
    tell: Callable[[Progress], object] = lambda progress: None,
) -> Trace:
    """Traces a prompt of so many tokens, in one step, then `decode` steps of `batch` sequences that are as long.

    KernelmuxError where the plan takes fewer rows, or the model fewer tokens.
    """
    context = model.source.shape.context
    if prompt + decode > context:
        raise KernelmuxError(f"{prompt} tokens of a prompt and {decode} more were asked for, the model holds {context}")
    plan.bucket(max(prompt, batch))
    session = prepared_session(model, plan, batch * (prompt + decode), batch, tell)
    tell(Progress("measuring the ceilings", 0, 1))
    measured, stated = measure_ceilings(plan.device), plan.device.platform.ceilings(plan.device)
    ceilings = replace(stated, copy=measured.copy, read=measured.read, gemm={**stated.gemm, **measured.gemm})
    steps = (
        _trace_prompt(model, session, prompt, ceilings, tell),
        _trace_decoding(model, session, prompt, decode, batch, ceilings, tell),
    )
    return Trace(
        model.graph.name, plan.device.device_class, plan.policy.source, session.plan.fingerprint, ceilings, steps
    )


def _trace_prompt(
    model: Model, session: Session, prompt: int, ceilings: Ceilings, tell: Callable[[Progress], object]
) -> StepTrace:
    wait = partial(session.plan.device.platform.synchronize, session.plan.device)
    times, whole, ids = times_of(session), [], random_ids(model, prompt, 0)
    time_prompt(session, ids, wait)
    for count in range(PROMPTS):
        tell(Progress("tracing the prompt", count, PROMPTS))
        with session.watched(times):
            time_prompt(session, ids, wait)
        whole.append(time_prompt(session, ids, wait))
    rows = _walked(times).steps[0].node.rows
    nodes = _nodes(session, times, Batch(1, rows, rows), 1, ceilings, times.cost)
    return StepTrace(f"prompt of {prompt}", prompt, False, Timing.of(whole), nodes)


def _trace_decoding(
    model: Model,
    session: Session,
    prompt: int,
    decode: int,
    batch: int,
    ceilings: Ceilings,
    tell: Callable[[Progress], object],
) -> StepTrace:
    times, whole = times_of(session), list[float]()
    sequences = [session.open() for _ in range(batch)]
    for index, sequence in enumerate(sequences):
        session.feed(sequence, random_ids(model, prompt, index))
    turns = min(TURNS, decode)
    _step_times(session, sequences, 1)
    for count in range(turns):
        tell(Progress("tracing decoding", count, turns))
        with session.watched(times):
            _step_times(session, sequences, decode // turns)
        whole += _step_times(session, sequences, decode // turns)
    rows = _walked(times).steps[0].node.rows
    captured, step = captured_rows(session.plan, batch) is not None, Timing.of(whole)
    cost = cost_of_event(_usual(times.walks), step.median, times.cost) if captured else times.cost
    nodes = _nodes(session, times, Batch(batch, 1, prompt + 1), rows, ceilings, cost)
    return StepTrace(f"decode at {batch} x {prompt}", batch, captured, step, nodes)


def cost_of_event(walks: Sequence[Sequence[Span]], step: float, measured: float) -> float:
    """Microseconds that an event adds to each launch: with them walks are as long as the replay, which has none.

    Half to twice what was `measured` on another launch: where that does not explain it, the nodes' sum shows it.
    """
    walk = statistics.fmean(sum(span.us for span in spans) for spans in walks)
    return min(max((walk - step) / len(walks[0]), measured / 2), 2 * measured)


def _step_times(session: Session, sequences: Sequence[CachedSequence], steps: int) -> list[float]:
    """Microseconds of each of so many steps but the first, if there are more; the sequences are as long afterwards."""
    lengths = [sequence.length for sequence in sequences]
    marks = [time.perf_counter()]
    for _ in session.decode(sequences, [0] * len(sequences), steps):
        marks.append(time.perf_counter())
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.length = length
    samples = [(end - began) * 1e6 for began, end in pairwise(marks)]
    return samples[1:] or samples


def _walked(times: Times) -> Walk:
    assert times.walk is not None, "no walk was seen"
    return times.walk


def _nodes(
    session: Session, times: Times, batch: Batch, outs: int, ceilings: Ceilings, cost: float
) -> tuple[NodeTime, ...]:
    """Each node of the walk that was timed, its work as `batch` has it, less what looking at it has cost."""
    walk = _walked(times)
    rows = walk.steps[0].node.rows
    dims = {**batch.dims, "m": rows, "outs": outs}
    schedule = session.plan.schedule(rows, outs)
    usual, found = _usual(times.walks), []
    for index, step in enumerate(walk.steps):
        kernel, spans = step.choice.kernel_at(step.node), [spans[index] for spans in usual]
        node = schedule.steps[index].node.resolve(dims)
        work = Work("", node, batch)
        least = least_of(kernel, work, node, ceilings)
        found.append(
            NodeTime(
                node=node.name,
                op=node.op,
                layer=node.layer,
                kernel=step.choice.name,
                variant="" if kernel.variant is None else str(kernel.variant),
                rows=step.node.rows,
                us=max(statistics.fmean(span.us for span in spans) - cost, 0.0),
                gap=_gap(spans),
                nbytes=moved_bytes(kernel, work, node),
                flops=work.flops,
                reading=least.reading,
                multiplying=least.multiplying,
                bound=least.bound,
            )
        )
    return tuple(found)


def _gap(spans: Sequence[Span]) -> float | None:
    gaps = [span.gap for span in spans if span.gap is not None]
    return statistics.fmean(gaps) if gaps else None


def _usual(walks: Sequence[Sequence[Span]]) -> Sequence[Sequence[Span]]:
    """The middle half of walks by what they took: means of these add up, which medians of nodes do not."""
    ordered = sorted(walks, key=lambda spans: sum(span.us for span in spans))
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]

"""What a plan's steps are predicted to take, call by call, and what bounds them.

Enters: a Plan. Leaves: a Speed for a row count, and the calls that it is the sum of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernelmux.measure.predict import Prediction, Predictor
from kernelmux.measure.steps import is_captured, step_time
from kernelmux.measure.table import Tables
from kernelmux.measure.works import Batch
from kernelmux.plan.offers import Offers

if TYPE_CHECKING:
    from kernelmux.contract.kernel import Kernel
    from kernelmux.graph.graph import TensorNode
    from kernelmux.plan.choice import Choice
    from kernelmux.plan.plan import Plan

LAUNCHING = "launching"


@dataclass(frozen=True)
class Speed:
    """What a step is predicted to take: one that decodes, or that reads a prompt."""

    rows: int
    context: int
    """Cached tokens of each sequence that decodes."""
    us: float
    tokens_per_second: float
    bounds: Mapping[str, float]
    """Shares of the time by what bounds it, largest first: `reading weights`, `launching`, `bf16 arithmetic`."""
    kernels: Mapping[str, Mapping[str, int]]
    """How many nodes of each op each kernel got, both by time, longest first."""
    shares: Mapping[str, float]
    """Of the time, by op."""
    candidates: int
    """How many kernels could have the node that takes the longest, its own among them."""
    unmeasured: float
    """Share of the time that no table has of such a device: as kernels declare, or of another card."""


@dataclass(frozen=True)
class Call:
    """Alike steps of a schedule: one of them, how many there are, and what one of them takes."""

    node: TensorNode
    rows: int
    choice: Choice
    count: int
    prediction: Prediction

    @property
    def us(self) -> float:
        """Of all of them."""
        return self.count * self.prediction.us

    @property
    def measured(self) -> bool:
        """Whether the time is known of such a device."""
        return not (self.prediction.declared or self.prediction.elsewhere)


@dataclass
class Speeds:
    """Predicts for one plan."""

    plan: Plan
    offers: Offers = field(init=False)
    predictor: Predictor = field(init=False)
    _calls: dict[int, Sequence[Call]] = field(default_factory=dict)
    _speeds: dict[int, Speed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offers = Offers(self.plan.registry, self.plan.device)
        self.predictor = Predictor(self.plan.device, Tables(self.plan.device), self.plan.context)

    def calls(self, rows: int) -> Sequence[Call]:
        """Of a step of so many token rows, the last of each sequence with logits; those that take the longest first."""
        if rows not in self._calls:
            self._calls[rows] = sorted(self._predicted(rows), key=lambda call: -call.us)
        return self._calls[rows]

    def _predicted(self, rows: int) -> list[Call]:
        alike: dict[tuple[int, str], list[tuple[TensorNode, Choice]]] = {}
        outs = _outs(rows)
        for step in self.plan.schedule(rows, outs).steps:
            alike.setdefault((self.offers.kind(step.node), step.choice.name), []).append((step.node, step.choice))
        calls = []
        for steps in alike.values():
            node, choice = steps[0]
            own = node.rows_in({"m": rows, "outs": outs})
            calls.append(Call(node, own, choice, len(steps), self.predictor.in_step(choice.kernel, node, own)))
        return calls

    def at(self, rows: int) -> Speed:
        """Of a step of so many token rows: sequences that decode, or one prompt."""
        if rows not in self._speeds:
            self._speeds[rows] = self._summed(rows)
        return self._speeds[rows]

    def _summed(self, rows: int) -> Speed:
        calls = self.calls(rows)
        if not calls:
            return Speed(rows, self.predictor.context, 0.0, 0.0, {}, {}, {}, 0, 0.0)
        bounds = self._bounds(rows)
        us = sum(bounds.values())
        kernels: dict[str, dict[str, int]] = {}
        shares: dict[str, float] = defaultdict(float)
        for call in calls:
            counts = kernels.setdefault(call.node.op, {})
            counts[call.choice.name] = counts.get(call.choice.name, 0) + call.count
            shares[call.node.op] += call.us / us
        by_time = sorted(shares, key=lambda op: -shares[op])
        return Speed(
            rows=rows,
            context=self.predictor.context,
            us=us,
            tokens_per_second=1e6 * rows / us,
            bounds={what: part / us for what, part in sorted(bounds.items(), key=lambda item: -item[1])},
            kernels={op: kernels[op] for op in by_time},
            shares={op: shares[op] for op in by_time},
            candidates=1 + len(losers(calls[0].choice)),
            unmeasured=sum(call.us for call in calls if not call.measured) / us,
        )

    def _bounds(self, rows: int) -> Mapping[str, float]:
        """Microseconds by what bounds them."""
        bounds: dict[str, float] = defaultdict(float)
        for call in self.calls(rows):
            kernel = call.choice.kernel
            least = self.predictor.least(kernel, call.node, call.rows)
            launching = min(call.us, call.count * least.launching)
            bounds[LAUNCHING] += launching
            what = least.bound
            if call.node.op == "attention":
                what = "attention"
            elif what == "reading":
                what = "reading weights" if call.node.weight else "activations"
            bounds[what] += call.us - launching
        us = sum(bounds.values())
        bounds[LAUNCHING] += self._with_host(rows, us) - us
        return bounds

    def _with_host(self, rows: int, us: float) -> float:
        """Microseconds of a step whose calls take `us`: where the host cannot keep up, the device waits for it."""
        schedule, device = self.plan.schedule(rows, _outs(rows)), self.plan.device
        captured = is_captured(device, rows, not schedule.not_capturable)
        return step_time(us, schedule.launches, captured, self.predictor.ceilings)

    def at_best(self, rows: int) -> float:
        """Microseconds of the step were every node with the best of its candidates, and that at the ceilings."""
        calls = self.calls(rows)
        return self._with_host(rows, sum(call.count * min(call.prediction.us, self._best(call)) for call in calls))

    def _best(self, call: Call) -> float:
        return min(self.predictor.least(kernel, call.node, call.rows).us for kernel in self._candidates(call))

    def _candidates(self, call: Call) -> list[Kernel]:
        offered = self.offers.of(call.node, call.rows).kernels
        return [call.choice.kernel, *(offered[name] for name in losers(call.choice) if name in offered)]


def _outs(rows: int) -> int:
    """How many of a step's rows give logits: one of each sequence."""
    return Batch.of(rows, 1).sequences


def losers(choice: Choice) -> list[str]:
    """The kernels that could have a node as well, but for the order or the times; not those of a fused one's parts."""
    return [loser.kernel for loser in choice.rejected if loser.kind == "outranked" and " of " not in loser.kernel]

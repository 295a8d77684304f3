"""Whole plans held against each other: how long their steps take, how far their answers are from float32's.

Enters: a model by name, policies as text. Leaves: tasks for a worker, and what their answers say. A plan is made in the
worker as its user would make it, from the policy's text alone.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kernelmux.contract.device import Device
from kernelmux.plan.plan import Plan
from kernelmux.policy.policy import parse_policy
from kernelmux.run.bench import time_step
from kernelmux.run.divergence import divergence, prose
from kernelmux.run.model import Model, load, load_random
from kernelmux.tune.worker import Bench, Tell


@dataclass(frozen=True)
class Named:
    """A model by what a command line calls it: a file, or a shape with random weights."""

    name: str
    random: bool
    longest: int = 0
    """Tokens that it is to hold, as `load` has it."""

    def open(self, device: Device) -> Model:
        """The model; random weights are drawn on the device."""
        if self.random:
            return load_random(self.name, device.torch, self.longest)
        return load(self.name, self.longest)


@dataclass(frozen=True)
class Contender:
    """A way to run a model that others are held against: a policy's text, outranked by `--use` options."""

    label: str
    policy: str
    use: tuple[str, ...] = ()

    def plan(self, model: Model, device: Device, max_rows: int) -> Plan:
        """Its plan; PlanError where it has none."""
        return model.plan(parse_policy(self.policy, self.label), use=self.use, device=device, max_rows=max_rows)


@dataclass(frozen=True)
class Steps:
    """Times whole steps of a contender at several row counts: microseconds by rows."""

    model: Named
    contender: Contender
    counts: tuple[int, ...]
    context: int

    def run(self, bench: Bench, tell: Tell) -> Mapping[int, float]:
        """Weights that are packed for one contender are there for the next, where there is room for both."""
        tell("planning")
        model = _opened(self.model, bench)
        plan = self.contender.plan(model, bench.device, max(self.counts))
        free = bench.device.platform.free_bytes(bench.device)
        if free is not None and plan.packed_bytes > 0.8 * free:
            bench.held = None
            gc.collect()
        tell("packing")
        holder = model.session(plan, 1)
        for _ in holder.prepare(()):
            tell("packing")
        bench.held = holder
        found = {}
        for rows in self.counts:
            tell("stepping")
            found[rows] = time_step(model, plan, rows, self.context).median
        return found


@dataclass(frozen=True)
class Divergence:
    """Measures how far a contender is from another, more exact one: nats a token, of prompts and of decoding."""

    model: Named
    contender: Contender
    exact: Contender
    tokens: int
    decoded: int

    def run(self, bench: Bench, tell: Tell) -> tuple[float, float]:
        """Over so many tokens of text, and the first of them row by row."""
        tell("planning")
        model = _opened(self.model, bench)
        ids = text_ids(model, self.tokens)
        plan, exact = (way.plan(model, bench.device, len(ids)) for way in (self.contender, self.exact))
        tell("packing")
        whole = divergence(model, plan, exact, ids)
        return whole, divergence(model, plan, exact, ids[: self.decoded], rows=1)


def text_ids(model: Model, count: int) -> Sequence[int]:
    """So many tokens of text, or as many as the model holds."""
    return model.encode(prose())[: min(count, model.source.shape.context)]


def _opened(named: Named, bench: Bench) -> Model:
    """The model as the last task left it, with the weights that it has packed."""
    if bench.model is None or bench.model[0] != named:
        bench.model = None
        gc.collect()
        bench.model = named, named.open(bench.device)
    opened: Model = bench.model[1]
    return opened

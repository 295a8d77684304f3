"""One case on one kernel: planned and walked like any model, then measured against the op's float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernelmux.conformance.draw import Drawn, draw_case
from kernelmux.device import find_device
from kernelmux.errors import PlanError
from kernelmux.formats import as_planes, as_tuple, dequantize_planes, lookup
from kernelmux.memory import PackedWeights
from kernelmux.ops import Case, Operands
from kernelmux.plan import Plan, make_plan
from kernelmux.policy import parse_policy
from kernelmux.registry import Registry
from kernelmux.walker import Walker


@dataclass(frozen=True)
class CaseResult:
    """The worst output's error (NMSE) and the bound: the kernel's own, and what the output's format must round away."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Refused:
    """The kernel declined the case."""

    reason: str


def run_case(case: Case, kernel: str, registry: Registry, device: str = "cpu") -> CaseResult | Refused:
    """Runs a case on a kernel, `backend:kernel`, conversions around it by any installed backend."""
    drawn = draw_case(case)
    rule = f'[[rule]]\nop = "{case.op}"\nuse = ["{kernel}"]\non_unsupported = "error"\n'
    try:
        plan = make_plan(drawn.graph, parse_policy(rule, "conformance"), registry, find_device(device))
    except PlanError as error:
        return Refused(str(error))
    results = _walk(plan, drawn)
    expected = _expect(plan, drawn)
    errors = [nmse(found, wanted) for found, wanted in zip(results, expected, strict=True)]
    (step,) = (step for step in plan.schedule(1, 1).steps if step.choice.name == kernel)
    handed_back = (plan.graph.values[name] for name in plan.graph.outputs)
    emitted = max(lookup(value.format).rounding for value in (*step.node.outputs, *handed_back))
    given = {value.name: value.format for value in case.inputs}
    # An input that had to be converted was rounded before the kernel saw it.
    read = max((lookup(v.format).rounding for v in step.node.inputs if given.get(v.name) != v.format), default=0.0)
    return CaseResult(max(errors), step.choice.kernel.precision + emitted + read)


def _walk(plan: Plan, drawn: Drawn) -> list[torch.Tensor]:
    """The node's outputs, dense. What they held before is poison, so that an element left unwritten is seen."""
    leaves = {name: tuple(plane.clone() for plane in planes) for name, planes in drawn.inputs.items()}
    walker = Walker(plan, PackedWeights(drawn.weights, plan.device), {k: as_planes(v) for k, v in leaves.items()})
    walk = walker.bind(m=1)
    updated = {node.outputs[target].name for node in plan.graph.ops for _, target in node.contract.updates}
    for name, planes in walk.outputs.items():
        for plane in as_tuple(planes) if name not in updated else ():
            plane.view(torch.uint8).fill_(0xFF)
    walk()
    formats = {name: plan.graph.values[name].format for name in walk.outputs}
    return [dequantize_planes(formats[name], as_tuple(planes)).clone() for name, planes in walk.outputs.items()]


def _expect(plan: Plan, drawn: Drawn) -> tuple[torch.Tensor, ...]:
    (node,) = plan.graph.ops
    inputs = tuple(
        planes[0] if value.format == "i32" else dequantize_planes(value.format, planes, torch.float64)
        for value, planes in zip(node.inputs, drawn.inputs.values(), strict=True)
    )
    weight, bias, gamma = (
        tuple(drawn.weights[value.name].dequantize(torch.float64) for value in values)
        for values in (node.weight, node.bias, node.gamma)
    )
    return node.contract.reference(node, Operands(inputs, weight, bias, gamma))


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error over squared reference; infinite where `found` is not finite, absolute of a zero reference."""
    found, wanted = found.double(), wanted.double()
    if not bool(found.isfinite().all()):
        return float("inf")
    squared = float(wanted.square().sum())
    error = float((found - wanted).square().sum())
    return error / squared if squared else error

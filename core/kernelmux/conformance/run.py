"""One case on one kernel: bound to guarded, poisoned memory, launched, and held against the op's float64 reference.

Enters: a Case and a kernel's name. Leaves: an Outcome that names every check that failed. The kernel is bound as a walk
would bind it, so that what passes here runs in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernelmux.conformance import checks
from kernelmux.conformance.draw import draw_case
from kernelmux.conformance.guarded import POISONS
from kernelmux.conformance.measure import compare
from kernelmux.conformance.outcome import Outcome
from kernelmux.conformance.trial import Trial, one_row_node
from kernelmux.device import Device, find_device
from kernelmux.errors import KernelmuxError
from kernelmux.formats import Value, dequantize_planes, lookup
from kernelmux.graph import TensorNode
from kernelmux.hookspecs import Declined, Kernel
from kernelmux.ops import Case
from kernelmux.registry import Registry


@dataclass(frozen=True)
class Variant:
    """A case with one value stored otherwise than usual: `inputs` or `outputs`, which, and the format."""

    side: str
    index: int
    format: str


def run_case(
    case: Case, kernel: str, registry: Registry, device: str = "cpu", variant: Variant | None = None, peer: str = ""
) -> Outcome:
    """Runs every check of a case on a kernel, `backend:kernel`.

    A kernel that misses its bound passes all the same where `peer`, another kernel, is no closer to float64.
    """
    drawn = draw_case(case)
    (node,) = drawn.graph.ops
    name = case.name if variant is None else f"{case.name}@{variant.side}{variant.index}={variant.format}"
    weight_format = "+".join(dict.fromkeys(value.format for value in node.weight))
    blank = Outcome(name, case.op, kernel, weight_format, "refused")
    found = _ask(node, kernel, registry, find_device(device))
    if isinstance(found, Declined):
        return replace(blank, reason=found.reason)
    try:
        weights = [drawn.weights[value.name] for value in node.weights]
        trial = Trial(drawn.planes, weights, _store(node, found, variant), found, find_device(device))
        outcome = _check(trial, replace(blank, status="pass"))
        if not outcome.failures:
            outcome = replace(outcome, batch_invariant=_is_batch_invariant(trial, kernel, registry))
    except KernelmuxError as error:
        return replace(blank, status="fail", failures=(f"raises: {error}",))
    except Exception as error:
        return replace(blank, status="fail", failures=(f"raises: {type(error).__name__}: {error}",))
    if peer and any(failure.startswith("error:") for failure in outcome.failures):
        theirs = run_case(case, peer, registry, device, variant)
        if theirs.error is not None and outcome.error is not None and outcome.error <= theirs.error:
            outcome = replace(outcome, failures=tuple(f for f in outcome.failures if not f.startswith("error:")))
    return replace(outcome, status="fail") if outcome.failures else outcome


def _ask(node: TensorNode, name: str, registry: Registry, device: Device) -> Kernel | Declined:
    offer = registry.ask(node.op, {"node": node, "device": device, **node.contract.arguments(node)})
    backend = name.partition(":")[0]
    if name in offer.kernels:
        return offer.kernels[name]
    nothing = Declined(f"{backend} does not offer {name} for this case")
    return offer.declined.get(name) or offer.declined.get(backend) or nothing


def _store(node: TensorNode, kernel: Kernel, variant: Variant | None) -> TensorNode:
    """The node with its values in formats that the kernel declares: the case's own where it can."""

    def stored(side: str, values: Sequence[Value], declared: Sequence[Sequence[str]]) -> tuple[Value, ...]:
        chosen = []
        for index, (value, formats) in enumerate(zip(values, declared, strict=True)):
            asked = variant is not None and (variant.side, variant.index) == (side, index)
            usual = value.format if value.format in formats else formats[0]
            chosen.append(replace(value, format=variant.format if variant and asked else usual))
        return tuple(chosen)

    inputs = stored("inputs", node.inputs, kernel.inputs(node))
    return replace(node, inputs=inputs, outputs=stored("outputs", node.outputs, kernel.outputs(node)))


def _check(trial: Trial, outcome: Outcome) -> Outcome:
    """The outcome with every check made, the error first."""
    call = trial.bind(trial.outputs)
    first = trial.launch(call, POISONS[0])
    outcome = _measure(trial, outcome)
    checks.written(trial, call, first)
    checks.guards(trial)
    checks.inputs_unchanged(trial)
    checks.untouched_cache(trial)
    checks.sums(trial)
    checks.in_place(trial)
    if trial.device.kind == "cuda" and trial.kernel.capturable:
        checks.captured(trial, call, first)
    return replace(outcome, failures=(*outcome.failures, *trial.failures))


def _is_batch_invariant(trial: Trial, name: str, registry: Registry) -> bool | None:
    """Whether the batch's last row equals that row alone; None where rows do not stand for themselves."""
    alone = _ask(one_row_node(trial.node), name, registry, trial.device)
    last = trial.node.inputs[0].extents[0] - 1
    if isinstance(alone, Declined) or (single := trial.one_row(last, alone)) is None:
        return None
    trial.launch(trial.bind(trial.outputs), POISONS[0])
    single.launch(single.bind(single.outputs), POISONS[0])
    pairs = [
        (batch_part[last:], part)
        for batch, one in zip(trial.outputs, single.outputs, strict=True)
        for batch_part, part in zip(batch.parts, one.parts, strict=True)
        if len(batch_part) == last + 1
    ]
    return all(ours.view(torch.uint8).equal(theirs.view(torch.uint8)) for ours, theirs in pairs)


def _measure(trial: Trial, outcome: Outcome) -> Outcome:
    """The outcome with the error of the output that is furthest off, for its bound."""
    measured = []
    failures: list[str] = []
    for value, memory, wanted in zip(trial.node.outputs, trial.outputs, trial.expected, strict=True):
        bound = trial.kernel.precision + lookup(value.format).rounding
        found = compare(dequantize_planes(value.format, memory.parts), wanted, bound)
        measured.append(found)
        failures += [f"{failure} in {value.name}" for failure in found.failures]
    furthest = max(measured, key=lambda found: found.error / found.bound)
    return replace(outcome, failures=tuple(failures), error=furthest.error, worst=furthest.worst, bound=furthest.bound)

"""What a policy says of a finished plan: requirements that must hold, and what matched nothing.

Enters: a Plan. Leaves: a PlanError that names the broken requirement and every node that breaks it; or findings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from kernelmux.contract.installed import ALLOW
from kernelmux.errors import PlanError
from kernelmux.graph.domain import in_words
from kernelmux.graph.formats import human_bytes
from kernelmux.graph.ops import fused_ops
from kernelmux.graph.rewrite import find_fusions
from kernelmux.plan.names import Finding, absent_names, unreached
from kernelmux.policy.grammar import AUTO, PARTS

if TYPE_CHECKING:
    from kernelmux.contract.device import Device
    from kernelmux.contract.record import Record
    from kernelmux.plan.choice import Choice
    from kernelmux.plan.plan import Plan
    from kernelmux.policy.policy import Policy


def check_requirements(plan: Plan) -> None:
    """PlanError naming the first requirement that does not hold, with every node that breaks it.

    A fused node answers for the plain ones that it stands for.
    """
    for index, required in enumerate(plan.policy.document.require):
        broken: dict[str, None] = {}
        for schedule in plan.schedules.values():
            for step in schedule.steps:
                if {step.choice.name, step.choice.backend} & set(required.kernel):
                    continue
                top = schedule.rows(step.node)
                if any(required.matches(node, rows, plan.device) for node, rows in plan.nodes_meant(step, top)):
                    broken[f"{step.node.name} has {step.choice.name} at up to {top} rows"] = None
        if broken:
            shown = ", ".join(list(broken)[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            file, line = plan.policy.source, plan.policy.line("require", index)
            wanted = " or ".join(required.kernel)
            raise PlanError(f"{file}:{line}: the policy requires {wanted}, but {shown}", file=file, line=line)


def unmatched(plan: Plan) -> Iterator[tuple[str, int]]:
    """The rules that decide for no node of a plan, and the requirements about none: what each is called, its line.

    Not those for another device, not those behind a rule that matches all that they do, and not what nobody asked for.
    """
    policy, device = plan.policy, plan.device
    document = policy.document
    rules = {index for index, rule in enumerate(document.rule) if rule.is_for(device) and policy.is_asked_for(index)}
    rules -= {index for index, *_ in unreached(policy)} | set(_leaving_parts(plan))
    required = {index for index, requirement in enumerate(document.require) if requirement.is_for(device)}
    for top in plan.buckets:
        schedule = plan.schedule(top, top)
        for step in schedule.steps:
            if not (rules or required):
                return
            for node, rows in plan.nodes_meant(step, schedule.rows(step.node)):
                # What a rule of the file would match but for an option is matched.
                rules -= {policy.match(node, rows, device, start) for start in {0, len(policy.options)}}
                required -= {index for index in required if document.require[index].matches(node, rows, device)}
    yield from ((policy.where(index), policy.line("rule", index) or 0) for index in sorted(rules))
    for index in sorted(required):
        line = policy.line("require", index) or 0
        yield f"requirement {index + 1} ({policy.source}:{line})", line


def _leaving_parts(plan: Plan) -> Iterator[int]:
    """The rules that leave the parts of some fused node to run: a node that is in no schedule."""
    policy = plan.policy
    if not policy.document.fuse or not any(PARTS in rule.use for rule in policy.document.rule):
        return
    for fusion in find_fusions(plan.graph, fused_ops()):
        for count in policy.telling_rows(1, plan.max_rows):
            rows = fusion.node.rows_at(count)
            found = {policy.match(fusion.node, rows, plan.device, start) for start in {0, len(policy.options)}}
            yield from (index for index in found if index is not None and PARTS in policy.document.rule[index].use)


def unserved(plan: Plan) -> Iterator[tuple[int | None, str]]:
    """The rules that decide for nodes of which none got what they name: the index, None of the defaults; what to say.

    Not those that say `on_unsupported = "next"`, which mean it, nor those of whose every name more is to be said; and
    not those that nobody asked for.
    """
    policy, document = plan.policy, plan.policy.document
    uses: dict[int | None, Sequence[str]] = {
        **{index: rule.use for index, rule in enumerate(document.rule) if rule.on_unsupported != "next"},
        None: document.defaults.use,
    }
    absent = {finding.name for finding in absent_names(policy, plan.registry, plan.device)}
    asked = {
        index: use
        for index, use in uses.items()
        if policy.is_asked_for(index) and not ({AUTO, PARTS} & set(use) or absent.issuperset(use))
    }
    served: set[int | None] = set()
    refused: dict[int | None, str] = {}
    for top in plan.buckets:
        schedule = plan.schedule(top, top)
        for step in schedule.steps:
            for node, rows in plan.nodes_meant(step, schedule.rows(step.node)):
                if len(served) == len(asked):
                    return
                index = policy.match(node, rows, plan.device)
                if index not in asked or index in served:
                    continue
                if index is None and step.choice.rule is not None:
                    continue  # A rule for the fused op that runs in its place: the defaults speak of what is left.
                if {step.choice.name, step.choice.backend} & set(asked[index]):
                    served.add(index)
                elif not refused.get(index):
                    refused[index] = _first_refusal(asked[index], step.choice)
    for index in (index for index in asked if index in refused and index not in served):
        reason = refused[index] or "a fused op runs in their place"
        named = in_words(asked[index])
        yield index, f"no node of {plan.graph.name} on {plan.device.device_class} got {named}: {reason}"


def tuned_elsewhere(policy: Policy, device: Device) -> Finding | None:
    """What is to be said of a policy that was measured on another class of devices."""
    tuned_for = policy.document.tuned_for
    if tuned_for is None or tuned_for == device.device_class:
        return None
    said = f"the policy was measured on {tuned_for}, the plan is for {device.device_class}"
    return Finding(policy.line("tuned_for") or 1, f"{said}: kernelmux tune MODEL measures one there")


def _first_refusal(use: Collection[str], choice: Choice) -> str:
    """Why the first of what a rule uses was not chosen; empty where a fused op was, for which it was not asked."""
    for loser in choice.rejected:
        if {loser.kernel, loser.kernel.partition(":")[0]} & set(use):
            return loser.reason if loser.kernel in use else f"{loser.kernel}: {loser.reason}"
    return ""


def _shortened(plan: Plan, max_rows: int) -> Iterator[str]:
    """That steps have fewer rows than were asked for; that weights have no room whatever their steps have."""
    device, weights = plan.device, plan.packed_bytes
    if device.memory and weights > device.memory:
        room = f"{device.name} has {human_bytes(device.memory)}"
        yield f"the weights do not fit: they take {human_bytes(weights)}, {room}"
    if plan.max_rows < max_rows:
        limit, memory = plan.policy.document.weights.copies, human_bytes(device.memory)
        why = f"the policy allows {limit}" if limit else f"{device.name} has {memory}"
        more = "for more, weights would need one more packed copy each"
        helps = "; a larger max_error may let in kernels that do with less" if not limit else ""
        yield f"steps take up to {plan.max_rows} rows, not {max_rows}: {more}, and {why}{helps}"


def _failed(plan: Plan, record: Record) -> Iterator[str]:
    """What runs though it has failed its smoke cases on this machine, as somebody asked for it."""
    choices = {
        (step.node.op, step.choice.name): step.choice for top in plan.buckets for step in plan.schedule(top, top).steps
    }
    for (op, name), choice in choices.items():
        if failure := record.failure(op, name, choice.kernel):
            yield f"{name} runs {op}, by {plan.policy.where(choice.rule)}: {failure}"


def _fault(line: str) -> str:
    """What a line says of a backend that is broken or not there, whoever asked for it; all of any other line."""
    said = re.search(r" is quarantined: .*| is not installed: .*", line)
    return said[0] if said else line


def notes(plan: Plan, record: Record, max_rows: int) -> tuple[str, ...]:
    """What a person must be told of the policy, though a plan was made: names not to be had, rules that do nothing.

    A backend that is broken or not there is told of once, and all that matches no node in one line.
    """
    policy = plan.policy
    options = len(policy.options)
    elsewhere = tuned_elsewhere(policy, plan.device)
    loud = [f"{policy.source}:{elsewhere.line}: {elsewhere.message}"] if elsewhere else []
    loud += [str(finding) for finding in absent_names(policy, plan.registry, plan.device) if finding.weight != "error"]
    broken = {name: plan.registry.backends[name].fault for name in plan.registry.allowed}
    loud += [f"{ALLOW} asks for {name}, which is quarantined: {fault}" for name, fault in broken.items() if fault]
    by_fault = {_fault(line): line for line in reversed(loud)}
    lines = [*reversed(by_fault.values())]
    for index, before, finding in unreached(policy):
        # An option is there to outrank the file.
        outranked = before < options <= index
        if policy.document.rule[index].is_for(plan.device) and not outranked:
            lines.append(f"{policy.source}:{finding.line}: {finding.message}" if finding.line else finding.message)
    if names := [name for name, _ in unmatched(plan)]:
        verb = "match" if len(names) > 1 else "matches"
        lines.append(f"{', '.join(names)} {verb} no node of {plan.graph.name} on {plan.device.device_class}")
    lines += [f"{policy.where(index)}: {said}" for index, said in unserved(plan)]
    return (*lines, *_shortened(plan, max_rows), *_failed(plan, record))

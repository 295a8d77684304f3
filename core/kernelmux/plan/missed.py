"""What a plan leaves on the table: backends that are not installed, kernels that declined, times that nobody measured.

Enters: a Plan with its predicted speeds. Leaves: a clause for each, which says what would help.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING

from kernelmux.contract.answers import Offer, excluded
from kernelmux.contract.device import Device
from kernelmux.graph.formats import human_count
from kernelmux.measure.table import HERE
from kernelmux.plan.budget import added_error
from kernelmux.plan.selection import Selector
from kernelmux.policy.grammar import AUTO

if TYPE_CHECKING:
    from kernelmux.contract.kernel import Kernel
    from kernelmux.plan.plan import Plan
    from kernelmux.plan.speed import Call, Speeds

DISTRIBUTION = "kernelmux"
"""Its extras that are called as a kind of device (`cuda`, `cuda12`) list the backends that serve it."""
UNMEASURED = 0.1
"""Share of a step's time from which on it is told that nobody has measured it."""
WORTH_TELLING = 0.02
"""Share of a step's time that a kernel would save which is told to have declined."""
BY_HAND = 0.2
"""Share of a step's time that another kernel would save from which on a policy by hand is told of it."""
WORTH_GAINING = 1.05
"""How many times as fast a step could be at most, from which on it is told."""


def missed(plan: Plan, speeds: Speeds) -> Iterator[str]:
    """A clause for each; nothing of a locked plan, which chooses nothing."""
    if plan.locked is None:
        yield from _not_known(plan)
        yield from _not_installed(plan)
        yield from _declined(plan, speeds)
        yield from _not_tuned(plan, speeds)


def _not_known(plan: Plan) -> Iterator[str]:
    if card := plan.device.platform.counts_as(plan.device):
        yield f"nobody has stated what {plan.device.name} reaches: it counts as {card}"


def _not_installed(plan: Plan) -> Iterator[str]:
    forbidden = plan.policy.document.forbid
    lacking = [name for name in serving(plan.device) if not _is_installed(name)]
    lacking = [name for name in lacking if name.removeprefix(f"{DISTRIBUTION}-") not in forbidden]
    if lacking:
        yield f"not installed, with kernels for {plan.device.kind}: pip install {' '.join(lacking)}"
    for name, backend in plan.registry.backends.items():
        if backend.fault and name not in forbidden:
            yield f"{name} is quarantined: {backend.fault}"
    for name in plan.registry.working:
        refused = plan.registry.device_refusal(name, plan.device)
        if refused is not None and refused.kind == "missing dependency" and name not in forbidden:
            yield f"{name} is not used: {refused.reason}"


def serving(device: Device) -> list[str]:
    """The distributions of backends that serve a kind of device, by the extras of core's own."""
    with suppress(metadata.PackageNotFoundError):
        found: dict[str, None] = {}
        for required in metadata.requires(DISTRIBUTION) or ():
            name, extra = re.split(r"[^\w-]", required, maxsplit=1)[0], re.search(r"""extra == ["'](\w+)""", required)
            if extra and re.fullmatch(rf"{device.kind}\d*", extra[1]) and name.startswith(f"{DISTRIBUTION}-"):
                found[name] = None
        return list(found)
    return []


def _is_installed(distribution: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.distribution(distribution))
    return False


def _declined(plan: Plan, speeds: Speeds) -> Iterator[str]:
    """Of the kernels whose smoke cases failed here the one that would save the most; then of those that declined a node
    for its alignment alone; of those that are over the error budget; of those that `auto` might take where the policy
    names another."""
    selector = Selector(plan.policy, speeds.offers)
    for kind in ("failed", "alignment", "over budget", "outranked"):
        found: list[tuple[float, bool, str]] = []
        for rows in dict.fromkeys((1, plan.max_rows)):
            found += ((saved, rows == 1, told) for saved, told in _savings(selector, speeds, rows, kind))
        if found:
            yield max(found)[-1]


def _savings(selector: Selector, speeds: Speeds, rows: int, kind: str) -> Iterator[tuple[float, str]]:
    """What kernels would save that were refused for one kind of reason: a share of the step, and a clause."""
    calls = speeds.calls(rows)
    step = sum(call.us for call in calls)
    saved: dict[tuple[str, str], float] = defaultdict(float)
    refused: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in calls:
        for loser in call.choice.rejected:
            if loser.kind == kind and " of " not in loser.kernel:
                # What the policy names decides before another kernel does, refused or not.
                if selector.asks_for(loser.kernel, call.node, call.rows, call.choice) == (kind == "outranked"):
                    continue
                us = _would_take(loser.kernel, call, selector, kind)
                reason = loser.reason if kind in ("failed", "alignment") else ""
                saved[loser.kernel, reason] += max(0.0, call.count * (call.prediction.us - us)) / step
                refused[loser.kernel, reason].append(call)
    for (kernel, reason), share in saved.items():
        if share >= WORTH_TELLING:
            less = f"{'decoding' if rows == 1 else 'prompts'} would take {share:.0%} less"
            first, nodes = refused[kernel, reason][0], sum(call.count for call in refused[kernel, reason])
            if reason:
                node = first.node.name + (f" and {nodes - 1} more" if nodes > 1 else "")
                refusal = "is kept from" if kind == "failed" else "declined"
                yield round(share, 2), f"{kernel} {refusal} {node}: {reason}; {less}"
            elif kind == "outranked":
                if share >= BY_HAND:
                    instead = f"{kernel} for {_nodes(nodes)}, in place of {_most(refused[kernel, ''])}"
                    yield round(share, 2), f"{less} with {instead}, which the policy names"
            else:
                error = max(_error(kernel, call, speeds) for call in refused[kernel, ""])
                yield round(share, 2), f"{less} with max_error = {_at_least(error)} ({kernel} for {_nodes(nodes)})"


def _most(calls: Sequence[Call]) -> str:
    """The kernel that most of the nodes have."""
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.choice.name] += call.count
    return counts.most_common(1)[0][0]


def _nodes(count: int) -> str:
    return human_count(count, "node")


def _error(name: str, call: Call, speeds: Speeds) -> float:
    """What a kernel adds that was refused for it: with activations in float32, however the plan stores them."""
    kernel = speeds.offers.of(call.node, call.rows).kernels[name]
    stated = [
        [replace(v, format="f32") if v.convertible else v for v in vs] for vs in (call.node.inputs, call.node.outputs)
    ]
    return added_error(kernel, replace(call.node, inputs=tuple(stated[0]), outputs=tuple(stated[1])))


def _at_least(error: float) -> str:
    """A round number that an error is not over: `0.01` of 0.0090076."""
    size = 10.0 ** math.floor(math.log10(error))
    return f"{math.ceil(error / size - 1e-9) * size:.0g}"


def _would_take(name: str, call: Call, selector: Selector, kind: str) -> float:
    """Microseconds of a kernel that was refused a node, were it as good there; infinite where it could not have it."""
    offered = selector.offers.of(call.node, call.rows).kernels
    rule = selector.match(call.node, call.rows)
    for kernel in [offered[name]] if name in offered else _made(name, call, selector):
        # It said that it does not take this node: whatever it raises when it is asked about it is no fault of its own.
        with suppress(Exception):
            refusal = selector.refusal(name, call.node, rule, Offer({name: kernel}, {}), AUTO)
            if refusal is None or refusal.kind == kind:
                return selector.predict(name, kernel, call.node, call.rows).us
    return float("inf")


def _made(name: str, call: Call, selector: Selector) -> Iterator[Kernel]:
    """The kernel of a name as its backend would make it for a node's op and formats."""
    backend, _, wanted = name.partition(":")
    node = call.node.at(call.rows)
    for made in selector.offers.registry.classes(backend):
        kernel: Kernel = made()
        kernel.device, kernel.backend = selector.offers.device, backend
        if made.name == wanted and node.op in made.ops and excluded(kernel, node.contract.arguments(node)) is None:
            yield kernel


def _not_tuned(plan: Plan, speeds: Speeds) -> Iterator[str]:
    """Where `auto` chose by times that nobody measured on such a device: how many times as fast it could be at most."""
    by_auto = any(call.choice.asked == AUTO for rows in (1, plan.max_rows) for call in speeds.calls(rows))
    known = {"decoding": speeds.at(1), "prompts": speeds.at(plan.max_rows)}
    open_ones = {name: speed for name, speed in known.items() if speed.unmeasured > UNMEASURED}
    if not by_auto or not open_ones:
        return
    elsewhere = {call.prediction.elsewhere for rows in (1, plan.max_rows) for call in speeds.calls(rows)} - {""}
    how = f"in proportion to those of {min(elsewhere)}" if elsewhere else "as kernels declare"
    most = {name: speed.us / speeds.at_best(speed.rows) for name, speed in open_ones.items()}
    gains = [f"{gain:.1f} times in {name}" for name, gain in most.items() if gain >= WORTH_GAINING]
    helps = f"may gain up to {', '.join(gains)}" if gains else "would measure it"
    here = any(call.prediction.source.startswith(HERE) for rows in (1, plan.max_rows) for call in speeds.calls(rows))
    if here:
        shares = " and ".join(f"{speed.unmeasured:.0%} of {name}" for name, speed in open_ones.items())
        yield f"tuned in part: the times of {shares} are {how}; `kernelmux tune MODEL` {helps}"
    else:
        yield f"no tuning for {plan.device.name}: times are {how}; `kernelmux tune MODEL` {helps}"

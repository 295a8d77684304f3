"""What a plan leaves on the table: backends that are not installed, kernels that declined, times that nobody measured.

Enters: a Plan with its predicted speeds. Leaves: a clause for each, which says what would help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING

from kernelmux.contract.answers import Offer, excluded
from kernelmux.contract.device import Device
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
WORTH_GAINING = 1.05
"""How many times as fast a step could be at most, from which on it is told."""


def missed(plan: Plan, speeds: Speeds) -> Iterator[str]:
    """A clause for each; nothing of a locked plan, which chooses nothing."""
    if plan.locked is None:
        yield from _not_installed(plan)
        yield from _declined(plan, speeds)
        yield from _not_tuned(plan, speeds)


def _not_installed(plan: Plan) -> Iterator[str]:
    forbidden = plan.policy.document.forbid
    lacking = [name for name in serving(plan.device) if not _is_installed(name)]
    lacking = [name for name in lacking if name.removeprefix(f"{DISTRIBUTION}-") not in forbidden]
    if lacking:
        yield f"not installed, with kernels for {plan.device.kind}: pip install {' '.join(lacking)}"
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
    """Of the kernels that declined a node for its alignment alone the one that would save the most."""
    found: list[tuple[float, bool, str]] = []
    selector: Selector | None = None
    for rows in dict.fromkeys((1, plan.max_rows)):
        calls = speeds.calls(rows)
        step = sum(call.us for call in calls)
        for call in calls:
            for loser in call.choice.rejected:
                if loser.kind != "alignment":
                    continue
                selector = selector or Selector(plan.policy, speeds.offers)
                us = _would_take(loser.kernel, call, selector)
                if (saved := call.count * (call.prediction.us - us) / step) >= WORTH_TELLING:
                    node = call.node.name + (f" and {call.count - 1} more" if call.count > 1 else "")
                    when = "decoding" if rows == 1 else "prompts"
                    told = f"{loser.kernel} declined {node}: {loser.reason}; {when} would take {saved:.0%} less"
                    found.append((round(saved, 2), rows == 1, told))
    if found:
        yield max(found)[-1]


def _would_take(name: str, call: Call, selector: Selector) -> float:
    """Microseconds of a kernel that declined a node, were it as good there; infinite where it could not have it."""
    backend, _, wanted = name.partition(":")
    node = call.node.at(call.rows)
    for made in selector.offers.registry.classes(backend):
        kernel: Kernel = made()
        kernel.device, kernel.backend = selector.offers.device, backend
        fits = node.op in made.ops and excluded(kernel, node.contract.arguments(node)) is None
        if made.name != wanted or not fits:
            continue
        # It said that it does not take this node: whatever it raises when it is asked about it is no fault of its own.
        with suppress(Exception):
            rule = selector.match(call.node, call.rows)
            if selector.refusal(name, call.node, rule, Offer({name: kernel}, {}), auto=True) is None:
                return selector.predict(name, kernel, call.node, call.rows).us
    return float("inf")


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
    yield f"no tuning for {plan.device.name}: times are {how}; `kernelmux tune MODEL` {helps}"

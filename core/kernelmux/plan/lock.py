"""A plan on file: made once, checked in, and refused where anything that it rests on has changed.

Enters: a Plan, or a lock file. Leaves: a lock file, or the very same Plan. The file is JSON: what the plan was made
from, and the choice, formats and variants of every step; alike steps are written once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kernelmux.contract.device import Device
from kernelmux.contract.registry import Registry
from kernelmux.errors import PlanError
from kernelmux.files import read_whole, write_whole
from kernelmux.graph.graph import Graph
from kernelmux.plan.choice import Placed, Rejection
from kernelmux.plan.plan import Plan, make_plan
from kernelmux.plan.selection import Locked
from kernelmux.plan.table import listed
from kernelmux.policy.policy import Policy

VERSION = 2
SHOWN = 12
"""Differences that a message names, alike ones as one."""


@dataclass(frozen=True)
class LockedStep(Placed):
    """A step without its node and its kernel, and how the node's values are stored."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    formats: tuple[str, ...] = field(kw_only=True)


class Lock(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lock: int
    fingerprint: str
    graph: str
    device_class: str
    versions: dict[str, str]
    libraries: dict[str, str]
    policy: Policy
    banned: tuple[tuple[str, str], ...]
    considered: dict[str, tuple[Rejection, ...]]
    notes: tuple[str, ...]
    steps: dict[str, LockedStep]
    """By a label, which begins with the kernel's name."""
    schedules: dict[str, dict[str, str]]
    """By `m/outs`, of each node the label of its step."""
    checksum: str
    """Of all the rest: what a hand has changed since and nothing else gives away, as a reason or the policy."""

    def sealed(self) -> Lock:
        """The lock with the checksum of what it says."""
        said = self.model_dump_json(exclude={"checksum"})
        return self.model_copy(update={"checksum": hashlib.sha256(said.encode()).hexdigest()[:16]})

    def by_bucket(self) -> Locked:
        """The choices of every node by its bucket's rows."""
        rows = {written: tuple(map(int, written.split("/"))) for written in self.schedules}
        # All nodes of a bucket stand in the schedule where token rows and rows with logits are both its.
        return {
            rows[written][0]: {name: self.steps[label] for name, label in nodes.items()}
            for written, nodes in self.schedules.items()
            if len(set(rows[written])) == 1
        }

    def to_json(self) -> str:
        """A line for each entry of a table, so that two versions of a file can be compared."""
        lines = []
        for name, value in self.model_dump(mode="json", exclude_defaults=True).items():
            if isinstance(value, dict) and value:
                entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
                lines.append(f" {json.dumps(name)}: {{\n{entries}\n }}")
            else:
                lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def write_lock(plan: Plan, path: str | Path) -> None:
    """Writes a plan to a lock file; PlanError where it cannot be written."""
    try:
        write_whole(path, _to_lock(plan).to_json())
    except OSError as error:
        raise PlanError(f"{path}: the lock file cannot be written: {error.strerror}", file=str(path)) from error


def is_lock(path: str | Path, written: bytes | None = None) -> bool:
    """Whether a file is a lock rather than a policy's TOML: it is JSON, or named `.lock`, or empty and not `.toml`."""
    suffix = Path(path).suffix
    try:
        start = (read_whole(path) if written is None else written).lstrip()[:1]
    except OSError:
        return suffix == ".lock"
    return suffix == ".lock" or start == b"{" or (not start and suffix != ".toml")


def _to_lock(plan: Plan) -> Lock:
    steps: dict[str, LockedStep] = {}
    labels: dict[LockedStep, str] = {}
    schedules: dict[str, dict[str, str]] = {}
    for (m, outs), schedule in sorted(plan.schedules.items()):
        of_nodes = schedules[f"{m}/{outs}"] = {}
        for step in schedule.steps:
            formats = tuple(value.format for value in (*step.node.inputs, *step.node.outputs))
            locked = LockedStep(**step.choice.told(), formats=formats)
            label = labels.setdefault(locked, _label(locked.name, steps))
            steps.setdefault(label, locked)
            of_nodes[step.node.name] = label
    return Lock(
        lock=VERSION,
        fingerprint=plan.fingerprint,
        graph=f"{plan.graph.name} {plan.graph.digest}",
        device_class=plan.device.device_class,
        versions=dict(plan.versions),
        libraries=dict(plan.libraries),
        policy=plan.policy,
        banned=tuple(sorted(plan.banned)),
        considered=dict(plan.considered),
        notes=plan.notes,
        steps=steps,
        schedules=schedules,
        checksum="",
    ).sealed()


def _label(name: str, taken: Mapping[str, object]) -> str:
    """`torch:int4`, `torch:int4 2`: a kernel's name, numbered where steps with it differ otherwise."""
    numbered = (f"{name} {number}" for number in itertools.count(2))
    return next(label for label in itertools.chain([name], numbered) if label not in taken)


def read_lock(path: str | Path, graph: Graph, registry: Registry, device: Device, written: bytes | None = None) -> Plan:
    """The plan of a lock file, equal in every field. PlanError names each thing that has changed since.

    `written` is what the file has, where it was read already: a pipe can be read once.
    """
    lock, locked = _parse(path, written)
    graph = graph.with_cache_format(lock.policy.cache_format(device))
    found = lock.model_copy(update={"graph": f"{graph.name} {graph.digest}", "device_class": device.device_class})
    _compare(path, lock, found)
    try:
        plan = make_plan(graph, lock.policy, registry, device, max(locked), frozenset(lock.banned), locked)
    except PlanError as error:
        raise PlanError(f"{path}: {error}; lock it anew", file=str(path), node=error.node) from error
    plan = replace(plan, considered=lock.considered, notes=lock.notes)
    _compare(path, lock, _to_lock(plan))
    if lock != lock.sealed():
        raise PlanError(f"{path}: it was edited since it was written; lock it anew", file=str(path))
    return plan


def _parse(path: str | Path, written: bytes | None) -> tuple[Lock, Locked]:
    try:
        text = (read_whole(path) if written is None else written).decode()
        if not text.strip():
            raise PlanError(f"{path}: the lock file is empty; write one with plan --lock", file=str(path))
        version = json.loads(text)["lock"]
    except OSError as error:
        raise PlanError(f"{path}: the lock file cannot be read: {error.strerror}", file=str(path)) from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        said = "it is no JSON" if isinstance(error, (ValueError, RecursionError)) else "it has no version"
        raise PlanError(
            f"{path}: not a lock file, or damaged: {said}; write one with plan --lock", file=str(path)
        ) from error
    if version != VERSION:
        raise PlanError(f"{path}: not a lock file of version {VERSION}; write one with plan --lock", file=str(path))
    try:
        lock = Lock.model_validate_json(text)
        if odd := {label for nodes in lock.schedules.values() for label in nodes.values()} - lock.steps.keys():
            raise ValueError(f"{min(odd)!r} is none of its steps")
        if odd := {rows for rows in lock.schedules if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", rows)}:
            raise ValueError(f"its schedules' {min(odd)!r} is no pair of row counts, as 1/1")
        if not (locked := lock.by_bucket()):
            raise ValueError("it has no schedules")
        return lock, locked
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"{path}: not a plan's lock file: {_said(error)}; write it with plan --lock", file=str(path)
        ) from error


def _said(error: Exception) -> str:
    """What is wrong, and where in the file."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{first['msg'].lower()} at {'.'.join(map(str, first['loc']))}"
    return " ".join(str(error).split())[:120]


def _compare(path: str | Path, lock: Lock, found: Lock) -> None:
    """PlanError that names the first differences, where there are any."""
    differing = list(_differences(lock, found))
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise PlanError(f"{path}: {'; '.join(differing[:SHOWN])}{more}; lock it anew", file=str(path))


def _differences(lock: Lock, found: Lock) -> Iterator[str]:
    """Each thing that is not as it was, alike ones as one.

    As `the version of add torch:f32 is 2, the plan was locked with 1`.
    """
    was, now = _named(lock), _named(found)
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for key in dict.fromkeys((*was, *now)):
        what, whose, at = key
        # Of a step that is new or gone only the kernel is told.
        kept = key in was and key in now
        if was.get(key) != now.get(key) and (kept or what not in ("formats", "variant", "on_error")):
            rows.setdefault((what, whose, now.get(key, "absent"), was.get(key, "none")), []).append(at)
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for (what, whose, after, before), counts in rows.items():
        alike.setdefault((what, ", ".join(counts), after, before), []).append(whose)
    for (what, places, after, before), names in alike.items():
        of, at_rows = f" of {listed(names)}" if names[0] else "", f" at up to {places} rows" if places else ""
        yield f"the {what}{of}{at_rows} is {after or 'none'}, the plan was locked with {before or 'none'}"


def _named(lock: Lock) -> dict[tuple[str, str, str], str]:
    """All that two locks can differ in, by what a person would call it: of what, and at which rows."""
    named = {("graph", "", ""): lock.graph, ("device class", "", ""): lock.device_class}
    named |= {("version", name, ""): version for name, version in (lock.versions | lock.libraries).items()}
    for rows, nodes in lock.schedules.items():
        for node, label in nodes.items():
            step = lock.steps[label]
            named["kernel", node, rows] = step.name
            named["formats", node, rows] = ", ".join(step.formats)
            named["variant", node, rows] = ", ".join(f"{taken.variant} up to {taken.rows}" for taken in step.variants)
            named["on_error", node, rows] = step.on_error
    return {**named, ("fingerprint", "", ""): lock.fingerprint}

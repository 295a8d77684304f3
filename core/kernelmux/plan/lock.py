"""A plan on file: made once, checked in, and refused where anything that it rests on has changed.

Enters: a Plan, or a lock file. Leaves: a lock file, or the very same Plan. The file is JSON: a fingerprint, what it was
made from, and the kernel of every node by bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kernelmux.contract.device import Device
from kernelmux.contract.registry import Registry
from kernelmux.errors import PlanError
from kernelmux.graph.graph import Graph
from kernelmux.plan.plan import Plan, make_plan
from kernelmux.policy.grammar import Document
from kernelmux.policy.policy import Policy

VERSION = 1


def write_lock(plan: Plan, path: str | Path) -> None:
    """Writes a plan to a lock file; PlanError where it cannot be written."""
    try:
        Path(path).write_text(json.dumps(_describe(plan), indent=1) + "\n", "utf-8")
    except OSError as error:
        raise PlanError(f"{path}: the lock file cannot be written: {error.strerror}") from error


def is_lock(path: str | Path) -> bool:
    """Whether a file is JSON, as a lock file is, rather than a policy's TOML."""
    try:
        return Path(path).read_bytes().lstrip()[:1] == b"{"
    except OSError:
        return False


def _describe(plan: Plan) -> dict[str, Any]:
    choices: dict[str, dict[str, str]] = {}
    versions: dict[str, str] = {}
    for schedule in plan.schedules.values():
        for step in schedule.steps:
            bucket = plan.bucket(schedule.rows(step.node))
            choices.setdefault(str(bucket), {})[step.node.name] = step.choice.name
            versions[f"{step.node.op} {step.choice.name}"] = step.choice.kernel.version
    return {
        "lock": VERSION,
        "fingerprint": plan.fingerprint,
        "graph": {"name": plan.graph.name, "digest": _digest(plan.graph)},
        "device_class": plan.device.device_class,
        "kernels": dict(sorted(versions.items())),
        "policy": {
            "fuse": plan.policy.document.fuse,
            "kv": {"format": plan.policy.document.kv.format},
            "defaults": {"on_error": plan.policy.document.defaults.on_error},
        },
        "choices": choices,
    }


def read_lock(path: str | Path, graph: Graph, registry: Registry, device: Device) -> Plan:
    """The plan of a lock file. PlanError says what has changed: graph, device class, a kernel's version, a choice."""
    lock = _parse(path)
    try:
        document = Document.model_validate(lock["policy"])
        graph = graph.with_cache_format(document.kv.format)
        _compare(path, "graph", f"{graph.name} {_digest(graph)}", f"{lock['graph']['name']} {lock['graph']['digest']}")
        _compare(path, "device class", device.device_class, lock["device_class"])
        locked = {int(bucket): _names(choices) for bucket, choices in lock["choices"].items()}
        fingerprint, versions = str(lock["fingerprint"]), _names(lock["kernels"])
        if min(locked) < 1:
            raise ValueError(f"a bucket of {min(locked)} rows")
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise PlanError(f"{path}: not a plan's lock file: {type(error).__name__}; write it with plan --lock") from error
    policy = Policy(document, str(path), ())
    plan = make_plan(graph, policy, registry, device, max(locked, default=1), locked=locked)
    for kernel, version in _describe(plan)["kernels"].items():
        _compare(path, f"version of {kernel}", version, versions.get(kernel, "absent"))
    _compare(path, "fingerprint", plan.fingerprint, fingerprint)
    return plan


def _parse(path: str | Path) -> Mapping[str, Any]:
    try:
        lock = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: the lock file cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not JSON: {error}") from error
    if not isinstance(lock, dict) or lock.get("lock") != VERSION:
        raise PlanError(f"{path}: not a lock file of version {VERSION}; write one with plan --lock")
    return lock


def _names(table: Any) -> dict[str, str]:
    """A table of strings; ValueError where it is none."""
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"a table of names is needed, not {table!r:.40}")
    return table


def _compare(path: str | Path, what: str, found: str, locked: str) -> None:
    if found != locked:
        raise PlanError(f"{path}: the {what} is {found}, the plan was locked with {locked}; lock it anew")


def _digest(graph: Graph) -> str:
    return hashlib.sha256(graph.to_json().encode()).hexdigest()[:16]

"""What tests of a backend need beside the suite: a backend of a few kernels, one node, one case, an error's size.

A kernel that the suite cannot reach on this machine is offered by a backend of the test's own, and runs what cases fit:

    REGISTRY, CASES = few_rows(backend(silu=MySilu()))

    @pytest.mark.parametrize("job", CASES, ids=[f"{job.kernel}-{job.name}" for job in CASES])
    def test_case(job):
        pass_or_skip(job, REGISTRY)
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from kernelmux.conformance.hookup import Job, jobs
from kernelmux.contract import CONTRACT, Answer, hookimpl
from kernelmux.contract.registry import Registry, isolated
from kernelmux.graph.formats import Value
from kernelmux.graph.graph import TensorNode, make_node


def backend(**answers: Answer | Callable[[TensorNode, int], Answer]) -> types.ModuleType:
    """A backend with a hook for each op named: what it answers, or a function of (node, m) that does; None: no hook."""
    plugin = types.ModuleType("backend")
    plugin.CONTRACT = CONTRACT  # type: ignore[attr-defined]
    for op, answer in answers.items():
        if answer is not None:
            setattr(plugin, f"dispatch_{op}", hookimpl(_hook(answer)))
    return plugin


def _hook(answer: Any) -> Callable[[TensorNode, int], Any]:
    def hook(node: TensorNode, m: int) -> Any:
        return answer(node, m) if isinstance(answer, types.FunctionType) else answer

    return hook


def few_rows(plugin: object, rows: int = 5) -> tuple[Registry, list[Job]]:
    """A registry with that backend alone, and its cases of at most so many rows: an interpreter is slow."""
    with isolated(mine=plugin) as alone:
        every = list(jobs("mine", alone))
    return alone, [job for job in every if job.case.inputs[0].extents[0] <= rows]


def pass_or_skip(job: Job, registry: Registry) -> None:
    """Runs a case: skipped, with the reason, where the kernel refuses it."""
    import pytest

    outcome = job.run(registry)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    if not outcome.passed:
        pytest.fail("\n".join(outcome.failures), pytrace=False)


def one_node(op: str, *inputs: Value, format: str = "f32", **fields: Any) -> TensorNode:
    """A node of that op, `node`, whose weights are in `fields`; GraphError where the op's contract is broken."""
    return make_node(op, "node", *inputs, format=format, **fields)


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error over squared expectation."""
    return float((found.double() - wanted.double()).square().sum() / wanted.double().square().sum())

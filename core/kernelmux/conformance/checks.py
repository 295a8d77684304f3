"""The checks beside the error: what a kernel may touch, and whether it does the same thing twice.

Each takes a trial whose kernel has been launched once, and adds to its `failures` in the form `check: what was seen`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernelmux.conformance.guarded import POISONS
from kernelmux.conformance.measure import compare
from kernelmux.formats import dequantize_planes, lookup
from kernelmux.hookspecs import Launch

if TYPE_CHECKING:
    from kernelmux.conformance.trial import Trial


def written(trial: Trial, call: Launch, first: list[torch.Tensor]) -> None:
    """Every element of every output is written, and the same numbers come again, bit for bit.

    Under another poison a byte may only differ if it was left alone, or if the kernel does not repeat itself; a third
    launch under the first poison tells which.
    """
    second = trial.launch(call, POISONS[1])
    if _same(first, second):
        return
    third = trial.launch(call, POISONS[0])
    if _same(first, third):
        trial.failures.append("written: an output element, or the result, depends on what the memory held before")
    else:
        trial.failures.append("repeatable: two launches on the same inputs differ")


def guards(trial: Trial) -> None:
    """Nothing is written outside the buffers."""
    places = {"input": trial.inputs, "output": trial.outputs, "workspace": [trial.scratch]}
    for what, memories in places.items():
        if not all(memory.intact() for memory in memories):
            trial.failures.append(f"guards: bytes next to an {what} buffer were overwritten")


def inputs_unchanged(trial: Trial) -> None:
    """Inputs are as they were, but for those that the op updates."""
    updated = {source for source, _ in trial.node.contract.updates}
    for index, (memory, given) in enumerate(zip(trial.inputs, trial.given, strict=True)):
        if index not in updated and not memory.snapshot().equal(given):
            trial.failures.append(f"inputs: {trial.node.inputs[index].name} was changed")


def untouched_cache(trial: Trial) -> None:
    """Of an input that the op updates, what the reference leaves alone is left alone bit for bit."""
    for source, target in trial.node.contract.updates:
        value, memory = trial.node.inputs[source], trial.inputs[source]
        if not lookup(value.format).plain:
            continue
        part = memory.parts[0]
        before = trial.given[source].view(part.dtype).view(part.shape)
        kept = trial.expected[target] == before.double()
        if not part[kept].equal(before[kept]):
            trial.failures.append(f"inputs: {value.name} was changed where nothing was to be written")


def sums(trial: Trial) -> None:
    """Of a format that keeps block sums, these are the sums of what is stored."""
    for value, memory in zip(trial.node.outputs, trial.outputs, strict=True):
        names = [plane.name for plane in lookup(value.format).planes]
        if "sums" in names:
            stored = memory.parts[names.index("sums")].double()
            dense = dequantize_planes(value.format, memory.parts, torch.double)
            wanted = dense.view(*stored.shape, -1).sum(dim=-1)
            if not torch.allclose(stored, wanted, rtol=1e-4, atol=1e-4 * float(dense.abs().max())):
                trial.failures.append(f"error: the sums of {value.name} are not those of its blocks")


def in_place(trial: Trial) -> None:
    """Right as well where an output is an input's memory, as the op allows."""
    for source, target in trial.node.contract.in_place:
        taken, value = trial.node.inputs[source], trial.node.outputs[target]
        if (taken.format, taken.extents) != (value.format, value.extents):
            continue
        outputs = list(trial.outputs)
        outputs[target] = trial.inputs[source]
        for memory, given in zip(trial.inputs, trial.given, strict=True):
            memory.restore(given)
        trial.bind(outputs)()
        trial.synchronize()
        bound = trial.kernel.precision + lookup(value.format).rounding
        found = dequantize_planes(value.format, outputs[target].parts)
        if compare(found, trial.expected[target], bound).failures:
            trial.failures.append(f"in place: wrong where {value.name} is written over {taken.name}")


def captured(trial: Trial, call: Launch, first: list[torch.Tensor]) -> None:
    """The same launch, replayed from a CUDA graph, gives the same bytes."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        trial.failures.append(f"captured: declared capturable, but capturing raises: {error}")
        return
    if not _same(trial.launch(graph.replay, POISONS[1]), first):
        trial.failures.append("captured: a replayed CUDA graph gives other bytes than the launch itself")


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(ours, theirs, strict=True))

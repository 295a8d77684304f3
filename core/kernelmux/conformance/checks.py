"""The checks beside the error: what a kernel may touch, and whether it does the same thing twice.

Each takes a trial, and adds to its `failures` in the form `check: what was seen`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from kernelmux.conformance.failing import failing
from kernelmux.conformance.guarded import POISONS, bits, same
from kernelmux.conformance.located import first_index
from kernelmux.conformance.measure import WORST
from kernelmux.contract.device import PLATFORMS
from kernelmux.errors import contained
from kernelmux.graph.formats import dequantize_planes, lookup, planes_of_rows, quantized_scales

if TYPE_CHECKING:
    from kernelmux.conformance.room import Room
    from kernelmux.conformance.trial import Trial
    from kernelmux.graph.graph import TensorNode

SCALE = 1e-3
"""Of itself, how far a scale may be off: a multiplication in bfloat16 is further, a reciprocal is not."""


def written(trial: Trial) -> None:
    """Every element of every output is written, and the same numbers come again, bit for bit.

    The second launch finds what the first one found. The third finds another poison: a byte of a kernel that repeats
    itself only differs then if it was left alone.
    """
    again, elsewhere = trial.launch(), trial.launch(poison=POISONS[1])
    if left := trial.unwritten(elsewhere):
        trial.failures.append(f"written: {left}")
    elif differing := trial.differing(again):
        trial.failures.append(f"repeatable: two launches on the same inputs differ: {differing}")
    elif differing := trial.differing(elsewhere):
        trial.failures.append(f"written: the result depends on what the memory held before: {differing}")


def follows(trial: Trial, launches: int) -> None:
    """What a launch gives is what a new binding would, whatever was launched before it, so many times.

    Inputs change at the same addresses, and another binding of the kernel, which has seen no others, has its turn.
    """
    if not launches:
        return
    room = trial.new_room()
    call = trial.bind(room)
    wanted = trial.launch(call, trial.other, room)
    turns = (
        (trial.call, trial.other, trial.room, wanted),
        (trial.call, trial.given, trial.room, trial.first),
        (call, trial.given, room, trial.first),
    )
    for count in range(launches):
        launched, contents, where, right = turns[count % len(turns)]
        if differing := trial.differing(trial.launch(launched, contents, where), right):
            what = "other inputs at the same addresses give" if count == 0 else f"launch {count + 1} by turns gives"
            trial.failures.append(f"repeatable: {what} what a new binding does not: {differing}")
            return
    for name, contents in trial.rearranged.items():
        room = trial.new_room()
        wanted = trial.launch(trial.bind(room), contents, room)
        if differing := trial.differing(trial.launch(contents=contents), wanted):
            trial.failures.append(
                f"repeatable: where {name} alone changes a launch gives what a new binding does not: {differing}"
            )
            return


def after_failure(trial: Trial) -> None:
    """A launch that raises midway, on other inputs, leaves nothing behind: the next one gives what the first did."""
    for last in (False, True):
        try:
            trial.launch(partial(failing, trial.call, last), trial.other)
        # As whatever library the kernel is written in may raise, or turn what was raised into.
        except (Exception, SystemExit):
            if differing := trial.differing(trial.launch()):
                trial.failures.append(f"repeatable: after a launch that raised the next one differs: {differing}")
                return


def own_stream(trial: Trial) -> None:
    """The launch goes to the stream that the kernel was bound to, though another one is current, and busy."""
    if trial.stream is not None and not same(trial.first, trial.launch(busy=True)):
        trial.failures.append("stream: it is launched on torch's current stream, not on the one that it was bound to")


def captured(trial: Trial) -> None:
    """The same launch, replayed from a captured graph, gives the same bytes, in as many device launches as declared.

    It is captured while the inputs hold other numbers: a graph keeps addresses, and nothing of what was there.
    """
    platform = trial.device.platform
    if not (platform.captures and trial.kernel.capturable):
        return
    graph = platform.graph(keep=True)
    trial.room.restore(trial.other)
    trial.synchronize()
    try:
        with platform.capturing(graph, trial.stream):
            trial.call()
    # Whatever library the kernel is written in may raise here, each an exception of its own.
    except BaseException as error:
        contained(error)
        trial.failures.append(f"captured: declared capturable, but capturing raises: {error}")
        return
    if (found := platform.count_launches(graph) or 0) > trial.kernel.launches:
        trial.failures.append(f"declarations: launches says {trial.kernel.launches}, a captured call has {found}")
    graph.instantiate()
    if differing := trial.differing(trial.launch(graph.replay, poison=POISONS[1])):
        trial.failures.append(f"captured: a replayed CUDA graph gives other bytes than the launch itself: {differing}")


def guards(trial: Trial) -> None:
    """Nothing is written outside the buffers."""
    node, room = trial.node, trial.room
    memories = [("the workspace", room.scratch)]
    memories += [(value.name, memory) for value, memory in zip(node.inputs, room.inputs, strict=True)]
    outputs = zip(node.outputs, room.outputs, strict=True)
    memories += [(value.name, memory) for value, memory in outputs if memory not in room.inputs]
    for name, memory in memories:
        if said := memory.overwritten():
            trial.failures.append(f"guards: beside {name} {said}")


def inputs_unchanged(trial: Trial, taken: Collection[int] = (), where: str = "") -> None:
    """Inputs are as they were, but for those that the op updates, or whose memory an output has `taken`."""
    left = {source for source, _ in trial.node.contract.updates} | set(taken)
    for index, (memory, given) in enumerate(zip(trial.inputs, trial.given, strict=True)):
        if index not in left and not memory.snapshot().equal(given):
            trial.failures.append(f"inputs: {trial.node.inputs[index].name} was changed{where}")


def process_state() -> dict[str, object]:
    """What all kernels of a process share, and the program around them, by what it is called."""
    small = torch.full((1,), 1e-40)
    return {
        "the state of torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "whether the smallest numbers become zero": bool((small * 1.0 == 0).item()),
        **{what: state for platform in PLATFORMS.values() for what, state in platform.settings().items()},
    }


def process_kept(trial: Trial, before: Mapping[str, object]) -> None:
    """The kernel leaves the process as it found it."""
    for what, state in process_state().items():
        if state != before[what]:
            trial.failures.append(f"process: {what} was changed")


def weights_unchanged(trial: Trial) -> None:
    """Packed weights, and the model's own, are as they were: other nodes read them too."""
    if not same(trial.prepared, [*trial.packed, *trial.planes]):
        trial.failures.append("inputs: the weights were changed by a launch, or when the kernel was bound")


def untouched_cache(trial: Trial) -> None:
    """Of an input that the op updates, what the reference leaves alone is left alone bit for bit.

    But for zeros, of either sign: one that is written where one was is not told from one that was left.
    """
    for source, target in trial.node.contract.updates:
        value, memory = trial.node.inputs[source], trial.inputs[source]
        kept = trial.expected[target] == trial.before(source)
        if not lookup(value.format).plain:
            # Of a row with a scale all is written or nothing.
            kept = kept.all(dim=-1)
        planes = zip(trial.planes_before(source), memory.parts, strict=True)
        if not all(_alike(old[kept], new[kept]) for old, new in planes):
            trial.failures.append(f"inputs: {value.name} was changed where nothing was to be written")


def _alike(old: torch.Tensor, new: torch.Tensor) -> bool:
    differing = bits(old) != bits(new)
    return all(bool(each.float().flatten()[differing.flatten()].eq(0).all()) for each in (old, new))


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


def scales(trial: Trial) -> None:
    """Of a format that keeps scales, each is the contract's: the block's largest magnitude over what an element holds.

    Values may dequantise well by others, as e4m3 by a largest of 240; but what reads them next may count on the rule.
    Where the op computes nothing the truth's magnitudes are the kernel's; else as exact as its numbers may be.
    """
    exact = trial.node.contract.flops(trial.node) == 0
    for index, (value, memory) in enumerate(zip(trial.node.outputs, trial.outputs, strict=True)):
        format = lookup(value.format)
        if format.plain:
            continue
        truth = trial.expected[index]
        wanted, size = (quantized_scales(value.format, of) for of in (truth, truth.square().mean().sqrt() + 0 * truth))
        found = format.planes[1].by_rows(memory.parts[1]).double()
        noise = 0.0 if exact else WORST * math.sqrt(trial.kernel.precision) * size
        tiny = torch.finfo(torch.float32).tiny
        # A scale of numbers that are none follows no rule.
        wrong = wanted.isfinite() & ~((found - wanted).abs() <= SCALE * wanted + noise + tiny)
        if bool(wrong.any()):
            layout = replace(trial.layout(index), name=f"the scales of {value.name}", head_dim=0, block=1)
            worst = torch.where(wrong, (found - wanted).abs().nan_to_num(torch.inf), 0.0)
            element = layout.element(first_index(worst == worst.max()), found, wanted)
            rule = "the largest magnitude over the largest that an element holds"
            trial.failures.append(f"scales: {element}, {rule}; {layout.located(wrong)}")


def in_place(trial: Trial) -> None:
    """Right as well where outputs are inputs' memory, as the op allows: one pair at a time, then all at once."""
    node = trial.node
    for shared in _sharings(node):
        outputs = list(trial.outputs)
        for target, source in shared.items():
            outputs[target] = trial.inputs[source]
        pairs = [f"{node.outputs[target].name} is written over {node.inputs[s].name}" for target, s in shared.items()]
        where = f" where {' and '.join(pairs)}"
        _right_in(trial, replace(trial.room, outputs=outputs), "in place", where)
        inputs_unchanged(trial, shared.values(), where)


def apart(trial: Trial) -> None:
    """Of a kernel that says so: right as well where inputs are columns of a wider matrix, and the gaps left alone."""
    if trial.kernel.strided:
        room = trial.new_room(apart=True)
        _right_in(trial, room, "strided", " where inputs are columns of a wider matrix")
        if any(memory.overwritten() for memory in (*room.inputs, *room.outputs)):
            trial.failures.append("guards: bytes between the rows of an input were overwritten")


def _right_in(trial: Trial, room: Room, check: str, where: str) -> None:
    """Bound to other memory the results are no worse than the first ones: what is wrong there too is another's."""
    found = trial.launch(trial.bind(room), room=room)
    for index, (value, memory) in enumerate(zip(trial.node.outputs, room.outputs, strict=True)):
        if not found[index].equal(trial.first[index]) and (wrong := trial.measure(index, memory).failures):
            trial.failures.append(f"{check}: {value.name} is wrong{where}: {wrong[0].partition(': ')[2]}")


def _sharings(node: TensorNode) -> Iterator[Mapping[int, int]]:
    """Which outputs may be which inputs' memory, {output: input}: each pair that fits, then as many as go together."""
    fitting = [
        (source, target)
        for source, target in node.contract.in_place
        if (node.inputs[source].format, node.inputs[source].extents)
        == (node.outputs[target].format, node.outputs[target].extents)
    ]
    yield from ({target: source} for source, target in fitting)
    together: dict[int, int] = {}
    for source, target in fitting:
        if target not in together and source not in together.values():
            together[target] = source
    if len(together) > 1:
        yield together


def one_row(trial: Trial, peer: tuple[float, float]) -> bool | None:
    """Whether the batch's last row equals that row alone, bit for bit; None where rows do not stand for themselves.

    A kernel that was offered for m rows takes one as well: wrong numbers are a failure, other bits are none.
    """
    last = trial.node.inputs[0].extents[0] - 1
    single = trial.one_row(last)
    if single is None:
        return None
    single.launch(single.bind())
    alike = True
    for index, (batch, one, held) in enumerate(zip(trial.outputs, single.outputs, trial.first, strict=True)):
        batch.restore(held)
        value = trial.node.outputs[index]
        if not same(planes_of_rows(value.format, batch.parts, slice(last, last + 1)), one.parts):
            alike = False
            batch_wanted = trial.expected[index]
            if wrong := single.measure(index, one, batch_wanted[last:], peer, batch_wanted).failures:
                trial.failures.append(f"{wrong[0]}, for the last row alone")
    return alike

"""What outlives a session's walks: step state and caches, in memory that the device has room for.

Enters: a plan, how many sequences and pages. Leaves: the buffers by name, or a CapacityError.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernelmux.contract.device import is_out_of_memory, out_of_memory
from kernelmux.contract.kernel import Planes
from kernelmux.contract.packed import PackedWeights
from kernelmux.graph.formats import Value, as_planes, empty_planes, human_bytes, human_count
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.plan.plan import Plan
from kernelmux.run.pages import CapacityError
from kernelmux.run.state import StepState


def make_buffers(
    plan: Plan, packed: PackedWeights, sequences: int, pages: int
) -> tuple[StepState, Mapping[str, Planes]]:
    """The step state of up to `sequences` sequences; and all buffers by name, the state's and zeroed caches.

    CapacityError where these, activations and the weights still to pack are more than the device has free.
    """
    extents = {
        "m": plan.max_rows,
        "outs": plan.max_rows,
        "seqs": sequences,
        "seqs+1": sequences + 1,
        "width": pages,
        "pages": pages,
        "page_size": PAGE_SIZE,
    }
    caches = [leaf.outputs[0].resolve(extents) for leaf in plan.graph.leaves if leaf.role == "cache"]
    stated = [leaf.outputs[0].resolve(extents) for leaf in plan.graph.leaves if leaf.role == "state"]
    nbytes = sum(value.nbytes for value in caches)
    _check_memory(plan, packed, nbytes)
    state = StepState({value.name: value.extents for value in stated}, plan.device)
    buffers: dict[str, Planes] = dict(state.buffers)
    try:
        buffers |= {value.name: _zeros(value, plan.device.torch) for value in caches}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = f"the cache of {human_count(pages * PAGE_SIZE, 'token')} takes {human_bytes(nbytes)}"
        said = out_of_memory(plan.device.torch, error)
        raise CapacityError(f"{said}: {told}; choose a narrower format of it, or fewer tokens") from error
    return state, buffers


def _zeros(value: Value, device: str) -> Planes:
    planes = empty_planes(value, device)
    for plane in planes:
        plane.zero_()
    return as_planes(planes)


def _check_memory(plan: Plan, packed: PackedWeights, cache: int) -> None:
    """CapacityError where activations, cache and the weights still to pack are more than the device has free."""
    free = plan.device.platform.free_bytes(plan.device)
    if free is None:
        return
    weights = packed.missing_bytes(plan.packed_forms)
    activations = max(schedule.layout.nbytes for schedule in plan.schedules.values())
    if weights + activations + cache > free:
        copies = f" ({human_bytes(plan.extra_copy_bytes)} of it second copies)" if plan.extra_copy_bytes else ""
        raise CapacityError(
            f"{plan.device.torch} ({plan.device.name}) has {human_bytes(free)} free; weights need "
            f"{human_bytes(weights)}{copies}, activations {human_bytes(activations)}, the cache {human_bytes(cache)}: "
            "choose smaller kernels, `[weights] copies = 1`, or fewer tokens"
        )

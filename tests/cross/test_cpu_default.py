"""What the default takes on each class of processors: by what kernels declare, and the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from absent import without
from kernelmux.contract import registry
from kernelmux.contract.device import described_device
from kernelmux.plan.plan import Plan
from kernelmux.run.model import load_random

CLASSES = ("cpu", "cpu avx2", "cpu avx512", "cpu avx512_bf16", "cpu amx")
FORMATS = ("Q4_1", "Q8_0", "bf16", "f32")
QUANTISED = ("Q4_1", "Q8_0")
LAYERS = {
    ("cpu", "Q4_1"): {1: "f32", 16: "f32", 512: "f32"},
    ("cpu avx2", "Q4_1"): {1: "int4", 2: "int4", 8: "int4", 16: "f32", 64: "f32", 512: "f32"},
    ("cpu avx512", "Q4_1"): {1: "int4", 8: "int4", 32: "int4", 64: "f32", 512: "f32"},
    ("cpu avx512_bf16", "Q4_1"): {1: "int4", 8: "int4", 32: "int4", 64: "f32", 512: "f32"},
    ("cpu amx", "Q4_1"): {1: "int4", 8: "int4", 16: "bf16", 32: "bf16", 64: "bf16", 512: "bf16"},
    ("cpu avx2", "Q8_0"): {1: "int8", 2: "int8", 16: "f32", 512: "f32"},
    ("cpu amx", "Q8_0"): {1: "int8", 2: "int8", 8: "bf16", 512: "bf16"},
    ("cpu avx2", "bf16"): {1: "f32", 16: "f32", 512: "f32"},
    ("cpu amx", "bf16"): {1: "f32", 16: "bf16", 512: "bf16"},
}
"""What was measured to be the fastest of torch's mul_mat, or within the noise of it, by class, format and rows: one
thread of a Xeon that was told to be of the class, times of single kernels with their weights rotated past the cache."""
TORCH = [(words, format, "torch") for words in CLASSES for format in FORMATS]
NUMBA = [(words, format, "numba") for words in CLASSES for format in QUANTISED]


@contextmanager
def installed(backend: str) -> Iterator[None]:
    """Within the block numba's backend is there, or only torch's."""
    if backend == "numba":
        if "numba" not in registry.current().working:
            pytest.skip("kernelmux-numba is not installed: its numba has no wheel for this Python")
        yield
    else:
        with without("numba"):
            yield


@pytest.fixture(scope="module", params=[*TORCH, *NUMBA], ids=" ".join)
def planned(request: pytest.FixtureRequest) -> tuple[str, str, str, Plan]:
    words, format, backend = request.param
    model = load_random(f"smollm2-135m:{format}")
    with installed(backend):
        return words, format, backend, model.plan(device=described_device(words), max_rows=512)


def test_most_of_the_layers_products_get_what_was_measured_to_be_the_fastest(planned: tuple[str, str, str, Plan]):
    words, format, backend, plan = planned
    for rows, kernel in LAYERS.get((words, format), {}).items() if backend == "torch" else ():
        # Where two are as fast, one saves a conversion here, the other one there.
        (most, count), *_ = _kernels(plan, rows).most_common()
        assert (rows, most) == (rows, f"torch:{kernel}")
        assert count > _kernels(plan, rows).total() / 2


def test_decoding_and_few_rows_of_quantised_weights_are_numbas_where_it_is_installed(
    planned: tuple[str, str, str, Plan],
):
    *_, backend, plan = planned
    for rows in (1, 2, 8) if backend == "numba" else ():
        steps = plan.schedule(rows, rows).steps
        readers = {step.choice.name for step in steps if step.node.layer is not None and step.node.weight[:1]}
        assert {name for name in readers if not name.startswith("numba:")} == set()
        assert "numba:int16" in readers


def test_neither_the_reference_nor_emulated_bf16_is_ever_taken(planned: tuple[str, str, str, Plan]):
    *_, plan = planned
    taken = {step.choice.name for schedule in plan.schedules.values() for step in schedule.steps}
    assert not {name for name in taken if name.startswith("reference")}
    assert "bf16" in plan.device.features or "torch:bf16" not in taken


@pytest.mark.parametrize("words", CLASSES)
def test_a_launch_that_a_fused_op_saves_does_not_pay_for_the_reference(words: str):
    """In a model so small that launches are most of its time."""
    plan = load_random("tiny:Q4_0").plan(device=described_device(words), max_rows=512)
    taken = {step.choice.name for schedule in plan.schedules.values() for step in schedule.steps}
    assert not {name for name in taken if name.startswith("reference")}


def test_logits_are_written_in_float32(planned: tuple[str, str, str, Plan]):
    """In bfloat16 distinct logits would tie; a kernel that writes nothing else is not taken for them."""
    *_, plan = planned
    for schedule in plan.schedules.values():
        (head,) = [step for step in schedule.steps if step.node.name == "logits"]
        assert head.node.outputs[0].format == "f32"
        assert head.choice.name != "torch:bf16"


def test_a_second_copy_of_the_weights_is_taken_where_decode_and_prompts_differ(planned: tuple[str, str, str, Plan]):
    *_, plan = planned
    few, many = (
        {
            step.choice.name
            for step in plan.schedule(rows, rows).steps
            if step.node.layer is not None and step.node.weight
        }
        for rows in (1, 512)
    )
    assert bool(plan.extra_copy_bytes) == (few != many)


def test_a_second_copy_must_fit_the_memory_where_that_is_known():
    model, device = load_random("smollm2-135m:Q4_1"), described_device("cpu avx2")
    with installed("torch"):
        roomy, tight = (model.plan(device=replace(device, memory=memory), max_rows=512) for memory in (2**31, 2**28))
    assert roomy.extra_copy_bytes > 2**28
    assert tight.extra_copy_bytes == 0
    # Fused ones read weights too.
    readers = [
        step for step in tight.schedule(512, 512).steps if "Q4_1" in {value.format for value in step.node.weight}
    ]
    assert {step.choice.name for step in readers if step.node.layer is not None} == {"torch:int4"}


def _kernels(plan: Plan, rows: int) -> Counter[str]:
    """How many of the layers' products each kernel got."""
    steps = plan.schedule(rows, rows).steps
    return Counter(step.choice.name for step in steps if step.node.op == "mul_mat" and step.node.layer is not None)

"""Loading on a card: weights travel once, are packed there to the bit, and a prepared session makes nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

import kernelmux
from kernelmux.contract.device import find_device
from kernelmux.contract.packed import PackedWeights, packed_key
from kernelmux.contract.packed_file import flat_bytes
from kernelmux.contract.uploads import PIECE, Uploads
from kernelmux.graph.formats import Weight
from kernelmux.run.feeds import Feed
from kernelmux.run.model import Model, load_random
from tiny_model import write_tiny_llama

MODELS = ("tiny:bf16", "tiny:Q4_K_M", "tiny:Q4_0", "tiny:Q5_1", "tiny:Q8_0", "tiny:Q3_K", "tiny:fp8_row")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def test_weights_arrive_as_they_were():
    """Of several pieces, of odd lengths, while what they replace is still at work."""
    generator = torch.Generator().manual_seed(0)
    words = PIECE // 4
    sizes = (1, 255, words - 1, words, words + 1, 3 * words + 77)
    planes = [torch.randn(size, generator=generator) for size in sizes]
    weights = {str(n): Weight(str(n), tuple(plane.shape), "f32", (plane,)) for n, plane in enumerate(planes)}
    device = find_device("cuda")
    uploads = Uploads(weights, device, [*weights, *weights])
    for name, plane in [*zip(weights, planes, strict=True)] * 2:
        there = uploads.take(name).planes[0]
        assert there.is_cuda
        copy = there.clone()
        uploads.done(name)
        del there
        assert copy.cpu().equal(plane)
    uploads.close()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_packed_on_the_card_is_packed_to_the_bit_as_weight_by_weight(name: str):
    """All forms that policies of each backend take, from one upload ahead of their turn."""
    drawn = load_random(name, "cpu")
    for use in ("*=auto", "*=cupy,triton,torch", "*=triton,torch", "*=torch,triton"):
        plan = drawn.plan(use=[use], device="cuda", max_rows=64)
        packed = PackedWeights(drawn.source.file.weights, plan.device)
        forms = {packed_key(step.node, step.choice.name, step.choice.kernel): step for step in plan.steps}
        with packed.uploading([*forms]):
            for step in forms.values():
                packed.get(step.node, step.choice.name, step.choice.kernel)
        for step in forms.values():
            found = packed.get(step.node, step.choice.name, step.choice.kernel)
            weights = [drawn.source.file.weights[value.name] for value in step.node.weights]
            there = [replace(weight, planes=tuple(plane.cuda() for plane in weight.planes)) for weight in weights]
            expected = step.choice.kernel.prepare(there, plan.device)
            for one, other in zip(found, expected, strict=True):
                assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), step.choice.name


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_step_makes_nothing_once_all_is_prepared(model: Model, sequences: int):
    session = model.session(model.plan(device="cuda", max_rows=64), 600, sequences)
    for _ in session.prepare():
        pass
    made = session.walker.made
    assert made.captured
    opened = [session.open() for _ in range(sequences)]
    for length in (1, 2, 7, 9, 33, 64, 70):
        for sequence in opened:
            session.feed(sequence, [length] * (length % 60 + 1))
        session.step([Feed(sequence, [1] * (index + 1)) for index, sequence in enumerate(opened)])
        for _ in session.decode(opened, [1] * sequences, 3):
            pass
    assert session.walker.made == made


def test_preparing_leaves_what_is_cached(model: Model):
    plan = model.plan(device="cuda", max_rows=64)
    session = model.session(plan, 100)
    sequence = session.open()
    ids = model.encode("hello there")
    session.feed(sequence, ids[:-1])
    for _ in session.prepare():
        pass
    token = int(session.feed(sequence, ids[-1:])[-1].argmax())
    found = [token, *(ids[0] for ids in session.decode([sequence], [token], 11))]
    answer = model.generate("hello there", plan, max_tokens=12)
    assert "".join(answer)
    assert found[: len(answer.ids)] == answer.ids


def test_forms_that_are_kept_on_disk_come_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Written from the card, sent there from the mapped files, and checked there."""
    monkeypatch.setenv("KERNELMUX_CACHE", str(tmp_path))
    path = write_tiny_llama(tmp_path / "q4.gguf", weight_type=GGMLQuantizationType.Q4_0)
    started = []
    for _ in range(2):
        model = kernelmux.load(path)
        session = model.session(model.plan(device="cuda", max_rows=64), 100, cache_packed=True)
        for _ in session.prepare():
            pass
        session.packed_cache.background.finish()
        assert session.packed_cache.notes == []
        started.append(session)
    first, second = started
    assert first.packed_cache.mapped_bytes == 0 < second.packed_cache.mapped_bytes
    forms = second.walker.packed._held
    for form, planes in first.walker.packed._held.items():
        for one, other in zip(planes, forms[form], strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            assert flat_bytes(one).equal(flat_bytes(other)), form
    ids = [1, 2, 3, 4]
    assert first.feed(first.open(), ids).equal(second.feed(second.open(), ids))

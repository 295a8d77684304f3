"""Decode steps as a device runs them, padded and feeding itself: here every launch is made instead of replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.contract.device import Device, Platform
from kernelmux.errors import KernelmuxError
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.measure.steps import CAPTURED_ROWS
from kernelmux.run.capture import captured_rows
from kernelmux.run.drawing import draw_next
from kernelmux.run.model import Model
from kernelmux.run.pages import CapacityError
from kernelmux.run.sampling import Sampling
from kernelmux.run.session import Feed, Session


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture
def eager_capture(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A capture that runs its launches at each call; the rows of each one that was made."""
    made = []

    def capture(walk, device, stream, tail, pool):
        made.append(len(walk.outputs["logits"]))

        class Replayed:
            outputs = walk.outputs

            def __call__(self):
                walk()
                tail(walk)

        return Replayed()

    monkeypatch.setattr("kernelmux.run.walker.capture", capture)
    monkeypatch.setattr("kernelmux.run.session.captured_rows", lambda plan, rows: 1 << (rows - 1).bit_length())
    return made


PROMPTS = [[1, 2, 3, 4, 5], [9] * 17, [100, 30]]


def _opened(session: Session, prompts: list[list[int]]):
    sequences = [session.open() for _ in prompts]
    firsts = [int(session.feed(s, ids)[-1].argmax()) for s, ids in zip(sequences, prompts, strict=True)]
    return sequences, firsts


def _by_hand(model: Model, plan, prompt: list[int], steps: int) -> list[int]:
    session = model.session(plan, 100)
    (sequence,), (token,) = _opened(session, [prompt])
    ids = []
    for _ in range(steps):
        token = int(session.step([Feed(sequence, [token])]).argmax())
        ids.append(token)
    return ids


@pytest.mark.parametrize("use", ["*=reference:f32", "*=torch:f32,torch:sdpa,torch:rows"])
def test_a_batch_decoded_on_the_device_gives_the_ids_of_each_sequence_alone(
    model: Model, eager_capture, use, monkeypatch
):
    plan = model.plan(use=[use])
    session = model.session(plan, 400, sequences=4)
    sequences, firsts = _opened(session, PROMPTS)
    columns = list(session.decode(sequences, firsts, 20))
    assert 4 in eager_capture
    monkeypatch.undo()
    for index, prompt in enumerate(PROMPTS):
        assert [ids[index] for ids in columns] == _by_hand(model, plan, prompt, 20)


def test_what_was_yielded_is_in_the_cache_and_can_be_gone_on_from(model: Model, eager_capture):
    """The device is a step ahead when a caller stops: that step does not count."""
    plan = model.plan(use=["*=reference:f32"])
    session = model.session(plan, 100)
    (sequence,), firsts = _opened(session, [PROMPTS[0]])
    steps = session.decode([sequence], firsts, 10)
    taken = [next(steps)[0] for _ in range(3)]
    steps.close()
    assert sequence.length == len(PROMPTS[0]) + 3
    more = [ids[0] for ids in session.decode([sequence], taken[-1:], 4)]
    assert taken + more == _by_hand(model, plan, PROMPTS[0], 7)


def test_padding_rows_change_neither_logits_nor_cache(model: Model, eager_capture, monkeypatch):
    plan = model.plan(use=["*=reference:f32"])
    padded, exact = (model.session(plan, 200, sequences=4) for _ in range(2))
    feeds = []
    for session in (padded, exact):
        sequences, firsts = _opened(session, PROMPTS)
        feeds.append([Feed(s, [token]) for s, token in zip(sequences, firsts, strict=True)])
    found = padded.step(feeds[0]).clone()
    monkeypatch.undo()
    wanted = exact.step(feeds[1])
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)


def test_decode_without_capture_takes_the_likeliest_of_each_step(model: Model):
    plan = model.plan(use=["*=reference:f32"])
    session = model.session(plan, 100)
    sequences, firsts = _opened(session, PROMPTS[:1])
    assert [ids[0] for ids in session.decode(sequences, firsts, 6)] == _by_hand(model, plan, PROMPTS[0], 6)


# Drawn tokens: settings of each sequence, ids as one at a time.

DRAWN = [
    Sampling(temperature=1.0, top_p=0.9, seed=1),
    Sampling(temperature=0.9, top_k=40, repetition_penalty=1.5, seed=2),
    Sampling(),
]


def _generated(model: Model, plan, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    """One logit row at a time, drawn by the host."""
    session, sampler = model.session(plan, 100), sampling.sampler(prompt)
    sequence, ids = session.open(), []
    logits = session.feed(sequence, prompt)[-1]
    for _ in range(count):
        ids.append(draw_next(sampler, logits))
        logits = session.step([Feed(sequence, ids[-1:])])[-1]
    return ids


def _decode_drawn(session: Session, steps: int, samplings: list[Sampling]):
    """The first ids, drawn from the prompts' logits, and those of a decode that goes on from there."""
    samplers = [each.sampler(prompt) for each, prompt in zip(samplings, PROMPTS, strict=True)]
    sequences = [session.open() for _ in samplings]
    logits = [session.feed(sequence, prompt)[-1] for sequence, prompt in zip(sequences, PROMPTS, strict=True)]
    firsts = [draw_next(sampler, row) for sampler, row in zip(samplers, logits, strict=True)]
    return sequences, samplers, firsts, session.decode(sequences, firsts, steps, samplers)


@pytest.mark.parametrize("captured", [True, False])
def test_drawn_tokens_of_a_batch_are_those_of_each_sequence_alone(
    model: Model, captured, request: pytest.FixtureRequest, monkeypatch
):
    """By rejection, sorted, and greedy, with a row of padding; past a block of numbers ahead."""
    monkeypatch.setattr("kernelmux.run.drawing.NUMBERS_AHEAD", 7)
    plan = model.plan(use=["*=torch:f32,torch:sdpa,torch:rows"])
    if captured:
        request.getfixturevalue("eager_capture")
        monkeypatch.setattr(Platform, "captures", True)
    session = model.session(plan, 400, sequences=4)
    _, _, firsts, steps = _decode_drawn(session, 20, DRAWN)
    columns = [firsts, *steps]
    assert bool(session.walker.made.captured) == captured
    monkeypatch.undo()
    for index, (prompt, sampling) in enumerate(zip(PROMPTS, DRAWN, strict=True)):
        assert [ids[index] for ids in columns] == _generated(model, plan, prompt, sampling, 21)


def test_a_sampler_draws_on_after_a_decode_that_was_left_early(model: Model, eager_capture, monkeypatch):
    """The step that the device is ahead by does not count: neither its random number nor its token."""
    monkeypatch.setattr(Platform, "captures", True)
    plan = model.plan(use=["*=reference:f32"])
    session = model.session(plan, 400, sequences=4)
    sequences, samplers, firsts, steps = _decode_drawn(session, 10, DRAWN)
    taken = [next(steps) for _ in range(3)]
    steps.close()
    rest = list(session.decode(sequences, taken[-1], 8, samplers))
    columns = [firsts, *taken, *rest]
    monkeypatch.undo()
    for index, (prompt, sampling) in enumerate(zip(PROMPTS, DRAWN, strict=True)):
        assert [ids[index] for ids in columns] == _generated(model, plan, prompt, sampling, 12)


def test_one_graph_draws_by_all_settings_that_take_the_same_way(model: Model, eager_capture):
    """Greedy decoding has its own, and so has what is drawn by rejection, or sorted."""
    session = model.session(model.plan(use=["*=reference:f32"]), 400, sequences=1)
    sequence, found = session.open(), []
    made = len(eager_capture)
    hot = Sampling(temperature=2.0, top_k=3, top_p=0.9)
    each = (Sampling(temperature=1.0), Sampling(temperature=2.0, seed=5), hot, replace(hot, top_k=5), Sampling(), None)
    for sampling in each:
        sequence.length = 0
        found.append(list(session.decode([sequence], [1], 8, sampling)))
    assert eager_capture[made:] == [1, 1, 1]
    assert found[0] != found[1]
    assert found[4] == found[5]


def test_what_was_prepared_for_some_settings_is_not_captured_as_they_are_drawn(
    model: Model, eager_capture, monkeypatch
):
    monkeypatch.setattr(Platform, "captures", True)
    session = model.session(model.plan(use=["*=reference:f32"]), 400)
    hot = Sampling(temperature=0.8, top_p=0.9)
    list(session.prepare({1}, hot))
    made = len(eager_capture)
    sequence = session.open()
    for sampling in (hot, replace(hot, top_p=0.8, seed=3), None):
        sequence.length = 0
        list(session.decode([sequence], [1], 4, sampling))
    assert len(eager_capture) == made
    list(session.decode([sequence], [1], 4, replace(hot, repetition_penalty=1.1)))
    assert len(eager_capture) == made + 1


def test_a_decode_takes_settings_for_all_or_for_each(model: Model):
    session = model.session(model.plan(use=["*=reference:f32"]), 100, sequences=3)
    sequences = [session.open() for _ in range(3)]
    hot = Sampling(temperature=1.0)
    for wrong in ([hot], [hot, hot]):
        with pytest.raises(KernelmuxError, match=rf"one for each: {len(wrong)} for 3"):
            next(session.decode(sequences, [1, 2, 3], 4, wrong))
    (first,) = session.decode(sequences, [1, 1, 1], 1, hot)
    assert len(set(first)) == 1  # The same seed on the same tokens.


def test_tokens_that_are_skipped_are_there_and_were_computed_by_nobody(model: Model):
    session = model.session(model.plan(use=["*=reference:f32"]), 100)
    sequence = session.open()
    session.skip(sequence, 60)
    assert (sequence.length, len(sequence.pages)) == (60, -(-60 // PAGE_SIZE))
    assert session.step([Feed(sequence, [1])]).isfinite().all()
    assert sequence.length == 61
    with pytest.raises(CapacityError, match="more pages"):
        session.skip(sequence, 100)
    assert sequence.length == 61
    session.close(sequence)
    with pytest.raises(CapacityError, match="closed"):
        session.skip(sequence, 1)


def test_a_cache_for_which_there_is_no_memory_is_told_with_its_size(model: Model, monkeypatch: pytest.MonkeyPatch):
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "

    def full(value, device):
        raise RuntimeError(f"{said}allocate 512000000000 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr("kernelmux.run.buffers.empty_planes", full)
    told = r"cpu is out of memory \(512000000000 bytes were asked for\): the cache of 1024 tokens takes 524.3 kB; "
    with pytest.raises(CapacityError, match=told):
        model.session(model.plan(use=["*=reference:f32"]), 1000)


class _Schedule:
    def __init__(self, not_capturable):
        self.not_capturable = not_capturable


class _Plan:
    """Buckets up to 5, 20 and 512 rows, of which the second holds a kernel that no graph can."""

    device = Device("cuda")
    max_rows = 512

    def bucket(self, rows):
        return next(top for top in (5, 20, 512) if rows <= top)

    def schedule(self, m, outs):
        return _Schedule(["step"] if self.bucket(m) == 20 else [])


@pytest.mark.parametrize(
    ("rows", "captured"),
    [(1, 1), (2, 2), (3, 4), (5, 5), (6, None), (16, None), (21, 32), (33, 64), (64, 64), (65, None)],
)
def test_a_step_is_padded_within_its_bucket_or_runs_eagerly(rows, captured):
    assert captured_rows(_Plan(), rows) == captured
    assert CAPTURED_ROWS == 64


def test_the_cpu_captures_nothing(model: Model):
    assert captured_rows(model.plan(use=["*=reference:f32"]), 1) is None

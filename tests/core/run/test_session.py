"""Decode steps as a device runs them, padded and feeding itself: here every launch is made instead of replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.contract.device import Device
from kernelmux.graph.graph import PAGE_SIZE
from kernelmux.measure.steps import CAPTURED_ROWS
from kernelmux.run.capture import captured_rows
from kernelmux.run.model import Model
from kernelmux.run.pages import CapacityError
from kernelmux.run.session import Feed, Session
from kernelmux.run.walker import Walker


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture
def eager_capture(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A capture that runs its launches at each call; the rows of each one that was made."""
    made = []

    def capture(self, tail, **dims):
        walk = self.bind(**dims)
        made.append(dims["m"])

        class Replayed:
            outputs = walk.outputs

            def __call__(self):
                walk()
                tail(walk)

        return Replayed()

    monkeypatch.setattr(Walker, "capture", capture)
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

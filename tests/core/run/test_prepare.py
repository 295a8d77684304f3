"""Preparing: afterwards a step packs, binds and captures nothing; without it the first step of its extents does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import kernelmux
from command import TIMEOUT
from fake_backend import FakeKernel, compute, whole_backend
from kernelmux.contract import registry
from kernelmux.errors import PlanError
from kernelmux.policy.policy import parse_policy
from kernelmux.run.feeds import Feed
from kernelmux.run.model import Model
from kernelmux.run.pages import CapacityError
from kernelmux.run.progress import Progress
from kernelmux.run.session import Session


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


def _prepared(session: Session, rows=None) -> Session:
    for _ in session.prepare(rows):
        pass
    return session


def test_a_step_makes_nothing_once_all_is_prepared(model: Model):
    session = _prepared(model.session(model.plan(max_rows=40), 400, sequences=5))
    made = session.walker.made
    assert made.packed
    assert made.bound
    sequences = []
    for length in (1, 3, 9, 17, 23, 40, 47):
        sequences.append(session.open())
        session.feed(sequences[-1], [length] * length)
    for several in (sequences[:5], sequences[2:5]):
        session.step([Feed(sequence, [5] * (index + 1)) for index, sequence in enumerate(several)])
        for _ in session.decode(several, [1] * len(several), 3):
            pass
    assert session.walker.made == made


def test_prepared_for_some_rows_steps_of_others_bind_their_own(model: Model):
    session = _prepared(model.session(model.plan(max_rows=40), 400), {17, 1})
    made, sequence = session.walker.made, session.open()
    session.feed(sequence, [1] * 17)
    session.feed(sequence, [1] * 20)  # As 17 do, 18 to 20 rows take the walk of 20.
    next(session.decode([sequence], [1], 1))
    assert session.walker.made == made
    session.feed(sequence, [1] * 21)
    assert session.walker.made.bound == made.bound + len(session.plan.schedule(21, 1).steps)


@pytest.mark.parametrize("tokens", [1, 7, 40, 97])
def test_prepared_for_all_logits_a_feed_makes_nothing(model: Model, tokens: int):
    session = model.session(model.plan(max_rows=40), 100)
    for _ in session.prepare_logits(tokens):
        pass
    made = session.walker.made
    assert made.bound
    assert len(session.feed(session.open(), [1] * tokens, all_logits=True)) == tokens
    assert session.walker.made == made


@pytest.mark.parametrize("rows", [0, -1, 41])
def test_rows_that_no_step_has_are_refused_at_once(model: Model, rows: int):
    session = model.session(model.plan(max_rows=40), 100)
    with pytest.raises(PlanError, match="40"):
        next(session.prepare({1, rows}))


def test_a_prompt_that_does_not_fit_leaves_the_sequence_as_it_was(model: Model):
    session = model.session(model.plan(max_rows=8), 32)
    sequence = session.open()
    session.feed(sequence, [1] * 5)
    before = sequence.length, list(sequence.pages)
    for ids in ([1] * 400, [1] * 9 + [10**6]):
        with pytest.raises(CapacityError):
            session.feed(sequence, ids)
        assert (sequence.length, sequence.pages) == before


def test_with_no_rows_it_only_packs(model: Model):
    session = _prepared(model.session(model.plan(), 100), ())
    assert session.walker.made.packed
    assert not session.walker.made.bound


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 17, 33])
def test_padding_changes_no_logits(model: Model, rows: int):
    """Of a prompt, with what was there before and what follows it."""
    plan = model.plan(use=["*=reference"], max_rows=64)
    ids = torch.randint(200, (rows + 12,), generator=torch.Generator().manual_seed(rows)).tolist()
    padded, single = model.session(plan, 200), model.session(plan, 200)
    sequence, other = padded.open(), single.open()
    padded.feed(sequence, ids[:5])
    found = padded.feed(sequence, ids[5 : 5 + rows], all_logits=True)
    after = padded.feed(sequence, ids[5 + rows :])
    expected = torch.cat([single.feed(other, [id]) for id in ids])
    torch.testing.assert_close(found, expected[5 : 5 + rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[0], expected[-1], rtol=1e-4, atol=1e-4)


def test_while_kernels_are_compiled_that_is_the_stage_though_weights_are_packed(model: Model):
    """The last weight is packed while the first launch waits for just that."""
    told, before, last = list[Progress](), list[str](), threading.Event()
    norms = sum(node.op == "rms_norm" for node in model.graph.ops)

    class Slow(FakeKernel):
        def prepare(self, weights, device):
            before.append(told[-1].stage)
            if len(before) == norms:
                last.set()
            return super().prepare(weights, device)

        def bind(self, node, tensors, stream):
            assert last.wait(TIMEOUT)
            return super().bind(node, tensors, stream)

    with registry.isolated(a=whole_backend(rms_norm=Slow(work=compute, packed_bytes=64))):
        plan = model.plan(parse_policy('fuse = false\n[defaults]\nuse = ["a"]\n', "p.toml"), max_rows=4)
        for progress in model.session(plan, 20).prepare({4}):
            told.append(progress)
    assert before[0] != before[-1] == "compiling kernels"
    whole = {each.stage: each.done == each.total for each in told}
    assert whole == dict.fromkeys(["placing steps", "packing weights", "compiling kernels", "binding steps"], True)


def test_kinds_of_work_are_bound_at_the_same_time(model: Model):
    """None waits for another one's end."""
    kinds, met = threading.Barrier(2), []

    class Slow(FakeKernel):
        def bind(self, node, tensors, stream):
            if node.op in ("rope", "silu") and node.op not in met:
                met.append(node.op)
                kinds.wait(20)
            return super().bind(node, tensors, stream)

    with registry.isolated(a=whole_backend(**{op: Slow(op, work=compute) for op in ("rope", "silu")})):
        plan = model.plan(parse_policy('fuse = false\n[defaults]\nuse = ["a"]\n', "p.toml"), max_rows=4)
        _prepared(model.session(plan, 20), {4})
    assert sorted(met) == ["rope", "silu"]

"""The KL divergence between two plans of a model: held against one computed in one go, however it is dealt out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernelmux
from kernelmux.errors import ModelError
from kernelmux.plan.plan import Plan
from kernelmux.run.divergence import divergence, prose
from kernelmux.run.model import Model

F32 = "*=torch:f32,torch:sdpa,torch:rows"
IDS = list(range(40, 240))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return kernelmux.load(tiny)


@pytest.fixture(scope="module")
def exact(model: Model) -> Plan:
    return model.plan(use=[F32])


@pytest.fixture(scope="module")
def rough(model: Model) -> Plan:
    return model.plan(use=[F32, "mul_mat=torch:bf16"])


def test_a_plan_does_not_differ_from_itself(model: Model, exact: Plan):
    assert divergence(model, exact, exact, IDS) == 0.0


@pytest.mark.parametrize("most", [512, 150, 16])
@pytest.mark.parametrize("rows", [None, 64, 7, 1])
def test_it_is_the_mean_of_p_log_p_over_q_whatever_the_steps(model: Model, exact: Plan, rough: Plan, most, rows):
    p, q = (model.forward(IDS, plan).double().softmax(-1) for plan in (exact, rough))
    wanted = float((p * (p / q).log()).sum(-1).mean())
    assert wanted > 1e-7
    found = divergence(model, rough, model.plan(use=[F32], max_rows=most), IDS, rows)
    assert found == pytest.approx(wanted, rel=1e-2)


def test_a_plan_of_fewer_rows_is_fed_as_many_as_it_takes(model: Model, exact: Plan):
    small = model.plan(use=[F32], max_rows=16)
    assert divergence(model, small, exact, IDS, 64) == pytest.approx(0.0, abs=1e-9)


def test_a_likely_token_that_is_held_to_be_impossible_costs_what_it_should(model: Model, exact: Plan, monkeypatch):
    """By hand: p = (1/2, 1/2), q = (1, e^-40) / (1 + e^-40), so that KL = 20 - log 2."""
    logits = iter([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -40.0]])])
    monkeypatch.setattr("kernelmux.run.session.Session.feed", lambda *arguments, **options: next(logits))
    assert divergence(model, exact, exact, IDS[:1]) == pytest.approx(20 - 0.6931471805599453, rel=1e-12)


@pytest.mark.parametrize(("ids", "rows"), [([], None), ([1] * 257, None), (IDS, 0)], ids=["none", "too many", "no row"])
def test_no_tokens_more_than_the_model_holds_or_steps_of_none_are_a_model_error(model: Model, exact: Plan, ids, rows):
    with pytest.raises(ModelError, match=r"taken over 1 to 256 tokens in steps of one row or more, not over \d+"):
        divergence(model, exact, exact, ids, rows)


@pytest.mark.model
def test_the_text_has_some_2000_tokens_and_no_paragraph_twice(smollm2: Path):
    assert 1900 <= len(kernelmux.load(smollm2).encode(prose())) <= 2100
    paragraphs = prose().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 20
